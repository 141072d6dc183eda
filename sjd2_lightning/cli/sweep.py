"""What Hydra calls around a sweep: one report of all its runs."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, ClassVar

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

log = logging.getLogger(__name__)


class SweepReport(Callback):
    """Writes sweep.csv, sweep.md, sweep.html and figures of a sweep into its folder.

    Whatever the launcher: runs leave word in their folders, and this reads it once all have ended.
    """

    all_failed: ClassVar[bool] = False

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Called by Hydra in the process that started the sweep."""
        from sjd2_lightning.report.sweep import job_titles, read_sweep, write_sweep_report

        folder = Path(config.hydra.sweep.dir)
        jobs = read_sweep(folder)
        if not jobs:
            return
        files = write_sweep_report(jobs, folder)
        SweepReport.all_failed = files.num_failed == len(jobs)
        titles = job_titles(jobs)
        for job in jobs:
            if job.error is not None:
                log.error("failed: %s (%s): %s", titles[job.name], folder / job.name, job.error)
        log.info("sweep of %d runs, %d failed: %s", len(jobs), files.num_failed, files.html)
