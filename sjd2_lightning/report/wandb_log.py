"""An evaluation in Weights & Biases: numbers, images, histograms and a table of prompts, in one step."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import wandb
from wandb.env import CACHE_DIR, DATA_DIR, get_cache_dir

from sjd2_lightning.decoding.config import BASELINE
from sjd2_lightning.evaluation.quality import judge_key
from sjd2_lightning.evaluation.results import EvaluationResult, MethodResult
from sjd2_lightning.metrics.fidelity import MANIFOLD
from sjd2_lightning.report.figures import acceptance_maps, figure_pixels, image_grid
from sjd2_lightning.run.harmless import harmless
from sjd2_lightning.run.provenance import redact

INIT_TIMEOUT_S = 15
# a server that is gone would be waited for without end; what was not sent is kept
FINISH_TIMEOUT_S = 300
_MAX_TABLE_ROWS = 100
_OF_FEATURES = ("fd", "kid", *MANIFOLD)
_MODES = ("online", "offline", "disabled")


def scalar_row(result: EvaluationResult, prefix: str = "val/") -> dict[str, float]:
    """Every number under its log key.

    Keys of the first method that is not the baseline are plain, such as `val/nfe` and `val/fd_EffNetLite0`;
    those of the others end in the method's name, such as `val/nfe_ar`.
    """
    row = {}
    suffixes = log_suffixes(list(result.methods))
    for name, method in result.methods.items():
        suffix = suffixes[name]
        for key, measure in method.measured.items():
            # Distances carry their extractor in the name; scores carry their scorer only in the report.
            log_key = measure.name if key.partition("_")[0] in _OF_FEATURES else key
            row[f"{prefix}{log_key}{suffix}"] = measure.value
        if method.equal_to_ar is not None and name != BASELINE:
            row[f"{prefix}equal_to_ar{suffix}"] = method.equal_to_ar
    return row


def sampled_names(
    methods: Sequence[str],
    extractors: Sequence[str],
    has_clip: bool,
    has_manifold: bool,
    judged: Sequence[str] = (),
) -> list[str]:
    """Keys that `scalar_row` may give for methods, extractors of distances, a CLIP scorer and a judge.

    Args:
        methods: names of the methods.
        extractors: names of the extractors.
        has_clip: whether there is a scorer.
        has_manifold: whether precision, recall, density and coverage are measured.
        judged: categories of prompts that a judge reports.
    """
    numbers = ["nfe", "step_compression", "seconds_per_image", "images_per_second", "flops_per_token"]
    numbers += ["peak_memory_gib", "window"]
    of_features = _OF_FEATURES if has_manifold else ("fd", "kid")
    numbers += [f"{name}_{extractor}" for extractor in extractors for name in of_features]
    if has_clip:
        numbers += ["clip_score", "clip_score_shuffled", "clip_gain"]
    numbers += [judge_key(category) for category in judged]
    against = ["speedup", "equal_to_ar", "clip_score_minus_ar"] if BASELINE in methods else []
    against += [f"{judge_key(category)}_minus_ar" for category in judged if against]
    return [f"val/{name}{suffix}" for suffix in log_suffixes(methods).values() for name in numbers + against]


def log_suffixes(names: Sequence[str]) -> dict[str, str]:
    """End of the log keys of each method; "" for the first that is not the baseline."""
    main = next((name for name in names if name != BASELINE), names[0])
    return {name: "" if name == main else f"_{name}" for name in names}


def media_row(result: EvaluationResult, prefix: str = "val/", num_prompts: int = 8) -> dict[str, Any]:
    """Numbers, image grid, acceptance histograms, maps of passes and the table, for one call of `run.log`.

    One call, because W&B drops what is logged to a step that it has left.
    """
    row: dict[str, Any] = dict(scalar_row(result, prefix))
    row[f"{prefix}images"] = wandb.Image(figure_pixels(image_grid(result, num_prompts)))
    row[f"{prefix}passes"] = wandb.Image(figure_pixels(acceptance_maps(result, min(num_prompts, 6))))
    for name, method in result.methods.items():
        row[f"{prefix}acceptance/{name}"] = _wandb_histogram(method)
    row[f"{prefix}prompts"] = _table(result)
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
        run.log(media_row(result, prefix="eval/") | further)
        for key, value in scalar_row(result, prefix="eval/").items():
            run.summary[key] = value
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
_data_dir = ""  # what `_stage_inside` has set


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
            _stage_inside(Path(run.dir).parent)
    return run


def _leave_home(folder: Path) -> None:
    """W&B's own log goes into a run's folder where there is no home for it; it would be printed else."""
    try:
        get_cache_dir().mkdir(parents=True, exist_ok=True)
    except OSError:
        os.environ[CACHE_DIR] = str(folder.resolve() / "wandb" / "cache")


def _stage_inside(run_folder: Path) -> None:
    """Pictures of tables are staged with the run, not below HOME: its folder is whole, and all that grows."""
    global _data_dir
    if os.environ.get(DATA_DIR, _data_dir) == _data_dir:  # the user's own place stays
        os.environ[DATA_DIR] = _data_dir = str(run_folder.resolve() / "staging")


def _started(mode: str, settings: dict[str, Any]) -> Any:
    global _stays_offline
    if mode == "online" and not _stays_offline:
        reason = "nobody is logged in (`wandb login`)"
        try:
            if wandb.login(prompt=False):  # asks the server about the key, so it too may fail
                limits = wandb.Settings(init_timeout=INIT_TIMEOUT_S, finish_timeout=FINISH_TIMEOUT_S)
                return wandb.init(mode="online", settings=limits, **settings)
        except (wandb.errors.Error, OSError) as error:
            reason = f"the server cannot be used ({error})"
        warnings.warn(
            f"W&B stays offline: {reason}. "
            f"Send the run later with `wandb sync {settings['dir']}/wandb/offline-run-*`",
            stacklevel=5,
        )
        _stays_offline = True
    return wandb.init(mode="disabled" if mode == "disabled" else "offline", **settings)


def _wandb_histogram(method: MethodResult) -> wandb.Histogram:
    counts = np.array(method.acceptance_counts[1:] or (0,))
    return wandb.Histogram(np_histogram=(counts, np.arange(len(counts) + 1) + 0.5))


def _table(result: EvaluationResult) -> wandb.Table:
    methods = list(result.methods.values())
    columns = ["key", "prompt", "seed"]
    for method in methods:
        columns += [
            f"{method.name} {part}" for part in ("image", "nfe", "tokens / pass", "CLIP score", "judge")
        ]
    table = wandb.Table(columns=columns)
    for place, item in enumerate(result.prompts[:_MAX_TABLE_ROWS]):
        row: list[Any] = [item.key, item.prompt, item.seed]
        for method in methods:
            record = method.records[place]
            score = method.clip_scores[place] if method.clip_scores else None
            image = wandb.Image(str(result.store.image_path(record)))
            verdict = method.verdicts[place] if method.verdicts else None
            judge = None if verdict is None else verdict.sentence
            row += [image, record.nfe, record.num_generated / record.nfe, score, judge]
        table.add_data(*row)
    return table
