"""Loggers and callbacks from the typed configuration."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
import lightning as L
from lightning.pytorch.callbacks import (
    Callback,
    EMAWeightAveraging,
    LearningRateMonitor,
    ModelCheckpoint,
    RichProgressBar,
    TQDMProgressBar,
)
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from sjd2_lightning.callbacks import SamplingCallback
from sjd2_lightning.checkpoints import SaveOnTermination
from sjd2_lightning.cli.building import build_metrics, build_prompts, build_reference
from sjd2_lightning.config_groups import TrainConfig, WandbConfig
from sjd2_lightning.guards import NonFiniteGuard
from sjd2_lightning.module import SJD2Module
from sjd2_lightning.report import wandb_log
from sjd2_lightning.report.provenance import redact

log = logging.getLogger(__name__)


def build_callbacks(config: TrainConfig, module: L.LightningModule, has_logger: bool) -> list[Callback]:
    """The callbacks of a configuration; sampling stands before weight averaging, as it must.

    Without a logger there is nothing to log the learning rate to, and Lightning refuses its monitor.
    """
    wanted, found = config.callbacks, list[Callback]()
    if wanted.sampling is not None and isinstance(module, SJD2Module):
        found.append(
            SamplingCallback(
                build_prompts(config, wanted.sampling.num_prompts),
                {name: config.methods[name] for name in config.compare},
                Path(config.run_dir) / "samples",
                every_n_validations=wanted.sampling.every_n_validations,
                batch_size=wanted.sampling.batch_size,
                metrics=build_metrics(config),
                reference=build_reference(config),
            )
        )
    if wanted.ema_decay is not None:
        found.append(EMAWeightAveraging(decay=wanted.ema_decay))
    if wanted.nonfinite is not None:
        found.append(NonFiniteGuard(wanted.nonfinite))
    if wanted.checkpoint is not None:
        folder = Path(config.run_dir) / "checkpoints"
        found.append(SaveOnTermination(folder / "last.ckpt"))
        found.append(ModelCheckpoint(folder, save_last=True, **wanted.checkpoint.model_dump()))
    if wanted.lr_monitor and has_logger:
        found.append(LearningRateMonitor("step"))
    if wanted.progress_bar is not None:
        found.append(RichProgressBar() if wanted.progress_bar == "rich" else TQDMProgressBar())
    return found + [hydra.utils.instantiate(entry) for entry in wanted.extra]


def build_loggers(config: TrainConfig) -> list[Logger]:
    """CSV and W&B, as asked; none for a trial run."""
    if config.trainer.fast_dev_run:
        return []
    # A version for every start: going on with a run must not delete what it logged before.
    found: list[Logger] = [CSVLogger(config.run_dir, name="csv")] if config.logger.csv else []
    if config.logger.wandb is not None and getattr(rank_zero_only, "rank", 0) == 0:
        run = start_wandb(config.logger.wandb, Path(config.run_dir), redact(config.model_dump(mode="json")))
        if run is not None:
            found.append(WandbLogger(experiment=run, save_dir=config.run_dir))
    return found


def start_wandb(config: WandbConfig, folder: Path, values: dict[str, Any]) -> Any:
    """A W&B run in a folder, or None when disabled; WANDB_MODE wins over the configuration.

    Raises:
        ValueError: WANDB_MODE holds an unknown mode.
    """
    mode = os.environ.get("WANDB_MODE") or config.mode
    if mode not in ("online", "offline", "disabled"):
        raise ValueError(f"WANDB_MODE={mode} is unknown; use online, offline or disabled")
    if mode == "disabled":
        return None
    settings = config.model_dump(include={"project", "entity", "name", "group", "tags"})
    settings["tags"] = list(config.tags)
    return wandb_log.start_run(mode, {"dir": str(folder), "config": values, "job_type": "train", **settings})


def finish_loggers(loggers: Sequence[Logger]) -> None:
    """Ends W&B runs, also after an error, and says how to send those that were kept offline."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            run = logger.experiment
            folder = Path(run.dir).parent
            run.finish()
            if run.offline:
                log.info("W&B run kept offline; send it with: wandb sync %s", folder)
