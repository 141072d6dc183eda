"""One report of a sweep: every run in a table, maps over window and levels, failed runs by name.

The maps follow the paper's figure 4 (latency over window and denoising iterations).
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sjd2_lightning.decoding.config import BASELINE
from sjd2_lightning.report.figures import figure_png
from sjd2_lightning.report.html import data_uri, render
from sjd2_lightning.report.sweep_figures import QUALITY, SweepRow, pareto_figure, sweep_map
from sjd2_lightning.report.table import MISSING, markdown_lines
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


def write_sweep_report(jobs: Sequence[SweepJob], folder: str | Path) -> SweepFiles:
    """Writes sweep.csv, sweep.md, sweep.html and figures/ of a sweep.

    Args:
        jobs: the runs, from `read_sweep`.
        folder: folder of the sweep.
    """
    folder = Path(folder)
    rows = sweep_rows(jobs)
    drawn = {}
    for key, (title, less_is_better) in MAPS.items():
        if (figure := sweep_map(rows, key, title, less_is_better)) is not None:
            drawn[f"sweep_{key}"] = (title, figure_png(figure))
    if (figure := pareto_figure(rows)) is not None:
        drawn["sweep_pareto"] = ("quality against speed", figure_png(figure))
    paths = []
    for name, (_, png) in drawn.items():
        paths.append(folder / "figures" / f"{name}.png")
        write_whole(paths[-1], png)
    write_whole(folder / "sweep.csv", sweep_csv(jobs, rows))
    write_whole(folder / "sweep.md", _markdown(jobs, rows, list(drawn)))
    write_whole(folder / "sweep.html", _page(jobs, rows, drawn))
    failed = sum(job.error is not None for job in jobs)
    return SweepFiles(folder / "sweep.csv", folder / "sweep.md", folder / "sweep.html", tuple(paths), failed)


_COLUMNS = ("step_compression", "speedup", "seconds_per_image", "clip_gain", "kid")


def _table(jobs: Sequence[SweepJob], rows: Sequence[SweepRow]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of the table: methods of evaluations, or metrics of trainings."""
    titles = job_titles(jobs)
    if rows:
        shown = [key for key in _COLUMNS if any(key in row.measured for row in rows)]
        lines = [
            [titles[row.job], row.method, row.setting, *(_number(row.measured.get(key)) for key in shown)]
            for row in rows
        ]
        return ["run", "method", "window / levels", *(key.replace("_", " ") for key in shown)], lines
    names = list(dict.fromkeys(name for job in jobs for name in job.metrics))
    ended = [job for job in jobs if job.error is None]
    return ["run", *names], [
        [titles[job.name], *(_number(job.metrics.get(n)) for n in names)] for job in ended
    ]


def _number(value: float | None) -> str:
    return MISSING if value is None else f"{value:.3f}"


def _markdown(jobs: Sequence[SweepJob], rows: Sequence[SweepRow], figures: Sequence[str]) -> str:
    failed = [job for job in jobs if job.error is not None]
    titles = job_titles(jobs)
    headings, lines = _table(jobs, rows)
    text = ["# Sweep", "", f"{len(jobs)} runs, {len(failed)} failed.", ""]
    text += [f"- failed: `{titles[job.name]}`: {job.error}" for job in failed]
    for method, row in best_rows(rows):
        speed = row.measured.get("speedup")
        text.append(f"- fastest {method}: {row.setting}, speedup {_number(speed)}")
    text += ["", *markdown_lines(headings, lines, num_texts=len(headings))]
    text += ["", *(f"![{name}](figures/{name}.png)" for name in figures)]
    return "\n".join(text) + "\n"


def _page(jobs: Sequence[SweepJob], rows: Sequence[SweepRow], drawn: Mapping[str, tuple[str, bytes]]) -> str:
    headings, lines = _table(jobs, rows)
    titles = job_titles(jobs)
    return render(
        "sweep.html",
        title="Sweep",
        num_runs=len(jobs),
        failed=[(titles[job.name], job.error) for job in jobs if job.error is not None],
        best=[(method, row.setting, _number(row.measured.get("speedup"))) for method, row in best_rows(rows)],
        figures=[(title, data_uri(png)) for title, png in drawn.values()],
        headings=headings,
        lines=lines,
    )
