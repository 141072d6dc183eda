"""Training stops, or skips the step, before a gradient that is not finite reaches the weights (ours)."""

from __future__ import annotations

import logging
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

log = logging.getLogger(__name__)

_MEMORY = 0.98  # share of the running mean of the loss that a step keeps
_FEW_STEPS = 20  # steps before the mean says anything


class NonFiniteGuard(Callback):
    """Looks at the loss of all batches of a step and the norm of all gradients before the optimizer steps.

    An infinite loss can have finite gradients, so both are looked at. No checkpoint is written of weights
    that were hurt. With a gradient scaler (16-mixed) steps that overflow are its business.

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
        self._losses: list[Tensor] = []  # whether each is finite; on the device, read once a step

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Notes whether the loss is finite; without waiting for the device."""
        self._losses.append(loss.detach().isfinite().all())

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Raises FloatingPointError, or drops the gradients of this step."""
        losses, self._losses = self._losses, []
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            return
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm: Any = torch.nn.utils.get_total_norm(grads)
        if hasattr(norm, "full_tensor"):  # of sharded gradients
            norm = norm.full_tensor()
        finite = bool(torch.stack([norm.isfinite(), *(found.to(norm.device) for found in losses)]).all())
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
        """The counts go on after resuming."""
        return {"num_skipped": self.num_skipped, "in_a_row": self._in_a_row}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """See `state_dict`."""
        self.num_skipped = state_dict["num_skipped"]
        self._in_a_row = state_dict.get("in_a_row", 0)


class TrainingWatch(Callback):
    """Counts what is odd but stops nothing: jumps of the loss, and samples that reading left out.

    Logged as `train/loss_spikes` (batches whose loss was above `factor` times its running mean, which they do
    not enter) and `train/skipped_samples` (of this rank, this epoch).

    Args:
        factor: multiple of the running mean; None does not look at the loss.
    """

    def __init__(self, factor: float | None = 3.0) -> None:
        self.factor = factor
        self._state: Tensor | None = None  # mean, batches, spikes: on the device, never waited for

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Looks at one batch."""
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if self.factor is not None and isinstance(loss, Tensor):
            self._look(loss.detach().float() * trainer.accumulate_grad_batches)
            pl_module.log("train/loss_spikes", self.num_spikes)
        skipped = getattr(trainer.train_dataloader, "num_skipped", None)
        if skipped is not None:
            too_long = len(getattr(trainer.train_dataloader, "too_long", ()))
            pl_module.log("train/skipped_samples", float(skipped + too_long))

    @property
    def num_spikes(self) -> Tensor:
        """Spikes so far."""
        return torch.zeros(()) if self._state is None else self._state[2].clone()

    def _look(self, loss: Tensor) -> None:
        state = torch.zeros(3) if self._state is None else self._state
        mean, count, spikes = state.to(loss.device).unbind()
        usable = loss.isfinite()
        spike = ~usable | ((count >= _FEW_STEPS) & (loss > (self.factor or 0) * mean))
        weight = 1 - torch.minimum(torch.full_like(count, _MEMORY), count / (count + 1))
        mean = torch.where(spike, mean, mean + weight * (torch.where(usable, loss, mean) - mean))
        self._state = torch.stack([mean, count + (~spike).float(), spikes + spike.float()])

    def state_dict(self) -> dict[str, list[float]]:
        """Mean and counts go on after resuming."""
        return {} if self._state is None else {"state": self._state.tolist()}

    def load_state_dict(self, state_dict: dict[str, list[float]]) -> None:
        """See `state_dict`."""
        if "state" in state_dict:
            self._state = torch.tensor(state_dict["state"])
