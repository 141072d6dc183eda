"""The group `trainer`: where a training runs, how fast, and how long."""

from __future__ import annotations

import importlib.util
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from sjd2_lightning.config.groups import Count, Group, Natural, NaturalOrAll, Positive, Share

_LONG = 4096  # slots of an image from which a dense mask is large; not measured


class TrainerConfig(Group):
    """Arguments of `lightning.Trainer`."""

    accelerator: Literal["auto", "cpu", "gpu", "mps"]
    devices: Annotated[int, Field(ge=1, le=1024)] | Literal["auto"]
    num_nodes: Annotated[int, Field(ge=1, le=65536)]
    strategy: str
    reshard: bool
    compile: bool | Literal["auto"]
    attention: Literal["auto", "flex", "sdpa"]
    fp8: bool
    precision: Literal["32-true", "bf16-mixed", "16-mixed", "bf16-true"]
    max_steps: NaturalOrAll
    max_epochs: NaturalOrAll | None
    max_time: Annotated[str, Field(pattern=r"^\d+:\d\d:\d\d:\d\d$")] | None
    val_check_interval: Count | Annotated[float, Field(gt=0, le=1)] | None
    check_val_every_n_epoch: Count | None
    limit_train_batches: Natural | Share
    limit_val_batches: Natural | Share
    num_sanity_val_steps: NaturalOrAll
    gradient_clip_val: Positive | None
    accumulate_grad_batches: Count
    log_every_n_steps: Count
    reload_dataloaders_every_n_epochs: Natural
    fast_dev_run: bool | Count
    deterministic: bool | Literal["warn"]
    profiler: Literal["torch"] | None

    def lightning(self) -> dict[str, Any]:
        """What Lightning's own trainer takes of it."""
        return self.model_dump(exclude={"max_time", "reshard", "compile", "attention", "fp8", "profiler"})

    @property
    def compiled(self) -> bool:
        """Whether layers are compiled; `auto` does on CUDA, where Triton is installed."""
        has_triton = importlib.util.find_spec("triton") is not None
        return self.on_cuda and has_triton if self.compile == "auto" else self.compile

    @property
    def on_cuda(self) -> bool:
        """Whether training runs on CUDA."""
        return self.accelerator in ("auto", "gpu") and torch.cuda.is_available()

    def attends_flexibly(self, num_slots: int) -> bool:
        """Whether attention is FlexAttention; `auto` takes it for long sequences in compiled layers on CUDA.

        Args:
            num_slots: slots of an image.
        """
        is_long = self.on_cuda and self.compiled and num_slots >= _LONG
        return is_long if self.attention == "auto" else self.attention == "flex"

    def problems(self) -> list[str]:
        """A run without an end, a time of validation that Lightning does not know."""
        found = []
        if self.strategy == "fsdp" and self.precision == "16-mixed":
            found.append("precision=16-mixed: FSDP2 has no gradient scaler; use trainer.precision=bf16-mixed")
        if self.fp8 and not self.precision.startswith("bf16"):
            found.append(
                f"fp8=true: is rounded from bfloat16, and trainer.precision={self.precision}; set "
                "trainer.precision=bf16-mixed"
            )
        if self.max_steps == -1 and self.max_epochs in (-1, None) and not self.fast_dev_run:
            found.append(
                f"max_steps=-1: needs trainer.max_epochs, which is {self.max_epochs}: the learning rate "
                "falls until the end, so there must be one"
            )
        if self.check_val_every_n_epoch is None and isinstance(self.val_check_interval, float):
            found.append(
                f"val_check_interval={self.val_check_interval}: is a share of an epoch; set "
                "trainer.check_val_every_n_epoch to a number, or give batches"
            )
        if self.check_val_every_n_epoch is None and self.val_check_interval is None:
            found.append("val_check_interval=None: set it, or trainer.check_val_every_n_epoch, to a number")
        if self.check_val_every_n_epoch is not None and isinstance(self.val_check_interval, int):
            found.append(
                f"check_val_every_n_epoch={self.check_val_every_n_epoch}: needs a share of an epoch as "
                f"trainer.val_check_interval, which is {self.val_check_interval}; set one of them to null"
            )
        return found
