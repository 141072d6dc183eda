"""How long training will take, by the pace of its own steps."""

from __future__ import annotations

import logging
import math
import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from sjd2_lightning.run.processes import is_first_process
from sjd2_lightning.run.stages import A_MINUTE, duration

log = logging.getLogger(__name__)

_FEW_STEPS = 3  # whose mean is the first estimate; the step before them also warms up


class Pace(Callback):
    """Says once, after a few steps, how long the others will take, if that is more than a minute."""

    def __init__(self) -> None:
        self._first: tuple[int, float] | None = None  # a step and when it ended
        self._said = False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Looks at the clock after a step."""
        step = trainer.global_step
        if self._first is None:
            self._first = step, time.perf_counter()
        elif not self._said and step >= self._first[0] + _FEW_STEPS:
            self._said = True
            left = self.seconds_left(trainer)
            if left >= A_MINUTE and is_first_process():
                steps = trainer.estimated_stepping_batches - step
                each = left / steps
                log.info(
                    "training: %.0f more steps at %.2f s: about %s, validations not counted",
                    steps,
                    each,
                    duration(left),
                )

    def seconds_left(self, trainer: Trainer) -> float:
        """Seconds until the last step at the pace so far, validations in between included; NaN if unknown."""
        if self._first is None or trainer.global_step <= self._first[0]:
            return math.nan
        first, since = self._first
        each = (time.perf_counter() - since) / (trainer.global_step - first)
        left = each * (trainer.estimated_stepping_batches - trainer.global_step)
        return left if math.isfinite(left) else math.nan
