"""How fast training is: tokens a second, seconds a step, share of the device's peak, memory, time left."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sjd2_lightning.models.backbone import Backbone, evaluation_mode
from sjd2_lightning.models.rounding import Int8Linear
from sjd2_lightning.training.module import CodeBatch, SJD2Module

# Dense operations a second in bfloat16, by a part of a card's name; by their makers' data sheets, first fit.
PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
_GIB = 2**30


class Speed(Callback):
    """Logs the pace of the steps since it was last logged, validations in between left out.

    `train/tokens_per_s` counts image codes of all ranks. `train/mfu` is the share of the peak in bfloat16
    that the model's own operations take, what is computed again not among them; nothing is logged of it
    where the peak is not known. `train/memory_gib` is the most that this process has held.
    """

    def __init__(self) -> None:
        self._since: float | None = None
        self._first = 0  # step at `_since`
        self._tokens = 0  # of this rank, since then
        self._flops: float | None = None  # of a picture
        self._pictures = 0

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Counts operations before the first step."""
        if self._flops is None and isinstance(pl_module, SJD2Module):
            self._flops = picture_flops(pl_module, batch) if peak(trainer) else 0.0
        if self._since is None:
            self._start(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A validation is no part of the pace: what was not logged yet is dropped."""
        self._since = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs where Lightning will write a row."""
        codes = getattr(batch, "image_ids", None)
        if self._since is None or codes is None:
            return
        self._tokens += codes.numel()
        self._pictures += len(codes)
        steps = trainer.global_step - self._first
        if steps == 0 or trainer.global_step % trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return
        seconds = time.perf_counter() - self._since
        pl_module.log("train/tokens_per_s", self._tokens * trainer.world_size / seconds, prog_bar=True)
        pl_module.log("train/step_seconds", seconds / steps)
        pl_module.log("train/memory_gib", memory_bytes(pl_module.device) / _GIB)
        left = trainer.estimated_stepping_batches - trainer.global_step
        pl_module.log("train/hours_left", left * seconds / steps / 3600, prog_bar=True)
        if (most := peak(trainer)) and self._flops:
            pl_module.log("train/mfu", self._flops * self._pictures / seconds / most, prog_bar=True)
        self._start(trainer)

    def _start(self, trainer: Trainer) -> None:
        self._since, self._first = time.perf_counter(), trainer.global_step
        self._tokens = self._pictures = 0


def peak(trainer: Trainer) -> float | None:
    """Operations a second of this rank's device in bfloat16; None if unknown, or in other training."""
    device = trainer.strategy.root_device
    if device.type != "cuda" or not str(trainer.precision).startswith("bf16"):
        return None
    return peak_of(torch.cuda.get_device_name(device))


def peak_of(name: str) -> float | None:
    """Operations a second in bfloat16 of a card by its name; None if unknown."""
    return next((value for part, value in PEAKS.items() if part in name), None)


def picture_flops(module: SJD2Module, batch: CodeBatch) -> float:
    """Operations of a training step for one picture without noise, counted by torch on its forward pass.

    The backward pass takes as many for the gradients of inputs, and once more for those of weights that are
    trained. Attention counts whole, masked or not, as its dense kernels compute it. All ranks must come here.
    """
    alone = _First(batch)
    prompts = module._prompts(alone.captions, None)
    # the counter knows matrix products, and of the fused kernels of attention only those of CUDA
    kernels = sdpa_kernel(SDPBackend.MATH) if alone.image_ids.device.type == "cpu" else nullcontext()
    with (
        _dense_masks(module.backbone),
        evaluation_mode(module.backbone),
        torch.no_grad(),
        torch.compiler.set_stance("force_eager"),
        kernels,
        FlopCounterMode(display=False) as counter,
    ):
        module.losses(alone, prompts, None)
    return counter.get_total_flops() * (2 + trained_share(module.backbone))


@contextmanager
def _dense_masks(backbone: Backbone) -> Iterator[None]:
    """FlexAttention that is not compiled would hold all scores, and its operations are not counted."""
    before = backbone.takes_visible
    backbone.takes_visible = False
    try:
        yield
    finally:
        backbone.takes_visible = before


class _First:
    """The first picture of a batch."""

    def __init__(self, batch: CodeBatch) -> None:
        self.captions, self.image_ids = batch.captions[:1], batch.image_ids[:1]


def trained_share(model: nn.Module) -> float:
    """Share of the weights of linear layers that are trained."""
    sizes = {False: 0, True: 0}  # by whether they are trained
    for layer in model.modules():
        if isinstance(layer, nn.Linear | Int8Linear):
            is_trained = isinstance(layer, nn.Linear) and layer.weight.requires_grad
            sizes[is_trained] += layer.in_features * layer.out_features
    return sizes[True] / max(1, sum(sizes.values()))


def memory_bytes(device: torch.device) -> int:
    """The most that this process has held on its device so far; on the CPU, of all that it has."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return held if sys.platform == "darwin" else held * 1024
