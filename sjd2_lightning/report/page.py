"""One self-contained HTML page of an evaluation: no network, light and dark, phone to wide screen."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib import colormaps

from sjd2_lightning.comparison import EvaluationResult, MethodResult
from sjd2_lightning.records import ImageRecord, png_bytes
from sjd2_lightning.report.figures import settled_map
from sjd2_lightning.report.table import columns, rows

_TEMPLATES = Path(__file__).parent / "templates"


def html_page(
    result: EvaluationResult,
    provenance: Mapping[str, Any],
    title: str = "Decoding methods",
    num_prompts: int = 24,
) -> str:
    """The page as text.

    Args:
        result: of `evaluate_methods`.
        provenance: of `collect_provenance`.
        title: of the page.
        num_prompts: prompts whose images are shown; the table covers all.
    """
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    shown = [
        {
            "caption": item.prompt,
            "key": item.key,
            "seed": item.seed,
            "images": [_image(result, m, m.records[place]) for m in result.methods.values()],
        }
        for place, item in enumerate(result.prompts[:num_prompts])
    ]
    return environment.get_template("page.html").render(
        title=title,
        columns=columns(result),
        rows=rows(result),
        warnings=result.warnings,
        prompts=shown,
        num_prompts=len(result.prompts),
        histograms=[_histogram(method) for method in result.methods.values()],
        reference_name=result.reference_name,
        protocols=_protocols(result),
        summary=_summary(provenance),
        provenance=json.dumps(dict(provenance), indent=2, ensure_ascii=False),
    )


def heat_map_png(record: ImageRecord) -> bytes:
    """The map of passes of one image, one pixel a code."""
    passes = settled_map(record)
    colours = colormaps["viridis"](passes / max(record.nfe - 1, 1))[..., :3]
    return png_bytes((colours * 255).round().astype(np.uint8))


def _image(result: EvaluationResult, method: MethodResult, record: ImageRecord) -> dict[str, Any]:
    baseline = result.methods.get("ar")
    place = method.records.index(record)
    return {
        "method": method.name,
        "nfe": record.nfe,
        "compression": record.num_generated / record.nfe,
        "clip_score": method.clip_scores[place] if method.clip_scores else None,
        "same": baseline is not None
        and method is not baseline
        and baseline.records[place].image_ids == record.image_ids,
        "picture": _data_uri(result.store.image_path(record).read_bytes()),
        "map": _data_uri(heat_map_png(record)),
    }


def _histogram(method: MethodResult) -> dict[str, Any]:
    counts = method.acceptance_counts
    total, most = max(sum(counts), 1), max(counts, default=1) or 1
    bars = [
        {"slots": n, "share": count / total, "height": 100 * count / most}
        for n, count in enumerate(counts)
        if n
    ]
    return {"method": method.name, "mean": method.figures["step_compression"].value, "bars": bars}


def _protocols(result: EvaluationResult) -> list[tuple[str, str]]:
    found = {
        figure.name: figure.protocol
        for method in result.methods.values()
        for figure in method.figures.values()
    }
    return list(found.items())


def _summary(provenance: Mapping[str, Any]) -> list[tuple[str, str]]:
    git, hardware = provenance.get("git", {}), provenance.get("hardware", {})
    versions = provenance.get("versions", {})
    commit = git.get("commit") or "not a git checkout"
    return [
        ("made", str(provenance.get("created"))),
        ("code", f"{commit[:12]}{' with local changes' if git.get('dirty') else ''}"),
        ("weights", str(provenance.get("weights_sha256"))[:16]),
        ("hardware", f"{hardware.get('gpu') or hardware.get('cpu')}, {hardware.get('num_threads')} threads"),
        ("software", f"Python {versions.get('python')}, torch {versions.get('torch')}"),
    ]


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
