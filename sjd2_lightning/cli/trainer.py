"""Lightning's trainer from the configuration: strategy, plugins, callbacks and loggers."""

from __future__ import annotations

import importlib.util
import logging
import secrets
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
import lightning as L
from lightning.pytorch.callbacks import (
    Callback,
    EMAWeightAveraging,
    LearningRateMonitor,
    RichProgressBar,
    TQDMProgressBar,
)
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from sjd2_lightning.callbacks import SamplingCallback
from sjd2_lightning.cli.build import build_prompts, build_reference
from sjd2_lightning.cli.loggers import mlflow_logger, tensorboard_logger
from sjd2_lightning.cli.scorers import build_metrics, left_out
from sjd2_lightning.config.groups import WandbConfig
from sjd2_lightning.config.runs import TrainConfig
from sjd2_lightning.report import wandb_log
from sjd2_lightning.run.files import write_whole
from sjd2_lightning.run.harmless import harmless
from sjd2_lightning.run.processes import is_first_process
from sjd2_lightning.run.provenance import redact
from sjd2_lightning.training.guards import NonFiniteGuard, TrainingWatch
from sjd2_lightning.training.module import SJD2Module
from sjd2_lightning.training.pace import Pace
from sjd2_lightning.training.resume import (
    RandomStates,
    Retention,
    SaveOnTermination,
    requeue_command,
    seconds_of,
)
from sjd2_lightning.training.speed import Speed
from sjd2_lightning.training.trace import Trace

if TYPE_CHECKING:
    from lightning.pytorch.strategies import Strategy

log = logging.getLogger(__name__)


def quiet_lightning() -> None:
    """Each line of Lightning once, and none of what is its own business or is meant here."""
    logging.getLogger("lightning").handlers.clear()  # Hydra's root logger prints these lines already
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_says_something)
    for message in (
        r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning's own
        r"Found \d+ module\(s\) in eval mode",  # image tokenizers and what else is not trained, on purpose
        r"Checkpoint directory .* exists and is not empty",  # the run's own: it goes on
        r"To copy construct from a tensor",  # the learning rate of torchao's optimizers is one
        r"OptimState8bit does not implement",  # what torch's compiler would keep for the next process
        # of one epoch; the interval is counted through all of them
        r"The number of training batches \(\d+\) is smaller than the logging interval",
    ):
        warnings.filterwarnings("ignore", message)


def _says_something(record: logging.LogRecord) -> bool:
    """Whether a line of Lightning is neither an advertisement nor an argument of its own trainer."""
    return not record.getMessage().startswith(("💡", "`Trainer(limit_", "TPU available: False"))


def build_trainer(
    config: TrainConfig, module: L.LightningModule, loggers: list[Any], callbacks: list[Any]
) -> L.Trainer:
    """The trainer of a configuration."""
    return L.Trainer(
        **config.trainer.lightning() | {"strategy": build_strategy(config, module)},
        plugins=build_plugins(),
        logger=loggers or False,
        callbacks=callbacks,
        enable_checkpointing=config.callbacks.checkpoint is not None,
        enable_progress_bar=config.callbacks.progress_bar is not None,
        enable_model_summary=False,
        default_root_dir=config.run_dir,
    )


def build_strategy(config: TrainConfig, module: L.LightningModule) -> str | Strategy:
    """The strategy by name: `fsdp` is FSDP2, `deepspeed` its stage 2; other names are Lightning's.

    Raises:
        ValueError: deepspeed is not installed; or the model cannot be sharded.
    """
    name = config.trainer.strategy
    if name == "fsdp":
        from sjd2_lightning.training.fsdp import ShardedModule, ShardedStrategy

        if not isinstance(module, ShardedModule):
            raise ValueError(f"trainer.strategy=fsdp: task={config.task} is small; use trainer.strategy=ddp")
        return ShardedStrategy(config.trainer.reshard)
    if name.startswith("deepspeed"):
        if importlib.util.find_spec("deepspeed") is None:
            raise ValueError(
                f"trainer.strategy={name}: the package deepspeed is not installed; "
                "`pip install 'sjd2-lightning[deepspeed]'`, or use trainer=fsdp, which needs nothing more"
            )
        return "deepspeed_stage_2" if name == "deepspeed" else name
    return name


def build_plugins() -> list[Any]:
    """Verified checkpoints; under Slurm its processes, but not Lightning's way of queueing a job again."""
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

    from sjd2_lightning.training.checkpoints import VerifiedCheckpointIO

    # ours saves at the end of a step and under our names, see `SaveOnTermination`
    environment = [SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else []
    return [VerifiedCheckpointIO(), *environment]


def build_callbacks(config: TrainConfig, module: L.LightningModule, has_logger: bool) -> list[Callback]:
    """The callbacks of a configuration; sampling stands before weight averaging, as it must.

    Without a logger there is nothing to log the learning rate to, and Lightning refuses its monitor.
    """
    wanted, found = config.callbacks, list[Callback]()
    if wanted.sampling is not None and isinstance(module, SJD2Module):
        prompts = build_prompts(config, wanted.sampling.num_prompts)
        reference = build_reference(config, len(prompts))
        for sentence in left_out(config, reference, len(prompts)):
            log.info("samples of validations: %s", sentence)
        found.append(
            SamplingCallback(
                prompts,
                {name: config.methods[name] for name in config.compare},
                Path(config.run_dir) / "samples",
                every_n_validations=wanted.sampling.every_n_validations,
                batch_size=wanted.sampling.batch_size,
                metrics=build_metrics(config, reference, len(prompts)),
                reference=reference,
                windows=config.auto_window.windows,
            )
        )
    if wanted.ema_decay is not None:
        found.append(EMAWeightAveraging(decay=wanted.ema_decay))
    if wanted.nonfinite is not None:
        found.append(NonFiniteGuard(wanted.nonfinite))
    found.append(TrainingWatch(wanted.loss_spike))
    found += [Pace(), Speed()]
    if config.trainer.profiler is not None:
        found.append(Trace(Path(config.run_dir) / "profile"))
    folder = None if wanted.checkpoint is None else Path(config.run_dir) / "checkpoints"
    limit = None if config.trainer.max_time is None else seconds_of(config.trainer.max_time)
    last = None if folder is None or config.trainer.fast_dev_run else folder / "last.ckpt"
    # behind weight averaging, whose update belongs to the step that is saved
    found.append(SaveOnTermination(last, limit, requeue_command()))
    if wanted.checkpoint is not None and folder is not None:
        found.append(RandomStates())
        found.append(Retention(folder, **wanted.checkpoint.model_dump()))
    if wanted.lr_monitor and has_logger:
        found.append(LearningRateMonitor("step"))
    if wanted.progress_bar is not None:
        found.append(RichProgressBar() if wanted.progress_bar == "rich" else TQDMProgressBar())
    return found + [hydra.utils.instantiate(entry) for entry in wanted.extra]


class StepLogger(WandbLogger):
    """W&B with the optimizer's step as its own: what a resumed run logs goes on where the first part stopped.

    With W&B's own count the second part would begin at 0 again, and hide the first or be dropped. Lightning
    counts a validation to the step in front of it; W&B drops what is behind its newest row, so it goes into
    that one.
    """

    @rank_zero_only
    @harmless("logging to W&B")
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """One row for each step."""
        step = max(step or 0, self.experiment.step)
        self.experiment.log({**metrics, "trainer/global_step": step}, step=step)


class Table(CSVLogger):
    """A CSV file, whose full disk does not end the run."""

    @harmless("writing csv/*/metrics.csv")
    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """Notes a row."""
        super().log_metrics(metrics, step)

    @harmless("writing csv/*/metrics.csv")
    def save(self) -> None:
        """Writes what was noted."""
        super().save()


def build_loggers(config: TrainConfig) -> list[Logger]:
    """CSV, TensorBoard, MLflow and W&B, as asked; none for a trial run."""
    if config.trainer.fast_dev_run:
        return []
    # A version for every start: going on with a run must not delete what it logged before.
    found: list[Logger] = []
    if config.logger.csv:
        with harmless(f"making {config.run_dir}/csv"):
            table = Table(config.run_dir, name="csv")
            _ = table.experiment  # makes the folder
            found.append(table)
    if config.logger.tensorboard:
        with harmless(f"making {config.run_dir}/tensorboard"):
            found.append(tensorboard_logger(Path(config.run_dir)))
    if config.logger.mlflow is not None and is_first_process():
        with harmless("starting MLflow"):
            values = redact(config.model_dump(mode="json"))
            found.append(mlflow_logger(config.logger.mlflow, Path(config.run_dir), values))
    if config.logger.wandb is not None and is_first_process():
        run_dir = Path(config.run_dir)
        values = redact(config.model_dump(mode="json"))
        settings = config.logger.wandb.model_copy(update={"tags": config.wandb_tags})
        run = None
        with harmless(f"starting W&B in {run_dir}", OSError):
            run = start_wandb(settings, run_dir, values, wandb_id(run_dir, config.ckpt_path))
        if run is not None:
            found.append(StepLogger(experiment=run, save_dir=config.run_dir))
    return found


def wandb_id(folder: Path, ckpt_path: str | None) -> str:
    """The id of a folder's W&B run: kept there, so that going on continues it; a new start is a new run."""
    path = folder / "wandb_id.txt"
    if ckpt_path is not None and path.is_file():
        return path.read_text().strip()
    found = secrets.token_hex(4)
    write_whole(path, found + "\n")
    return found


def start_wandb(config: WandbConfig, folder: Path, values: dict[str, Any], run_id: str) -> Any:
    """A W&B run in a folder, or None when disabled; WANDB_MODE wins over the configuration.

    Raises:
        ValueError: WANDB_MODE holds an unknown mode.
    """
    mode = wandb_log.wandb_mode(config.mode)
    if mode == "disabled":
        return None
    settings = config.model_dump(include={"project", "entity", "name", "group", "tags"})
    settings["tags"] = list(config.tags)
    identity = {"dir": str(folder), "config": values, "job_type": "train", "id": run_id, "resume": "allow"}
    return wandb_log.start_run(mode, identity | settings)


def finish_loggers(loggers: Sequence[Logger]) -> None:
    """Ends W&B runs, also after an error, and says how to send those that were kept offline."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            with harmless("ending the W&B run"):
                run = logger.experiment
                folder = wandb_log.finish_run(run)
                if folder is not None and run.offline:  # all parts together: W&B puts them in order
                    parts = sorted(map(str, Path(folder).parent.glob(f"offline-run-*-{run.id}")))
                    log.info("W&B run kept offline; send it with: wandb sync %s", " ".join(parts))
