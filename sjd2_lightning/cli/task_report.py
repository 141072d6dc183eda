"""The report of an evaluation of another task than images of codes: the same files, by the same writers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sjd2_lightning.config.runs import EvaluateConfig
from sjd2_lightning.run.stages import stage

if TYPE_CHECKING:
    from torch import nn

    from sjd2_lightning.evaluation.results import EvaluationResult


def write_task_report(
    config: EvaluateConfig,
    result: EvaluationResult,
    model: nn.Module,
    weights: str,
    weights_hash: str,
    hand_out: Callable[..., None],
) -> dict[str, Any]:
    """Writes report and page, and hands them out.

    Args:
        config: the evaluation.
        result: what was measured.
        model: the model of the baseline.
        weights: its folder.
        weights_hash: identity of its weights.
        hand_out: does what stands behind every report.

    Returns:
        What report.json holds.
    """
    from sjd2_lightning.report.write import report_object, write_report
    from sjd2_lightning.run.provenance import collect_provenance, redact

    provenance = collect_provenance(
        model,
        redact(config.model_dump(mode="json")),
        {item.key: item.seed for item in result.prompts},
        {"weights": weights},
        weights_hash,
    )
    with stage("writing the report"):
        files = write_report(
            result,
            provenance,
            page_prompts=config.report.num_images,
            page_megabytes=config.report.page_megabytes,
        )
    hand_out(config, result, Path(weights), provenance, files)
    return report_object(result, provenance)
