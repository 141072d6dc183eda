"""An evaluation in Weights & Biases: numbers, images, histograms and a page of prompts, in one step."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import wandb
from wandb.env import CACHE_DIR, get_cache_dir

from sjd2_lightning.decoding.config import BASELINE
from sjd2_lightning.evaluation.quality import judge_key
from sjd2_lightning.evaluation.results import EvaluationResult, MethodResult
from sjd2_lightning.metrics.fidelity import MANIFOLD
from sjd2_lightning.report.figures import acceptance_maps, figure_pixels, image_grid
from sjd2_lightning.report.page import prompts_page
from sjd2_lightning.run.harmless import harmless
from sjd2_lightning.run.provenance import redact

log = logging.getLogger(__name__)

INIT_TIMEOUT_S = 15
# a server that is gone would be waited for without end; what was not sent is kept
FINISH_TIMEOUT_S = 300
# What the table of runs shows of a number: its best value beside the last one, as `val/loss_clean.min`.
SUMMARY = {
    "train/loss": "min,last",
    "val/loss_clean": "min,last",
    "val/loss_high": "min,last",
    "val/step_compression": "max,last",
    "val/speedup": "max,last",
    "eval/step_compression": "last",
    "eval/speedup": "last",
}
_OF_FEATURES = ("fd", "kid", *MANIFOLD)
_MODES = ("online", "offline", "disabled")


def scalar_row(result: EvaluationResult, prefix: str = "val/") -> dict[str, float]:
    """Every number under its log key.

    Keys of the first method that is not the baseline are plain, such as `val/nfe` and `val/fd_EffNetLite0`;
    those of the others end in the method's name, such as `val/nfe_ar`.
    """
    return {f"{prefix}{key}{suffix}": value for suffix, key, value in _numbers(result)}


def sectioned_row(result: EvaluationResult, section: str = "val") -> dict[str, float]:
    """`scalar_row` as W&B gets it, which draws a section of charts for each word in front of a `/`.

    The first method that is not the baseline has the section, such as `val/nfe`; each other method has one of
    its own, such as `val_ar/nfe`.
    """
    return {f"{section}{suffix}/{key}": value for suffix, key, value in _numbers(result)}


def _numbers(result: EvaluationResult) -> Iterator[tuple[str, str, float]]:
    """End of the method's log keys, name and value of every number."""
    suffixes = log_suffixes(list(result.methods))
    for name, method in result.methods.items():
        for key, measure in method.measured.items():
            # Distances carry their extractor in the name; scores carry their scorer only in the report.
            log_key = measure.name if key.partition("_")[0] in _OF_FEATURES else key
            yield suffixes[name], log_key, measure.value
        if method.equal_to_ar is not None and name != BASELINE:
            yield suffixes[name], "equal_to_ar", method.equal_to_ar


def sampled_names(
    methods: Sequence[str],
    extractors: Sequence[str],
    has_clip: bool,
    has_manifold: bool,
    judged: Sequence[str] = (),
    further: Sequence[str] = (),
) -> list[str]:
    """Keys that `scalar_row` may give for methods, extractors of distances, a CLIP scorer and a judge.

    Args:
        methods: names of the methods.
        extractors: names of the extractors.
        has_clip: whether there is a scorer.
        has_manifold: whether precision, recall, density and coverage are measured.
        judged: categories of prompts that a judge reports.
        further: those of `cmmd` and `pick_score` that are measured.
    """
    numbers = ["nfe", "step_compression", "seconds_per_image", "images_per_second", "flops_per_token"]
    numbers += ["peak_memory_gib", "window"]
    of_features = _OF_FEATURES if has_manifold else ("fd", "kid")
    numbers += [f"{name}_{extractor}" for extractor in extractors for name in of_features]
    if has_clip:
        numbers += ["clip_score", "clip_score_shuffled", "clip_gain"]
    numbers += [*further, *(judge_key(category) for category in judged)]
    against = ["speedup", "equal_to_ar", "clip_score_minus_ar"] if BASELINE in methods else []
    against += [f"{judge_key(category)}_minus_ar" for category in judged if against]
    against += ["pick_score_minus_ar"] if against and "pick_score" in further else []
    return [f"val/{name}{suffix}" for suffix in log_suffixes(methods).values() for name in numbers + against]


def log_suffixes(names: Sequence[str]) -> dict[str, str]:
    """End of the log keys of each method; "" for the first that is not the baseline."""
    main = next((name for name in names if name != BASELINE), names[0])
    return {name: "" if name == main else f"_{name}" for name in names}


def media_row(result: EvaluationResult, section: str = "val", num_prompts: int = 8) -> dict[str, Any]:
    """Numbers, image grid, histograms, maps of passes and the page of prompts, for one call of `run.log`.

    One call, because W&B drops what is logged to a step that it has left.
    """
    row: dict[str, Any] = dict(sectioned_row(result, section))
    row[f"{section}/images"] = wandb.Image(figure_pixels(image_grid(result, num_prompts)))
    row[f"{section}/passes"] = wandb.Image(figure_pixels(acceptance_maps(result, min(num_prompts, 6))))
    for name, method in result.methods.items():
        row[f"{section}_acceptance/{name}"] = _wandb_histogram(method)
    # no wandb.Table: its pictures are named by absolute path, so a copy of an offline run could not send them
    row[f"{section}/prompts"] = wandb.Html(prompts_page(result), False, data_is_not_path=True)
    return row


def log_to_wandb(
    result: EvaluationResult,
    provenance: Mapping[str, Any],
    folder: str | Path,
    *,
    mode: str = "offline",
    project: str = "sjd2-lightning",
    entity: str | None = None,
    name: str | None = None,
    group: str | None = None,
    tags: Sequence[str] = (),
    pictures: Mapping[str, Path] | None = None,
) -> str | None:
    """Logs an evaluation as a W&B run of its own.

    `WANDB_MODE` overrides `mode`. Online needs a login; without one, or when the server does not answer in
    15 s, the run is kept offline and a warning says how to send it later.

    Args:
        result: result of `evaluate_methods`.
        provenance: becomes the run's config, with secrets blanked.
        folder: W&B writes below `<folder>/wandb`.
        mode: "online", "offline" or "disabled".
        project, entity, name, group, tags: W&B's names for the run and its place.
        pictures: further PNG files by log key.

    Returns:
        The folder of the run's files; None when disabled, or when W&B cannot run here.

    Raises:
        ValueError: the mode is unknown.
    """
    mode = wandb_mode(mode)
    settings: dict[str, Any] = {
        "dir": str(folder),
        "project": project,
        "entity": entity,
        "name": name,
        "group": group,
        "tags": list(tags),
        "config": redact(dict(provenance)),
        "job_type": "evaluate",
    }
    run = start_run(mode, settings)
    if run is None:
        return None
    with harmless(f"logging to W&B in {folder}"):
        further = {f"eval/{key}": wandb.Image(str(path)) for key, path in (pictures or {}).items()}
        run.log(media_row(result, "eval") | further)
    return finish_run(run)


def wandb_mode(mode: str) -> str:
    """The mode to run in: `WANDB_MODE`, or else the given one.

    Raises:
        ValueError: it is unknown.
    """
    asked = os.environ.get("WANDB_MODE")
    if (asked or mode) not in _MODES:
        name = f"WANDB_MODE={asked}" if asked else f"logger.wandb.mode={mode}"
        raise ValueError(f"{name} is unknown; use one of {', '.join(_MODES)}")
    return asked or mode


def finish_run(run: Any) -> str | None:
    """Ends a run; the folder of its files, None where there is none."""
    with harmless("ending the W&B run"):
        run.finish()
    return None if run.disabled else str(Path(run.dir).parent)


_stays_offline = False


def start_run(mode: str, settings: dict[str, Any]) -> Any:
    """A W&B run; where going online fails, it is kept offline, with one warning. None where W&B cannot run.

    Going online is tried once a process: a sweep without network waits for the server once.
    """
    run = None
    with harmless(f"starting W&B in {settings['dir']}"):
        Path(settings["dir"]).mkdir(parents=True, exist_ok=True)
        _leave_home(Path(settings["dir"]))
        run = _started(mode, settings)
        if not run.disabled:
            for name, summary in SUMMARY.items():
                run.define_metric(name, summary=summary)
    return run


def _leave_home(folder: Path) -> None:
    """W&B's own log goes into a run's folder where there is no home for it; it would be printed else."""
    try:
        get_cache_dir().mkdir(parents=True, exist_ok=True)
    except OSError:
        os.environ[CACHE_DIR] = str(folder.resolve() / "wandb" / "cache")


def _started(mode: str, settings: dict[str, Any]) -> Any:
    global _stays_offline
    if mode == "online" and not _stays_offline:
        reason = "nobody is logged in (`wandb login`)"
        try:
            if wandb.login(prompt=False):  # asks the server about the key, so it too may fail
                limits = {"init_timeout": INIT_TIMEOUT_S, "finish_timeout": FINISH_TIMEOUT_S}
                run = wandb.init(mode="online", settings=wandb.Settings(silent=True, **limits), **settings)
                log.info("W&B run: %s", run.url)
                return run
        except (wandb.errors.Error, OSError) as error:
            reason = f"the server cannot be used ({error})"
        warnings.warn(
            f"W&B stays offline: {reason}. "
            f"Send the run later with `wandb sync {settings['dir']}/wandb/offline-run-*`",
            stacklevel=5,
        )
        _stays_offline = True
    # silent: where the run lies and how to send it is said at its end, without advertisements
    quiet = wandb.Settings(silent=True)
    return wandb.init(mode="disabled" if mode == "disabled" else "offline", settings=quiet, **settings)


def _wandb_histogram(method: MethodResult) -> wandb.Histogram:
    counts = np.array(method.acceptance_counts[1:] or (0,))
    return wandb.Histogram(np_histogram=(counts, np.arange(len(counts) + 1) + 0.5))
