"""What a forward pass costs: by window, measured on this machine, and by method, from the records.

A method is as many times faster than autoregression as its tokens a pass divided by how much
more its pass costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from sjd2_lightning.decoding.config import BASELINE
from sjd2_lightning.evaluation.auto_window import pass_seconds
from sjd2_lightning.evaluation.results import EvaluationResult, MethodResult
from sjd2_lightning.models.backbone import Backbone, ImageLayout


@dataclass(frozen=True)
class PassCost:
    """Seconds of one pass over `window` tokens of `rows` rows."""

    window: int
    rows: int
    seconds: float


@dataclass(frozen=True)
class MethodCost:
    """Where a method's speed comes from.

    Attributes:
        method: name of the method.
        window: window of the method.
        seconds: wall clock a forward pass, everything included.
        relative: the same in passes of the baseline; None without one.
        tokens: number of generated tokens a pass.
    """

    method: str
    window: int
    seconds: float
    relative: float | None
    tokens: float


def measure_pass_costs(
    backbone: Backbone, result: EvaluationResult, layout: ImageLayout, windows: Sequence[int]
) -> tuple[PassCost, ...]:
    """Cost of a pass of the largest batch by window, with guidance if some method has it; see `pass_seconds`.

    Args:
        backbone: model, in eval mode.
        result: result of the comparison.
        layout: layout of the images.
        windows: windows whose passes are timed; none times nothing.
    """
    configs = [method.config for method in result.methods.values()]
    config = max(configs, key=lambda config: config.sampling.guidance_scale != 1)
    batch = max(record.batch_size for method in result.methods.values() for record in method.records)
    prompts = [item.prompt for item in result.prompts[:batch]]
    seconds = pass_seconds(backbone, replace(config, num_levels=0), prompts, layout, windows)
    rows = len(prompts) * (1 if config.sampling.guidance_scale == 1 else 2)
    return tuple(PassCost(window, rows, taken) for window, taken in seconds.items())


def method_costs(result: EvaluationResult) -> list[MethodCost]:
    """Cost of a pass of each method, from the records of the comparison."""
    baseline = result.methods.get(BASELINE)
    plain = None if baseline is None else seconds_per_pass(baseline)
    return [
        MethodCost(
            name,
            method.config.size,
            seconds_per_pass(method),
            None if plain is None else seconds_per_pass(method) / plain,
            sum(r.num_generated for r in method.records) / sum(r.nfe for r in method.records),
        )
        for name, method in result.methods.items()
    ]


def seconds_per_pass(method: MethodResult) -> float:
    """Median over prompt batches of wall clock / forward passes of the batch, prefill included."""
    batches: dict[int, tuple[float, int]] = {}
    for record in method.records:
        most = max(record.nfe, batches.get(record.batch, (0.0, 0))[1])
        batches[record.batch] = (record.seconds, most)
    return float(np.median([seconds / passes for seconds, passes in batches.values()]))
