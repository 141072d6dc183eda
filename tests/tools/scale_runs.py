"""The same few steps on one process or on several, by a strategy: losses, weights, and a continuation.

As a program (`python -m tests.tools.scale_runs OUT`, with LOCAL_RANK and so on) it is one rank of them.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from sjd2_lightning.training.checkpoints import VerifiedCheckpointIO
from sjd2_lightning.training.fsdp import ShardedModule, ShardedStrategy, gathered_state
from sjd2_lightning.training.guards import NonFiniteGuard
from sjd2_lightning.training.module import SJD2Module
from sjd2_lightning.training.optimizer import OptimizerConfig
from sjd2_lightning.training.resume import RandomStates
from tests.tools.tiny_backbones import tiny_chameleon
from tests.training.test_module import OFF, QUIET, Batch, batch_of, loader

NUM_STEPS, ACCUMULATE = 4, 2


def share_of(batch: Batch, rank: int, world_size: int) -> Batch:
    """A rank's rows of a batch."""
    rows = slice(rank * 4 // world_size, (rank + 1) * 4 // world_size)
    return Batch(batch.captions[rows], batch.image_ids[rows])


def few_steps(
    strategy: Any, folder: Path, num_steps: int = NUM_STEPS, start: Path | None = None
) -> dict[str, Any]:
    """Steps with accumulation, clipping and activation checkpointing; the mean loss of each batch."""
    world_size, rank = int(os.environ.get("WORLD_SIZE_OF_TEST", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    sharded = isinstance(strategy, ShardedStrategy)
    # ragged prompts of one batch are padded to different widths on the ranks, which changes nothing
    backbone = tiny_chameleon(7, seed=4, scale=0.3)
    backbone.checkpoint_activations()
    kind = ShardedModule if sharded else SJD2Module
    module = kind(backbone, OFF, OptimizerConfig(lr=2e-2, warmup_steps=1), (6, 6), prompt_dropout=0.0)
    losses: list[torch.Tensor] = []

    class Note(L.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            losses.append(
                trainer.strategy.reduce(outputs["loss"].detach().clone() * ACCUMULATE, reduce_op="mean")
            )

    trainer = L.Trainer(
        max_steps=num_steps,
        devices=world_size,
        strategy=strategy,
        plugins=[VerifiedCheckpointIO()],
        accumulate_grad_batches=ACCUMULATE,
        gradient_clip_val=0.5,
        callbacks=[
            Note(),
            NonFiniteGuard(),
            RandomStates(),
            ModelCheckpoint(folder, filename="{step}", every_n_train_steps=2, save_top_k=-1),
        ],
        **QUIET | {"enable_checkpointing": True, "use_distributed_sampler": False},
    )
    used = 0 if start is None else 2 * ACCUMULATE  # the loader is a plain one
    order = [*range(used, NUM_STEPS * ACCUMULATE), *range(used)]
    batches = [share_of(batch_of(seed), rank, world_size) for seed in order]
    trainer.fit(module, loader(batches), ckpt_path=start)
    state = gathered_state(module.backbone) if sharded else module.backbone.state_dict()
    return {"losses": [float(loss) for loss in losses], "state": state}


if __name__ == "__main__":
    torch.set_num_threads(1)
    out = Path(sys.argv[1])
    found = {
        "ddp": few_steps("ddp", out / "ddp"),
        "fsdp": few_steps(ShardedStrategy(), out / "fsdp"),
        "fsdp resumed": few_steps(ShardedStrategy(), out / "fsdp2", start=out / "fsdp" / "step=2.ckpt"),
    }
    if os.environ["LOCAL_RANK"] == "0":
        torch.save(found, out / "found.pt")
