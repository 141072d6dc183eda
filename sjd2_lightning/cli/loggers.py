"""TensorBoard and MLflow beside W&B: Lightning's own loggers, whose failures end no training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from sjd2_lightning.config.groups import MlflowConfig
from sjd2_lightning.run.harmless import harmless

PROJECT = "sjd2-lightning"


class Board(TensorBoardLogger):
    """TensorBoard's files, below `tensorboard/` in the run's folder."""

    @rank_zero_only
    @harmless("logging to TensorBoard")
    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """Notes numbers."""
        super().log_metrics(metrics, step)

    @rank_zero_only
    @harmless("logging to TensorBoard")
    def save(self) -> None:
        """Writes what was noted."""
        super().save()


class Tracking(MLFlowLogger):
    """A run of MLflow."""

    @rank_zero_only
    @harmless("logging to MLflow")
    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """Sends numbers."""
        super().log_metrics(metrics, step)

    @rank_zero_only
    @harmless("logging to MLflow")
    def finalize(self, status: str = "success") -> None:
        """Ends the run."""
        super().finalize(status)


def tensorboard_logger(run_dir: Path) -> Logger:
    """A logger that writes into `<run_dir>/tensorboard`, a version for every start."""
    return Board(run_dir, name="tensorboard")


def mlflow_logger(config: MlflowConfig, run_dir: Path, values: dict[str, Any]) -> Logger:
    """A logger of one MLflow run, with the configuration as its parameters.

    Args:
        config: where the run is kept; without an address in `mlflow.db` beside the run's folder.
        run_dir: folder of the run.
        values: the configuration, without secrets.
    """
    place = run_dir.resolve().parent
    logger = Tracking(
        experiment_name=config.experiment or PROJECT,
        run_name=config.name or run_dir.name,
        tracking_uri=config.tracking_uri or f"sqlite:///{place / 'mlflow.db'}",
        artifact_location=None if config.tracking_uri else (place / "mlflow").as_uri(),
    )
    with harmless("logging to MLflow"):
        logger.log_hyperparams(values)
    return logger
