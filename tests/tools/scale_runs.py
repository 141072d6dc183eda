"""The same few steps on one process or on several, by a strategy: losses, weights, and a continuation.

As a program (`python -m tests.tools.scale_runs OUT`, with LOCAL_RANK and so on) it is one rank of them.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from sjd2_lightning.callbacks import SamplingCallback
from sjd2_lightning.decoding.config import DecodingConfig
from sjd2_lightning.evaluation.prompts import PromptItem
from sjd2_lightning.models.lora import LoraSettings
from sjd2_lightning.models.rounding import round_frozen
from sjd2_lightning.noise import NoiseProcess
from sjd2_lightning.training import fsdp
from sjd2_lightning.training.checkpoints import VerifiedCheckpointIO
from sjd2_lightning.training.fsdp import ShardedModule, ShardedStrategy, gathered_state
from sjd2_lightning.training.guards import NonFiniteGuard
from sjd2_lightning.training.optimizer import OptimizerConfig
from sjd2_lightning.training.redrafting import CorrectorTraining
from sjd2_lightning.training.resume import RandomStates
from tests.tools.tiny_backbones import tiny_chameleon
from tests.training.test_module import NOISE, OFF, QUIET, Batch, batch_of, loader

NUM_STEPS, ACCUMULATE = 4, 2
TRAJECTORY = replace(NOISE, process=NoiseProcess(source="mean", state="draft"), trajectory=True)
KINDS = {  # of runs: noise, precision, and whether an adapter is trained
    "plain": (OFF, "32-true", False),
    "trajectory": (TRAJECTORY, "32-true", False),
    "adapter": (NOISE, "32-true", True),
    "drafts": (NOISE, "32-true", False),
    "bf16": (OFF, "bf16-mixed", False),
    "bf16 trajectory": (TRAJECTORY, "bf16-mixed", False),
}


class TwoRanks(ShardedModule):
    """One process in the place of two ranks: its batches are theirs in turn, with their noise."""

    turn = 0

    @property
    def global_rank(self) -> int:
        return self.turn

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        self.turn = batch_idx % 2
        return super().training_step(batch, batch_idx // 2)


def share_of(batch: Batch, rank: int, world_size: int) -> Batch:
    """A rank's rows of a batch."""
    rows = slice(rank * 4 // world_size, (rank + 1) * 4 // world_size)
    return Batch(batch.captions[rows], batch.image_ids[rows])


def few_steps(
    strategy: Any,
    folder: Path,
    num_steps: int = NUM_STEPS,
    start: Path | None = None,
    kind: str = "plain",
    compiled: bool = False,
    rounded: bool = False,
) -> dict[str, Any]:
    """Steps with accumulation, clipping and activation checkpointing; the mean loss of each batch.

    Args:
        strategy: of Lightning's; on one process its batches are those of both ranks in turn.
        folder: of checkpoints.
        num_steps: optimizer steps.
        start: checkpoint to go on from.
        kind: one of `KINDS`.
        compiled: whether layers are, by autograd's own kernels, with selective checkpointing.
        rounded: whether the base of an adapter is in int8.
    """
    world_size, rank = int(os.environ.get("WORLD_SIZE_OF_TEST", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    noise, precision, adapter = KINDS[kind]
    sharded = isinstance(strategy, ShardedStrategy)
    # ragged prompts of one batch are padded to different widths on the ranks, which changes nothing
    backbone = tiny_chameleon(7, seed=4, scale=0.3)
    if adapter:
        torch.manual_seed(0)
        backbone.add_lora(LoraSettings(rank=2))
    if rounded:
        round_frozen(backbone.trunk.layers)
    backbone.checkpoint_activations("selective" if compiled else "full")
    if compiled:
        backbone.compile_layers("aot_eager")
    made = TwoRanks if world_size == 1 else ShardedModule
    torch.manual_seed(0)
    corrector = CorrectorTraining(width=4 if kind == "drafts" else 0)
    optimizer = OptimizerConfig(lr=2e-2, warmup_steps=1)
    module = made(backbone, noise, optimizer, (6, 6), 0.0, corrector=corrector)
    module.bucket = 16 if compiled else 1
    losses: list[torch.Tensor] = []
    accumulate = ACCUMULATE * 2 // world_size

    class Note(L.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            loss = outputs["loss"].detach().clone() * accumulate
            losses.append(trainer.strategy.reduce(loss, reduce_op="mean"))

    trainer = L.Trainer(
        max_steps=num_steps,
        devices=world_size,
        strategy=strategy,
        precision=precision,
        plugins=[VerifiedCheckpointIO()],
        accumulate_grad_batches=accumulate,
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
    ranks = [rank] if world_size == 2 else [0, 1]
    batches = [share_of(batch_of(seed), own, 2) for seed, own in itertools.product(order, ranks)]
    trainer.fit(module, loader(batches), ckpt_path=start)
    state = gathered_state(module.backbone) if sharded else module.backbone.state_dict()
    found = [float(loss) for loss in losses]
    if world_size == 1:  # the mean over both ranks
        found = [(first + second) / 2 for first, second in zip(found[::2], found[1::2], strict=True)]
    return {"losses": found, "state": state}


PROMPTS = [PromptItem("a", "red cat", 1), PromptItem("b", "a dog on a mat", 2), PromptItem("c", "blue", 3)]
METHODS = {"ar": DecodingConfig("ar", window=1), "sjd2": DecodingConfig("sjd2", 4, 1)}


def sampled(folder: Path) -> dict[str, Any]:
    """Codes that validations draw before and behind two sharded steps, and the weights behind them."""
    backbone = tiny_chameleon(7, seed=4, scale=0.3)
    module = ShardedModule(backbone, OFF, OptimizerConfig(lr=2e-2, warmup_steps=1), (6, 6), 0.0)
    sampling = SamplingCallback(PROMPTS, METHODS, folder / "samples", batch_size=1)
    trainer = L.Trainer(
        max_steps=2,
        devices=2,
        strategy=ShardedStrategy(),
        callbacks=[sampling],
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        **QUIET,
    )
    val = loader([batch_of()])
    trainer.validate(module, val, verbose=False)
    trainer.fit(module, loader([batch_of(seed) for seed in range(2)]), val)
    state = gathered_state(module.backbone)
    assert all(value.is_meta for value in module._hollow[0].state_dict().values()), "gathered weights stay"
    with patch.object(fsdp, "room_on", lambda device: 0.0), module.whole_backbone() as none:
        assert none is None, "there is no room for whole weights"
    return {"codes": {step: drawn_codes(folder, step) for step in (0, 2)}, "state": state}


def drawn_codes(folder: Path, step: int) -> dict[str, list[int]]:
    """Codes of the images of a validation, by method and prompt."""
    files = (folder / "samples" / f"step_{step:08d}").glob("records*.jsonl")
    records = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return {f"{one['method']} {one['key']}": one["image_ids"] for one in records}


if __name__ == "__main__":
    torch.set_num_threads(1)
    out = Path(sys.argv[1])
    found = {
        f"{name} {kind}": few_steps(strategy, out / name / kind, kind=kind)
        for kind in KINDS
        for name, strategy in {"ddp": "ddp", "fsdp": ShardedStrategy()}.items()
    }
    found["fsdp adapter compiled"] = few_steps(ShardedStrategy(), out / "c", kind="adapter", compiled=True)
    found["ddp int8"] = few_steps("ddp", out / "int8", kind="adapter", rounded=True)
    found["fsdp kept"] = few_steps(ShardedStrategy(reshard=False), out / "kept")
    saved = out / "fsdp" / "plain" / "step=2.ckpt"
    found["fsdp resumed"] = few_steps(ShardedStrategy(), out / "resumed", start=saved)
    found["fsdp sampled"] = sampled(out / "sampled")
    if os.environ["LOCAL_RANK"] == "0":
        torch.save(found, out / "found.pt")
