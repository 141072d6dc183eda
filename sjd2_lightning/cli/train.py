"""`train.py`: fine-tuning, and the recipes of the shipped weights."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from sjd2_lightning.cli.check import already_done, check_train, likely_start
from sjd2_lightning.cli.launch import launch
from sjd2_lightning.config.reading import save_config
from sjd2_lightning.config.runs import TrainConfig
from sjd2_lightning.decoding.config import BASELINE
from sjd2_lightning.run.owner import owned
from sjd2_lightning.run.processes import is_first_process
from sjd2_lightning.run.stages import duration, is_watched, stage

if TYPE_CHECKING:
    import lightning as L

log = logging.getLogger(__name__)


def main() -> None:
    """Entry point of `train.py` and `sjd2-train`."""
    launch("train", train, refuse)


def refuse(cfg: DictConfig) -> str | None:
    """Whether a training can begin, before anything is written: see `check_train` for what it raises.

    Returns:
        What to print where nothing is to be trained (a plan prints itself); None where training may begin.
    """
    if cfg.print_plan:
        train(cfg)
        return ""
    config = check_train(cfg)
    start = likely_start(config)
    if start is None:
        resume_path(config.ckpt_path, Path(config.run_dir))  # says so where there must be one
    return already_done(config, start)


def train(cfg: DictConfig) -> dict[str, float]:
    """Trains what a configuration describes.

    Args:
        cfg: composed from `conf/train.yaml`.

    Returns:
        The last value of every logged metric; `start/<name>` are those before training. With `print_plan`
        the figures of the plan, and nothing is trained; nothing of a run that is at its end.

    Raises:
        ConfigError: the configuration has problems (all of them, before anything is loaded).
        ValueError: weights, data or the checkpoint to go on from cannot be used, or another process trains
            in `run_dir`.
    """
    if cfg.print_plan:
        with stage("making the plan"):
            from sjd2_lightning.cli.plan import show_plan

            return show_plan(cfg)
    config = check_train(cfg)
    with owned(Path(config.run_dir), "train"):
        return train_owned(config)


def train_owned(config: TrainConfig) -> dict[str, float]:
    """See `train`: no other process writes in the run's folder."""
    run_dir = Path(config.run_dir)
    with stage("looking for checkpoints"):
        ckpt_path = resume_path(config.ckpt_path, run_dir)
    if (done := already_done(config, ckpt_path)) is not None:
        log.info("%s", done)
        return {}
    if is_first_process():
        save_config(config, run_dir / "train.yaml")
    with stage("loading libraries"):
        import lightning as L

        from sjd2_lightning.cli.build import build_task, export_model, recipe_dir
        from sjd2_lightning.cli.trainer import (
            build_callbacks,
            build_loggers,
            build_trainer,
            finish_loggers,
            quiet_lightning,
        )
        from sjd2_lightning.data.sources.scenes import Variety
        from sjd2_lightning.run.files import remove_unfinished
        from sjd2_lightning.training.recipes.codebook import make_tokenizer

    if config.task == "tokenizer" and config.tokenizer is not None:
        variety = Variety(config.data.num_nouns, config.data.aligned)
        return make_tokenizer(config.tokenizer, variety, recipe_dir(config))
    quiet_lightning()
    L.seed_everything(config.seed, workers=True)
    if is_first_process():
        remove_unfinished(run_dir)
    with stage("building the model"):
        module, data = build_task(config)
    with stage("starting loggers"):
        loggers = build_loggers(config)
    try:
        with stage("loading what measures, and real images"):
            callbacks = build_callbacks(config, module, bool(loggers))
        trainer = build_trainer(config, module, loggers, callbacks)
        start: dict[str, float] = {}
        if config.validate_first and ckpt_path is None:
            with under_way_if_unseen(config, trainer, "validating before training"):
                start = start_metrics(trainer, module, data)
        with under_way_if_unseen(config, trainer, "training"):
            trainer.fit(module, data, ckpt_path=ckpt_path)
        metrics = start | {name: float(value) for name, value in sorted(trainer.callback_metrics.items())}
        if not config.trainer.fast_dev_run:
            export_model(config, module, trainer)
    finally:
        with stage("ending loggers"):
            finish_loggers(loggers)
    if trainer.is_global_zero:
        show(config, metrics)
    return metrics


def under_way_if_unseen(config: TrainConfig, trainer: L.Trainer, name: str) -> AbstractContextManager[None]:
    """A stage with the number of steps; where a bar of Lightning's is seen, the bar is enough."""
    if config.callbacks.progress_bar is not None and is_watched():
        return nullcontext()
    paces: list[Any] = [c for c in trainer.callbacks if hasattr(c, "seconds_left")]  # type: ignore[attr-defined]

    def far() -> str:
        said = f"step {trainer.global_step} of {trainer.max_steps}".removesuffix(" of -1")
        left = paces[0].seconds_left(trainer) if paces else math.nan
        return said if math.isnan(left) else f"{said}, about {duration(left)} left"

    return stage(name, far)


def start_metrics(
    trainer: L.Trainer, module: L.LightningModule, data: L.LightningDataModule
) -> dict[str, float]:
    """Validation before training, so that what training changes can be stated."""
    trainer.validate(module, data, verbose=False)
    return {f"start/{name}": float(value) for name, value in sorted(trainer.callback_metrics.items())}


def resume_path(ckpt_path: str | None, run_dir: Path) -> Path | None:
    """The checkpoint to go on from; see `ckpt_path` in conf/train.yaml.

    Raises:
        ValueError: for `last` where no run left one.
    """
    if ckpt_path is None:
        return None
    from sjd2_lightning.training.checkpoints import newest_first, newest_sound_checkpoint

    if ckpt_path not in ("auto", "last"):
        return Path(ckpt_path)
    if own := newest_sound_checkpoint(run_dir / "checkpoints"):
        return own
    if ckpt_path == "auto":
        return None
    found = newest_first(run_dir.parent.glob("*/checkpoints/last.ckpt"))
    others = (newest_sound_checkpoint(path.parent) for path in found)
    if other := next((path for path in others if path is not None), None):
        return other
    raise ValueError(f"ckpt_path=last: no run in {run_dir.parent} has checkpoints/last.ckpt; give a path")


# What a few small batches in the middle of a training say of the clock is logged, and not worth a line.
_OF_THE_CLOCK = ("speedup", "seconds_per_image", "images_per_second", "flops_per_token", "peak_memory_gib")


def shown_metrics(metrics: Mapping[str, float]) -> list[str]:
    """Names for the table of a training: of the method, not of the baseline; nothing of the clock."""
    return sorted(
        name
        for name in metrics
        if not name.startswith(("start/", "train/hours_left", *(f"val/{key}" for key in _OF_THE_CLOCK)))
        and not (name.endswith(f"_{BASELINE}") and name.removesuffix(f"_{BASELINE}") in metrics)
    )


def show(config: TrainConfig, metrics: dict[str, float]) -> None:
    """Prints the metrics and where things lie."""
    from rich.console import Console
    from rich.table import Table

    table = Table("metric", "before", "after", title="training")
    for name in shown_metrics(metrics):
        before = metrics.get(f"start/{name}")
        table.add_row(name, "" if before is None else f"{before:.4g}", f"{metrics[name]:.4g}")
    console = Console()
    console.print(table)
    console.print(f"run: {config.run_dir}", soft_wrap=True)
    if not config.trainer.fast_dev_run:
        random = config.model.random_name if config.model.init == "random_tiny" else ""
        console.print(f"weights: {config.export_dir}{f', of {random}' if random else ''}", soft_wrap=True)
