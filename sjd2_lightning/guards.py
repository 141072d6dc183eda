"""Training stops, or skips the step, before a gradient that is not finite reaches the weights (ours)."""

from __future__ import annotations

import logging
from typing import Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer

log = logging.getLogger(__name__)


class NonFiniteGuard(Callback):
    """Looks at the norm of all gradients before each optimizer step.

    A loss that is not finite gives such gradients, so both are caught here, and no checkpoint is written
    of weights that were hurt. With a gradient scaler (16-mixed) steps that overflow are its business.

    Args:
        action: "stop" raises; "skip" leaves weights and optimizer as they are and counts
            `train/skipped_steps`.
        max_in_a_row: steps skipped one after the other after which training stops all the same.
    """

    def __init__(self, action: Literal["stop", "skip"] = "stop", max_in_a_row: int = 10) -> None:
        self.action = action
        self.max_in_a_row = max_in_a_row
        self.num_skipped = 0
        self._in_a_row = 0

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Raises FloatingPointError, or drops the gradients of this step."""
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            return
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        finite = bool(torch.nn.utils.get_total_norm(grads).isfinite())
        if trainer.strategy.reduce_boolean_decision(finite, all=True):
            self._in_a_row = 0
            return
        step = trainer.global_step
        if self.action == "stop" or self._in_a_row + 1 >= self.max_in_a_row:
            raise FloatingPointError(
                f"loss or gradients are not finite at step {step}; the weights are still those of the step "
                "before. Lower optimizer.lr, or look at this step's data; callbacks.nonfinite=skip goes on"
            )
        self.num_skipped += 1
        self._in_a_row += 1
        log.warning("step %d skipped: loss or gradients are not finite", step)
        pl_module.log("train/skipped_steps", float(self.num_skipped))
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            parameter.grad = None  # optimizers leave parameters without a gradient alone, decay included

    def state_dict(self) -> dict[str, int]:
        """The count goes on after resuming."""
        return {"num_skipped": self.num_skipped}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """See `state_dict`."""
        self.num_skipped = state_dict["num_skipped"]
