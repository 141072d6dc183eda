"""The files of a report: report.json, report.md, report.html and figures, each whole or absent."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sjd2_lightning.comparison import EvaluationResult, MethodResult
from sjd2_lightning.metrics.bootstrap import MetricResult
from sjd2_lightning.records import write_atomic
from sjd2_lightning.report.figures import acceptance_histogram, acceptance_maps, image_grid, save_figure
from sjd2_lightning.report.page import html_page
from sjd2_lightning.report.table import markdown_table

# Figures that every method has in report.json; null where one could not be measured.
FIGURES = (
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
    "fd",
    "kid",
    "precision",
    "recall",
    "density",
    "coverage",
)


@dataclass(frozen=True)
class ReportFiles:
    """Where the parts of a report lie."""

    json: Path
    markdown: Path
    html: Path
    grid: Path
    histogram: Path
    maps: Path


def write_report(
    result: EvaluationResult,
    provenance: Mapping[str, Any],
    folder: str | Path | None = None,
    num_prompts: int = 8,
) -> ReportFiles:
    """Writes all files of a report.

    Args:
        result: of `evaluate_methods`.
        provenance: of `collect_provenance`.
        folder: default is the folder of the images.
        num_prompts: prompts shown in the figures.
    """
    folder = Path(folder) if folder is not None else result.store.folder
    figures = folder / "figures"
    methods = list(result.methods.values())
    grid = save_figure(image_grid(result, num_prompts), figures / "grid.png")
    histogram = save_figure(acceptance_histogram(methods), figures / "acceptance.png")
    maps = save_figure(acceptance_maps(result, min(num_prompts, 6)), figures / "passes.png")
    markdown, html, report = folder / "report.md", folder / "report.html", folder / "report.json"
    write_atomic(markdown, _markdown(result, provenance))
    write_atomic(html, html_page(result, provenance))
    # Last: whoever waits for report.json finds the rest beside it.
    write_atomic(report, json.dumps(report_object(result, provenance), indent=1, allow_nan=False) + "\n")
    return ReportFiles(report, markdown, html, grid, histogram, maps)


def report_object(result: EvaluationResult, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """The whole result as a JSON object: `methods.<name>.<figure>` and what is needed to read it."""
    return {
        "methods": {name: _method_object(method) for name, method in result.methods.items()},
        "references": {
            name: {"num_images": count, **_figures_object(quality.figures)}
            for name, (count, quality) in result.references.items()
        },
        "metrics": _metrics_object(result),
        "reference_set": {"name": result.reference_name, "sha256": result.reference_identity},
        "warnings": list(result.warnings),
        "provenance": dict(provenance),
    }


def _method_object(method: MethodResult) -> dict[str, Any]:
    figures = {name: method.figures.get(name) for name in (*FIGURES, *method.figures)}
    return {
        "num_images": method.num_images,
        "method": method.config.method,
        "acceptance": method.config.acceptance,
        "lossless": method.config.lossless,
        "window": method.config.window,
        "num_levels": method.config.num_levels,
        **_figures_object(figures),
        "seconds_p95": method.seconds_p95,
        "equal_to_ar": method.equal_to_ar,
        "near_ties": method.near_ties,
        "acceptance_counts": list(method.acceptance_counts),
        "config": asdict(method.config),
    }


def _figures_object(figures: Mapping[str, MetricResult | None]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, figure in figures.items():
        found[name] = None if figure is None else _finite(figure.value)
        interval = None if figure is None else figure.interval
        found[f"{name}_interval"] = None if interval is None else [_finite(end) for end in interval]
    return found


def _metrics_object(result: EvaluationResult) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for method in result.methods.values():
        for key, figure in method.figures.items():
            described = {
                "name": figure.name,
                "protocol": figure.protocol,
                "confidence": figure.confidence,
                "num_images": figure.num_images,
                "flags": list(figure.flags),
            }
            found.setdefault(key, described)
    return found


def _finite(value: float) -> float | None:
    # JSON has no NaN, and a reader must not take one for a number.
    return value if math.isfinite(value) else None


def _markdown(result: EvaluationResult, provenance: Mapping[str, Any]) -> str:
    git, hardware = provenance.get("git", {}), provenance.get("hardware", {})
    lines = ["# Decoding methods", "", markdown_table(result)]
    lines += ["In brackets: 95 % bootstrap intervals. ![images](figures/grid.png)", ""]
    lines += [f"- {warning}" for warning in result.warnings]
    lines += [
        "",
        f"Prompts: {len(result.prompts)}. Real images: {result.reference_name or 'none'}. "
        f"Weights sha256 {str(provenance.get('weights_sha256'))[:16]}. Commit {git.get('commit')}"
        f"{' with local changes' if git.get('dirty') else ''}. "
        f"{hardware.get('gpu') or hardware.get('cpu')}, {hardware.get('num_threads')} threads.",
    ]
    return "\n".join(lines) + "\n"
