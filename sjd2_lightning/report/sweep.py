"""One report of a sweep: every run in a table, maps over window and levels, failed runs by name.

The maps follow the paper's figure 4 (latency over window and denoising iterations).
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from sjd2_lightning.decoding.config import BASELINE
from sjd2_lightning.report.figures import figure_png
from sjd2_lightning.report.html import data_uri, render
from sjd2_lightning.report.sweep_figures import (
    QUALITY,
    Cell,
    SweepRow,
    cell_map,
    differ,
    pareto_figure,
    sweep_cells,
)
from sjd2_lightning.report.table import LEAST_IMAGES, MISSING, markdown_lines
from sjd2_lightning.run.files import remove, write_whole

JOB_FILE = "job.json"
# key of a number -> (title, whether less is better)
MAPS = {
    "seconds_per_image": ("seconds an image", True),
    "step_compression": ("tokens a pass", False),
    "speedup": ("speedup", False),
    **QUALITY,
}


@dataclass(frozen=True)
class SweepJob:
    """One run of a sweep: its overrides, and its result or error.

    Attributes:
        name: name of its folder.
        overrides: overrides as on the command line, "key=value".
        error: first line of the error that stopped it; None if it ended.
        report: content of its report.json; None where there is none.
        metrics: what training returned.
    """

    name: str
    overrides: tuple[str, ...]
    error: str | None = None
    report: Mapping[str, Any] | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class SweepFiles:
    """Paths of the report's files, and how many runs failed."""

    csv: Path
    markdown: Path
    html: Path
    figures: tuple[Path, ...]
    num_failed: int


def swept(jobs: Sequence[SweepJob]) -> dict[str, dict[str, str]]:
    """For each run's name, the keys that the runs do not share, with their values."""
    values = {job.name: dict(text.lstrip("+~").partition("=")[::2] for text in job.overrides) for job in jobs}
    keys = list(dict.fromkeys(key for own in values.values() for key in own))
    keys = [key for key in keys if len({own.get(key) for own in values.values()}) > 1]
    return {name: {key: own.get(key, "") for key in keys} for name, own in values.items()}


def job_titles(jobs: Sequence[SweepJob]) -> dict[str, str]:
    """For each run's name, the overrides that not all runs share, in one line."""
    shared = set.intersection(*(set(job.overrides) for job in jobs)) if len(jobs) > 1 else set()
    return {
        job.name: " ".join(text for text in job.overrides if text not in shared) or f"run {job.name}"
        for job in jobs
    }


def write_job(
    folder: Path, overrides: Sequence[str], outcome: object, error: str | None, is_owned: bool = True
) -> None:
    """Writes job.json into a run's folder; `read_sweep` collects them.

    Args:
        folder: folder of the run. Where there is none, or another process owns it, the file lies beside it.
        overrides: overrides of the run.
        outcome: what the run returned; only plain numbers in a mapping are kept.
        error: first line of the error that stopped it, or None.
        is_owned: whether the run began, and its folder is its own.
    """
    numbers = outcome.items() if isinstance(outcome, Mapping) else ()
    metrics = {str(name): value for name, value in numbers if isinstance(value, (int, float))}
    content = {"overrides": list(overrides), "error": error, "metrics": metrics}
    beside = folder.with_name(f"{folder.name}.{JOB_FILE}")
    remove(beside)
    write_whole(folder / JOB_FILE if is_owned else beside, json.dumps(content, indent=2))


def read_sweep(folder: str | Path) -> list[SweepJob]:
    """The runs below a sweep's folder, in the order of their numbers."""
    paths = {path.parent.name: path for path in Path(folder).glob(f"*/{JOB_FILE}")}
    # what lies beside a folder is the newest run's, that was refused
    paths |= {path.name.removesuffix(f".{JOB_FILE}"): path for path in Path(folder).glob(f"*.{JOB_FILE}")}
    jobs = []
    for name, path in paths.items():
        content, report = json.loads(path.read_text()), path.with_name("report.json")
        found = json.loads(report.read_text()) if report.is_file() and content["error"] is None else None
        jobs.append(SweepJob(name, tuple(content["overrides"]), content["error"], found, content["metrics"]))
    return sorted(jobs, key=lambda job: (len(job.name), job.name))


def sweep_rows(jobs: Sequence[SweepJob]) -> list[SweepRow]:
    """A row for every method of every run that ended."""
    rows = []
    for job in jobs:
        for name, method in (job.report or {}).get("methods", {}).items():
            measured = {
                key: value
                for key, value in method.items()
                if isinstance(value, (int, float)) and not isinstance(value, bool)
            }
            for key, value in method.items():
                if key.endswith("_interval") and value is not None and None not in value:
                    stem = key.removesuffix("_interval")
                    measured |= {f"{stem}_low": value[0], f"{stem}_high": value[1]}
            rows.append(SweepRow(job.name, name, method["acceptance"], method["lossless"], measured))
    return rows


def sweep_csv(jobs: Sequence[SweepJob], rows: Sequence[SweepRow]) -> str:
    """CSV with a line for every method of every run: overrides, then what was measured or why it failed."""
    overrides = {
        job.name: dict(text.lstrip("+~").partition("=")[::2] for text in job.overrides) for job in jobs
    }
    lines: list[dict[str, object]] = []
    for job in jobs:
        head = {"job": job.name, **overrides[job.name], "error": job.error or ""}
        own = [row for row in rows if row.job == job.name]
        lines += [
            {**head, "method": row.method, "acceptance": row.acceptance, "lossless": row.lossless}
            | dict(row.measured)
            for row in own
        ]
        if not own:
            lines.append({**head, **job.metrics})
    columns = list(dict.fromkeys(key for line in lines for key in line))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def best_rows(rows: Sequence[SweepRow]) -> list[tuple[str, SweepRow]]:
    """The fastest setting of each method that drafts, by wall clock where it was measured."""
    found = []
    for method in dict.fromkeys(row.method for row in rows if row.method != BASELINE):
        own = [row for row in rows if row.method == method]
        key = "speedup" if all("speedup" in row.measured for row in own) else "step_compression"
        found.append((method, max(own, key=lambda row: row.measured.get(key, 0.0))))
    return found


def maps_of(rows: Sequence[SweepRow]) -> dict[str, tuple[str, Figure]]:
    """Title and map of each number that differs between settings, by its name."""
    drawn = {}
    for key, (title, less_is_better) in MAPS.items():
        if (figure := cell_map(sweep_cells(rows, key), title, less_is_better)) is not None:
            drawn[f"sweep_{key}"] = (title, figure)
    if (figure := pareto_figure(rows)) is not None:
        drawn["sweep_pareto"] = ("quality against speed", figure)
    return drawn


def training_maps(jobs: Sequence[SweepJob]) -> dict[str, tuple[str, Figure]]:
    """The same of trainings, over the first two swept keys; over one key there is a single line."""
    values = swept(jobs)
    keys = list(next(iter(values.values()), {}))[:2]
    drawn: dict[str, tuple[str, Figure]] = {}
    if not keys:
        return drawn
    for name, (title, less_is_better) in TRAINED.items():
        found: dict[tuple[str, str], list[float]] = {}
        for job in jobs:
            if name in job.metrics:
                line, column = values[job.name][keys[1]] if len(keys) > 1 else "", values[job.name][keys[0]]
                found.setdefault((line, column), []).append(job.metrics[name])
        cells = {place: Cell(sum(own) / len(own)) for place, own in found.items()}
        axes = (keys[1] if len(keys) > 1 else "", keys[0])
        if differ(cells) and (figure := cell_map({"": cells}, title, less_is_better, axes)) is not None:
            drawn[f"sweep_{name.replace('/', '_')}"] = (title, figure)
    return drawn


def same_images(rows: Sequence[SweepRow]) -> list[str]:
    """Methods that drew the baseline's images in every cell: no quality of theirs can differ between cells
    beyond the baseline's."""
    methods = dict.fromkeys(row.method for row in rows if row.method != BASELINE)
    by_method = {name: [row for row in rows if row.method == name] for name in methods}
    constant = [
        name
        for name, own in by_method.items()
        if len(own) > 1
        and all(row.measured.get("equal_to_ar") == 1 for row in own)
        and not any(sweep_cells(own, key) for key in QUALITY)
    ]
    return constant


def write_sweep_report(jobs: Sequence[SweepJob], folder: str | Path) -> SweepFiles:
    """Writes sweep.csv, sweep.md, sweep.html and figures/ of a sweep.

    Args:
        jobs: the runs, from `read_sweep`.
        folder: folder of the sweep.
    """
    folder = Path(folder)
    rows = sweep_rows(jobs)
    drawn = {
        name: (title, figure_png(figure))
        for name, (title, figure) in (maps_of(rows) if rows else training_maps(jobs)).items()
    }
    paths = []
    for name, (_, png) in drawn.items():
        paths.append(folder / "figures" / f"{name}.png")
        write_whole(paths[-1], png)
    write_whole(folder / "sweep.csv", sweep_csv(jobs, rows))
    said = _sentences(jobs, rows)
    write_whole(folder / "sweep.md", _markdown(jobs, rows, list(drawn), said))
    write_whole(folder / "sweep.html", _page(jobs, rows, drawn, said))
    failed = sum(job.error is not None for job in jobs)
    return SweepFiles(folder / "sweep.csv", folder / "sweep.md", folder / "sweep.html", tuple(paths), failed)


def _sentences(jobs: Sequence[SweepJob], rows: Sequence[SweepRow]) -> list[str]:
    """What a reader needs before the numbers: best settings, what cannot differ, how far to trust it."""
    said = []
    for method, row in best_rows(rows):
        ties = [
            other.setting
            for other in rows
            if other.method == method and other is not row and _cell(row).overlaps(_cell(other))
        ]
        text = f"fastest {method}: {row.setting}, speedup {_with_interval(row, 'speedup')}"
        said.append(f"{text}; not clear of {', '.join(ties)} (intervals overlap)" if ties else text)
    said += [f"{method}: same images in all cells, those of {BASELINE}" for method in same_images(rows)]
    counts = sorted({int(row.measured["num_images"]) for row in rows if "num_images" in row.measured})
    if counts:
        few = f": below {LEAST_IMAGES}, no setting can be called best" if counts[0] < LEAST_IMAGES else ""
        said.append(f"{' or '.join(map(str, counts))} images a method; brackets are 95 % intervals{few}")
    trained = [job for job in jobs if "val/loss_clean" in job.metrics]
    if not rows and len(trained) > 1:
        best = min(trained, key=lambda job: job.metrics["val/loss_clean"])
        loss = best.metrics["val/loss_clean"]
        said.append(f"least val/loss_clean: {job_titles(jobs)[best.name]}, {loss:.3f}")
    return said


def _cell(row: SweepRow) -> Cell:
    ends = (row.measured.get("speedup_low", -math.inf), row.measured.get("speedup_high", math.inf))
    return Cell(row.measured.get("speedup", 0.0), *ends)


_COLUMNS = ("step_compression", "speedup", "seconds_per_image", "clip_gain", "kid")
# what a training sweep is about: title, and whether less is better
TRAINED = {
    "val/loss_clean": ("validation loss", True),
    "val/nfe": ("passes", True),
    "val/step_compression": ("tokens a pass", False),
}


@dataclass(frozen=True)
class SweepTable:
    """Headings, and for each line its run and its cells."""

    headings: tuple[str, ...]
    lines: tuple[tuple[SweepJob, tuple[str, ...]], ...]


def _table(jobs: Sequence[SweepJob], rows: Sequence[SweepRow]) -> SweepTable:
    """The swept keys, then methods of evaluations, or what training changed."""
    values, by_name = swept(jobs), {job.name: job for job in jobs}
    keys = tuple(next(iter(values.values()), {}))
    if rows:
        shown = [key for key in _COLUMNS if any(key in row.measured for row in rows)]
        headings = (*keys, "method", "window / levels", *(key.replace("_", " ") for key in shown), "N")
        lines, baselines = [], list[Mapping[str, float]]()
        for row in rows:
            if row.method == BASELINE:
                if row.measured in baselines:
                    continue  # decoded once for all cells
                baselines.append(row.measured)
            own = values[row.job].values() if row.method != BASELINE else [MISSING] * len(keys)
            numbers = (_with_interval(row, key) for key in shown)
            count = f"{row.measured['num_images']:.0f}" if "num_images" in row.measured else MISSING
            lines.append((by_name[row.job], (*own, row.method, row.setting, *numbers, count)))
        return SweepTable(headings, tuple(lines))
    names = [
        (name, f"{title}{when}")
        for key, (title, _) in TRAINED.items()
        for name, when in ((f"start/{key}", " before"), (key, " after"))
        if any(name in job.metrics for job in jobs)
    ]
    ended = [job for job in jobs if job.error is None]
    return SweepTable(
        (*keys, *(title for _, title in names)),
        tuple(
            (job, (*values[job.name].values(), *(_number(job.metrics.get(name)) for name, _ in names)))
            for job in ended
        ),
    )


def _with_interval(row: SweepRow, key: str) -> str:
    low, high = row.measured.get(f"{key}_low"), row.measured.get(f"{key}_high")
    interval = "" if low is None or high is None else f" [{low:.2f}, {high:.2f}]"
    return f"{_number(row.measured.get(key))}{interval}"


def _number(value: float | None) -> str:
    return MISSING if value is None else f"{value:.3f}"


def _link(job: SweepJob) -> str:
    """Where a run is looked at: its page, or its folder."""
    return f"{job.name}/" if job.report is None else f"{job.name}/report.html"


def _markdown(
    jobs: Sequence[SweepJob], rows: Sequence[SweepRow], figures: Sequence[str], said: Sequence[str]
) -> str:
    failed = [job for job in jobs if job.error is not None]
    titles, table = job_titles(jobs), _table(jobs, rows)
    text = ["# Sweep", "", f"{len(jobs)} runs, {len(failed)} failed.", ""]
    text += [f"- failed: `{titles[job.name]}`: {job.error}" for job in failed]
    text += [f"- {sentence}" for sentence in said]
    lines = [[f"[{job.name}]({_link(job)})", *cells] for job, cells in table.lines]
    headings = ["run", *table.headings]
    text += ["", *markdown_lines(headings, lines, num_texts=len(headings))]
    text += ["", *(f"![{name}](figures/{name}.png)" for name in figures)]
    return "\n".join(text) + "\n"


def _page(
    jobs: Sequence[SweepJob],
    rows: Sequence[SweepRow],
    drawn: Mapping[str, tuple[str, bytes]],
    said: Sequence[str],
) -> str:
    titles, table = job_titles(jobs), _table(jobs, rows)
    return render(
        "sweep.html",
        title="Sweep",
        num_runs=len(jobs),
        failed=[(titles[job.name], job.error) for job in jobs if job.error is not None],
        said=said,
        figures=[(title, data_uri(png)) for title, png in drawn.values()],
        headings=table.headings,
        lines=[(job.name, _link(job), cells) for job, cells in table.lines],
    )
