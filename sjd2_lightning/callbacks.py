"""Lightning callback that decodes fixed prompts during validation, by plain decoding and by faster methods.

It is `evaluate_methods` on a few prompts: the same decoding, timing, numbers and files.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities.seed import isolate_rng

from sjd2_lightning.decoding.config import BASELINE, DecodingConfig
from sjd2_lightning.decoding.loop import decoder_of
from sjd2_lightning.evaluation.auto_window import WINDOWS, WindowChoice, resolve_windows, with_windows
from sjd2_lightning.evaluation.compare import as_drawn, check_run, decode_methods, run_identity
from sjd2_lightning.evaluation.prompts import PromptItem, check_prompts
from sjd2_lightning.evaluation.quality import QualityMeter, QualityMetrics
from sjd2_lightning.evaluation.references import ReferenceSet
from sjd2_lightning.evaluation.results import EvaluationResult, measure_methods
from sjd2_lightning.evaluation.store import RecordStore
from sjd2_lightning.models.backbone import Backbone, ImageLayout, evaluation_mode
from sjd2_lightning.report.figures import acceptance_histogram, figure_pixels, image_grid, save_figure
from sjd2_lightning.report.wandb_log import media_row, scalar_row
from sjd2_lightning.run.files import write_whole
from sjd2_lightning.run.harmless import harmless
from sjd2_lightning.run.processes import failing_together
from sjd2_lightning.run.stages import stage
from sjd2_lightning.training.module import SJD2Module

log = logging.getLogger(__name__)


class SamplingCallback(Callback):
    """Decodes prompts at the end of validation; logs numbers and images to all loggers and to `out_dir`.

    Files: `metrics.jsonl` and `metrics.csv` get one line a validation; `step_<n>/` gets images, records,
    `grid.png` and `acceptance.png`. Log keys: numbers of the first method that is not the baseline are plain
    (`val/nfe`, `val/fd_EffNetLite0`), those of the others end in the method's name (`val/nfe_ar`). W&B gets
    numbers and images in one row, each other method in a section of its own (`val_ar/nfe`); other loggers
    the numbers, TensorBoard and MLflow the image grid too.

    Ranks share the decoding. It runs in eval mode, with averaged weights if a `WeightAveraging` callback
    comes later in the list, and leaves modes and global random states unchanged. The baseline's images are
    decoded again only when weights have changed. Of sharded weights each rank gathers all to decode; where
    they do not fit a sentence says so. Nothing is decoded in the sanity check. Where samples cannot
    be written, as on a full disk, a validation ends without them.

    Args:
        prompts: fixed prompts with their seeds, such as `held_out_prompts(8)`.
        methods: configuration of each method by name; "ar" is the baseline.
        out_dir: folder of the files, such as `<run_dir>/samples`.
        every_n_validations: decode at every n-th validation, the first one included.
        batch_size: prompts decoded together.
        metrics: quality metrics; None measures speed alone.
        reference: real images for the distances.
        num_shown: prompts in the image grid.
        windows: windows to choose from for methods whose window is "auto". The choice is made at the first
            decoding (see `evaluation.auto_window`) and kept, so that validations compare; it is logged as
            `val/window_<method>`.

    Raises:
        ValueError: unusable prompts, methods or numbers; at `setup`, a module without `backbone` and
            `image_layout`, a prompt that its model cannot decode, or a `WeightAveraging` callback in front
            of this one.
    """

    def __init__(
        self,
        prompts: Sequence[PromptItem],
        methods: Mapping[str, DecodingConfig],
        out_dir: str | Path,
        *,
        every_n_validations: int = 1,
        batch_size: int = 4,
        metrics: QualityMetrics | None = None,
        reference: ReferenceSet | None = None,
        num_shown: int = 8,
        windows: Sequence[int] = WINDOWS,
    ) -> None:
        super().__init__()
        check_prompts(prompts)
        for name, number in {"every_n_validations": every_n_validations, "batch_size": batch_size}.items():
            if number < 1:
                raise ValueError(f"{name} is {number}; it must be at least 1")
        if not methods:
            raise ValueError("there are no methods; give at least one, for example ar")
        for config in methods.values():
            config.check()
        self.prompts = tuple(prompts)
        self.methods = dict(methods)
        self.out_dir = Path(out_dir)
        self.every_n_validations = every_n_validations
        self.batch_size = batch_size
        self.metrics = metrics or QualityMetrics()
        self.reference = reference
        self.num_shown = num_shown
        self.windows = tuple(windows)
        self._choices: dict[str, WindowChoice] = {}
        self._num_validations = 0
        self._warm = False
        self._meter: QualityMeter | None = None
        # hash of the weights and records of the last decoding
        self._previous: tuple[str, RecordStore] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses a set-up that would decode other weights than those being validated, or cannot decode."""
        if not isinstance(getattr(pl_module, "backbone", None), Backbone):
            raise ValueError(
                f"SamplingCallback needs a module with a `backbone`; {type(pl_module).__name__} has none"
            )
        module: Any = pl_module
        check_run(module.backbone, self.methods, self.prompts, module.image_layout, self.batch_size)
        callbacks: list[Any] = list(trainer.callbacks)  # type: ignore[attr-defined]
        before = callbacks[: callbacks.index(self)] if self in callbacks else []
        if any(isinstance(callback, WeightAveraging) for callback in before):
            raise ValueError(
                "SamplingCallback must come before the weight averaging in the list of callbacks: "
                "averaging takes its weights back before later callbacks run"
            )

    def state_dict(self) -> dict[str, Any]:
        """Number of validations and windows chosen, with which a resumed run continues."""
        state: dict[str, Any] = {"num_validations": self._num_validations}
        if self._choices:
            state["windows"] = {name: choice.summary() for name, choice in self._choices.items()}
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self._num_validations = int(state_dict["num_validations"])
        windows = state_dict.get("windows", {})
        self._choices = {name: WindowChoice.from_summary(entry) for name, entry in windows.items()}
        self.methods = with_windows(self.methods, self._choices)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Decodes, measures and logs at every n-th validation."""
        if trainer.sanity_checking:
            return
        number = self._num_validations
        self._num_validations += 1
        if number % self.every_n_validations:
            return
        result, module = None, cast(Any, pl_module)
        whole = module.whole_backbone() if isinstance(module, SJD2Module) else nullcontext(module.backbone)
        with isolate_rng(), harmless(f"decoding samples into {self.out_dir}", OSError), whole as backbone:
            if backbone is not None:
                result = self._decode_and_measure(trainer, module, backbone)
        row = None if result is None else scalar_row(result) | self._windows_row()
        # Every rank logs what rank 0 measured: a checkpoint may be chosen by it on any rank.
        row = trainer.strategy.broadcast(row)
        if row is None:  # there was no room for the samples, or for whole weights
            return
        pl_module.log_dict(row, logger=False, sync_dist=trainer.world_size > 1)
        if result is not None:
            with stage("writing the samples"):
                with harmless(f"writing {self.out_dir}"):
                    self._write(trainer, result, row)
                self._log(trainer, result, row)

    def _decode_and_measure(
        self, trainer: Trainer, module: Any, backbone: Backbone
    ) -> EvaluationResult | None:
        """The result; None on ranks other than 0."""
        layout = module.image_layout
        prompts = self.prompts[:1] if trainer.fast_dev_run else self.prompts  # type: ignore[attr-defined]
        # 1. windows, at the first decoding only
        if not self._choices:
            with evaluation_mode(backbone):
                self.methods, self._choices = resolve_windows(
                    backbone,
                    self.methods,
                    prompts[: self.batch_size],
                    layout,
                    windows=self.windows,
                )
        # 2. the baseline's images of the last decoding, where they still hold
        folder = Path(trainer.strategy.broadcast(str(self.out_dir / f"step_{trainer.global_step:08d}")))
        with failing_together():
            if trainer.is_global_zero:
                self._reuse_baseline(backbone, layout, prompts, folder)
        # 3. images, by all ranks
        decoded = decode_methods(
            backbone,
            self.methods,
            prompts,
            layout,
            folder,
            batch_size=self.batch_size,
            # what was captured of other weights does not hold: it is captured again, before anything is timed
            warm_up=not self._warm or backbone.device.type == "cuda",
            replace=True,
            progress=False,
        )
        self._warm = True
        decoder_of(backbone).release()  # training goes on with all of the memory
        if decoded is None:
            return None
        self._previous = (decoded.store.identity["weights"], decoded.store)
        # 4. numbers, on rank 0
        if self._meter is None:
            with stage("measuring the real images"):
                self._meter = QualityMeter(self.metrics, self.reference)
            for control in self._meter.controls:
                if not control.passed:
                    log.warning("%s", control.sentence)
        self._meter.forget_images()
        with stage("measuring the samples"):
            return measure_methods(
                decoded.store,
                as_drawn(backbone, self.methods),
                prompts,
                self._meter,
                ties=decoded.ties,
                flops=decoded.flops,
            )

    def _reuse_baseline(
        self, backbone: Backbone, layout: ImageLayout, prompts: Sequence[PromptItem], folder: Path
    ) -> None:
        """Copies the baseline's images of the last decoding into a new folder if no weight has changed."""
        if self._previous is None or BASELINE not in self.methods or folder.exists():
            return
        weights, store = self._previous
        identity = run_identity(backbone, self.methods, prompts, layout, self.batch_size)
        if identity["weights"] == weights:
            records = [record for record in store.load() if record.method == BASELINE]
            RecordStore(folder, identity).append(records, store.images(records))

    def _windows_row(self) -> dict[str, float]:
        return {f"val/window_{name}": float(choice.window) for name, choice in self._choices.items()}

    def _write(self, trainer: Trainer, result: EvaluationResult, row: Mapping[str, float]) -> None:
        step, folder = trainer.global_step, result.store.folder
        save_figure(image_grid(result, self.num_shown), folder / "grid.png")
        save_figure(acceptance_histogram(list(result.methods.values())), folder / "acceptance.png")
        histograms = {name: method.acceptance_counts for name, method in result.methods.items()}
        line = {"step": step, "epoch": trainer.current_epoch, "num_images": len(result.prompts), **row}
        lists: dict[str, Any] = {"acceptance_counts": histograms}
        if self._choices:
            lists["windows"] = {name: choice.summary() for name, choice in self._choices.items()}
        _append_line(self.out_dir / "metrics.jsonl", {**line, **lists})
        _append_csv(self.out_dir / "metrics.csv", line)

    def _log(self, trainer: Trainer, result: EvaluationResult, row: Mapping[str, float]) -> None:
        step = trainer.global_step
        for logger in trainer.loggers:
            with harmless(f"logging samples by {type(logger).__name__}"):
                if isinstance(logger, WandbLogger):
                    media = media_row(result, num_prompts=self.num_shown) | self._windows_row()
                    # Not by `log_metrics`: numbers and images must be in one row.
                    logger.experiment.log({**media, "trainer/global_step": step}, step=step)
                else:
                    logger.log_metrics(dict(row), step)
                    self._log_picture(logger, result, step)

    def _log_picture(self, logger: Logger, result: EvaluationResult, step: int) -> None:
        """The image grid, for loggers that take pictures."""
        if isinstance(logger, TensorBoardLogger):
            pixels = figure_pixels(image_grid(result, self.num_shown))
            logger.experiment.add_image("val/images", pixels, step, dataformats="HWC")
        elif isinstance(logger, MLFlowLogger):
            pixels = figure_pixels(image_grid(result, self.num_shown))
            logger.experiment.log_image(logger.run_id, pixels, f"samples/step_{step:08d}.png")


def _append_line(path: Path, entry: Mapping[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(entry) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _append_csv(path: Path, entry: Mapping[str, Any]) -> None:
    """Adds a row; the header grows when a validation has a new key."""
    rows: list[dict[str, Any]] = []
    if path.is_file():
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
    rows.append(dict(entry))
    names = list(dict.fromkeys(name for row in rows for name in row))
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, buffer.getvalue())
