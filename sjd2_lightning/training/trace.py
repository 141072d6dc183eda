"""A trace of a few training steps, small enough for Perfetto (ui.perfetto.dev) to open."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.profiler import profile, schedule

log = logging.getLogger(__name__)

_SKIPPED, _ACTIVE = 3, 2  # batches: compilers and caches are warm behind the first ones


class Trace(Callback):
    """Records two batches of each rank's training and writes `rank_<number>.json.gz`, once.

    Args:
        folder: where traces go.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._profile: profile | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begins to watch."""
        path = self.folder / f"rank_{trainer.global_rank}.json.gz"

        def write(found: profile) -> None:
            self.folder.mkdir(parents=True, exist_ok=True)
            found.export_chrome_trace(str(path))
            log.info("trainer.profiler: two steps are in %s; ui.perfetto.dev opens it", path)

        steps = schedule(wait=_SKIPPED - 1, warmup=1, active=_ACTIVE, repeat=1)
        self._profile = torch.profiler.profile(schedule=steps, on_trace_ready=write)
        self._profile.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Goes on to the next batch; behind the last one nothing is watched any more."""
        if self._profile is not None:
            self._profile.step()
            if self._profile.step_num >= _SKIPPED + _ACTIVE:
                self._end()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Ends, if training was shorter."""
        self._end()

    def _end(self) -> None:
        if self._profile is not None:
            self._profile.stop()
            self._profile = None
