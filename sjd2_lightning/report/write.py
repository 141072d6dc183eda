"""Writes a report: report.json, report.md, report.html and figures, each file whole or absent."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sjd2_lightning.decoding.config import BASELINE
from sjd2_lightning.evaluation.controls import Control
from sjd2_lightning.evaluation.results import EvaluationResult, MethodResult
from sjd2_lightning.evaluation.store import method_fields
from sjd2_lightning.metrics.bootstrap import CONFIDENCE, MetricResult
from sjd2_lightning.report.cost import MethodCost, method_costs
from sjd2_lightning.report.figures import (
    acceptance_histogram,
    acceptance_maps,
    cost_chart,
    image_grid,
    save_figure,
    settling_curve,
)
from sjd2_lightning.report.observe import Observations, settling
from sjd2_lightning.report.page import html_page
from sjd2_lightning.report.plain_ground import PLAIN_NOTE, THIRDS, by_plain_ground, plain_cells
from sjd2_lightning.report.table import (
    MISSING,
    control_notes,
    headline,
    headline_missing,
    judge_columns,
    judge_rows,
    markdown_lines,
    markdown_table,
)
from sjd2_lightning.run.files import write_whole

# Numbers that every method has in report.json; null where one could not be measured.
MEASURES = (
    "nfe",
    "step_compression",
    "speedup",
    "seconds_per_image",
    "images_per_second",
    "flops_per_token",
    "peak_memory_gib",
    "clip_score",
    "clip_score_shuffled",
    "clip_gain",
    "clip_score_minus_ar",
    "pick_score",
    "pick_score_minus_ar",
    "judge",
    "judge_minus_ar",
    "fd",
    "kid",
    "precision",
    "recall",
    "density",
    "coverage",
    "cmmd",
)


@dataclass(frozen=True)
class ReportFiles:
    """Paths of a report's files; `settling` is None where no trajectories were observed."""

    json: Path
    markdown: Path
    html: Path
    grid: Path
    histogram: Path
    maps: Path
    cost: Path
    settling: Path | None


def write_report(
    result: EvaluationResult,
    provenance: Mapping[str, Any],
    observations: Observations | None = None,
    folder: str | Path | None = None,
    *,
    num_prompts: int = 8,
    page_prompts: int = 24,
    page_megabytes: float = 12.0,
) -> ReportFiles:
    """Writes all files of a report.

    Args:
        result: result of `evaluate_methods`.
        provenance: result of `collect_provenance`.
        observations: result of `observe`.
        folder: where the files go; default is the folder of the images.
        num_prompts: prompts shown in the figures.
        page_prompts: prompts whose images the page shows.
        page_megabytes: room on the page for images.
    """
    observations = observations or Observations()
    folder = Path(folder) if folder is not None else result.store.folder
    figures = folder / "figures"
    methods = list(result.methods.values())
    grid = save_figure(image_grid(result, num_prompts), figures / "grid.png")
    histogram = save_figure(acceptance_histogram(methods), figures / "acceptance.png")
    maps = save_figure(acceptance_maps(result, min(num_prompts, 6)), figures / "passes.png")
    places = {name: place for place, name in enumerate(result.methods)}
    chart = cost_chart(observations.pass_costs, method_costs(result), places)
    cost, curve = save_figure(chart, figures / "cost.png"), None
    if observations.trajectories:
        settled = settling_curve(settling(observations.trajectories), places)
        curve = save_figure(settled, figures / "settling.png")
    markdown, html, report = folder / "report.md", folder / "report.html", folder / "report.json"
    write_whole(markdown, _markdown(result, provenance, observations))
    page = html_page(result, provenance, observations, num_prompts=page_prompts, max_megabytes=page_megabytes)
    write_whole(html, page)
    # report.json comes last: whoever waits for it finds the other files beside it.
    whole = report_object(result, provenance, observations)
    write_whole(report, json.dumps(whole, indent=1, allow_nan=False) + "\n")
    return ReportFiles(report, markdown, html, grid, histogram, maps, cost, curve)


def report_object(
    result: EvaluationResult, provenance: Mapping[str, Any], observations: Observations | None = None
) -> dict[str, Any]:
    """The whole result as a JSON object: `methods.<name>.<number>` and what is needed to read it."""
    seen = observations or Observations()
    return {
        "methods": {name: _method_object(method) for name, method in result.methods.items()},
        "references": {
            name: {"num_images": count, **_measures_object(quality.measured)}
            for name, (count, quality) in result.references.items()
        },
        "metrics": _metrics_object(result),
        "controls": {control.metric: _control_object(control) for control in result.controls},
        "reference_set": {"name": result.reference_name, "sha256": result.reference_identity},
        "settling": {name: found.as_object() for name, found in settling(seen.trajectories).items()},
        "cost": {
            "passes": [asdict(cost) for cost in seen.pass_costs],
            "methods": {cost.method: asdict(cost) for cost in method_costs(result)},
        },
        "plain_ground": {
            name: [
                {"share": third.share, "num_images": third.tokens.num_images}
                | _measures_object({"step_compression": third.tokens})
                for third in thirds
            ]
            for name, thirds in by_plain_ground(result).items()
        },
        "warnings": list(result.warnings),
        "provenance": dict(provenance),
    }


def _method_object(method: MethodResult) -> dict[str, Any]:
    measured = {name: method.measured.get(name) for name in (*MEASURES, *method.measured)}
    return {
        "num_images": method.num_images,
        "method": method.config.method,
        "acceptance": method.config.acceptance,
        "lossless": method.config.lossless,
        "window": method.config.window,
        "num_levels": method.config.num_levels,
        **_measures_object(measured),
        "seconds_p95": method.seconds_p95,
        "equal_to_ar": method.equal_to_ar,
        "near_ties": method.near_ties,
        "acceptance_counts": list(method.acceptance_counts),
        "config": method_fields(method.config),
    }


def _control_object(control: Control) -> dict[str, Any]:
    measured = _measures_object(control.measured)
    return {"passed": control.passed, "sentence": control.sentence, **measured}


def _measures_object(measured: Mapping[str, MetricResult | None]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, measure in measured.items():
        found[name] = None if measure is None else _finite(measure.value)
        interval = None if measure is None else measure.interval
        found[f"{name}_interval"] = None if interval is None else [_finite(end) for end in interval]
    return found


def _metrics_object(result: EvaluationResult) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for method in result.methods.values():
        for key, measure in method.measured.items():
            described = {
                "name": measure.name,
                "protocol": measure.protocol,
                "confidence": CONFIDENCE,
                "num_images": measure.num_images,
                "flags": list(measure.flags),
            }
            found.setdefault(key, described)
    return found


def _finite(value: float) -> float | None:
    # JSON has no NaN, and a reader must not take one for a number.
    return value if math.isfinite(value) else None


def _markdown(result: EvaluationResult, provenance: Mapping[str, Any], seen: Observations) -> str:
    git, hardware = provenance.get("git", {}), provenance.get("hardware", {})
    best = headline(result)
    said = f"{best.sentence} {best.numbers_line}" if best else headline_missing(result)
    lines = ["# Decoding methods", "", *((said, "") if said else ()), markdown_table(result)]
    lines += ["In brackets: 95 % bootstrap intervals. `report.html` beside this file shows more.", ""]
    lines += [f"- {line}" for line in (*result.warnings, *control_notes(result))]
    if judged := judge_rows(result):
        lines += [
            "",
            "## What the judge sees",
            "",
            "Share of images that show what their prompt asks for.",
            "",
        ]
        cells = [[name, *(f"{c.value} {c.interval}".strip() for c in row)] for name, row in judged]
        lines += markdown_lines(["", *(column.heading for column in judge_columns(result))], cells)
    lines += ["", "![images](figures/grid.png)", "", "## Cost of a pass", ""]
    headings = ["method", "window", "tokens a pass", "ms a pass", "in passes of ar"]
    lines += markdown_lines(headings, [_cost_cells(cost) for cost in method_costs(result)])
    if plain := by_plain_ground(result):
        lines += ["", "## Tokens a pass by plain ground", "", PLAIN_NOTE, ""]
        lines += markdown_lines(
            ["method", *THIRDS], [[name, *plain_cells(thirds)] for name, thirds in plain.items()]
        )
    if found := {name: s for name, s in settling(seen.trajectories).items() if name != BASELINE}:
        lines += ["", "## How drafts settle", ""]
        lines += markdown_lines(
            ["method", "first guess was final", "passes from settled to committed"],
            [[name, f"{100 * s.first_guess:.0f} %", f"{s.mean_lead:.1f}"] for name, s in found.items()],
        )
    rounded = f", quantised to {provenance['quantized']}" if provenance.get("quantized") else ""
    lines += [
        "",
        f"Prompts: {len(result.prompts)}. Real images: {result.reference_name or 'none'}. "
        f"Weights {provenance.get('weights', '')} {str(provenance.get('weights_hash'))[:21]}{rounded}. "
        f"Commit {git.get('commit')}"
        f"{' with local changes' if git.get('dirty') else ''}. "
        f"{hardware.get('gpu') or hardware.get('cpu')}, {hardware.get('num_threads')} threads.",
    ]
    return "\n".join(lines) + "\n"


def _cost_cells(cost: MethodCost) -> list[str]:
    relative = MISSING if cost.relative is None else f"{cost.relative:.2f}"
    return [
        cost.method,
        f"{cost.window}",
        f"{cost.tokens:.2f}",
        f"{1000 * cost.seconds:.1f}",
        relative,
    ]
