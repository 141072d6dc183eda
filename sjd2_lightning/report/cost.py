"""What a forward pass costs: by window, measured on this machine, and by method, from the records.

Source: ours. A method is as many times faster than autoregression as its tokens a pass divided by how much
more its pass costs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from sjd2_lightning.decoding.config import BASELINE
from sjd2_lightning.evaluation.results import EvaluationResult, MethodResult
from sjd2_lightning.masks import window_mask
from sjd2_lightning.metrics.efficiency import timed
from sjd2_lightning.models.backbone import Backbone, ImageLayout

_REPEATS = 7


@dataclass(frozen=True)
class PassCost:
    """Seconds of one pass of the trunk and head over `window` tokens of `rows` rows."""

    window: int
    rows: int
    seconds: float


@dataclass(frozen=True)
class MethodCost:
    """Where a method's speed comes from.

    Attributes:
        window: window of the method.
        seconds: wall clock a forward pass, everything included.
        relative: the same in passes of the baseline; None without one.
        tokens: generated tokens a pass.
    """

    method: str
    window: int
    seconds: float
    relative: float | None
    tokens: float


@torch.inference_mode()
def measure_pass_costs(
    backbone: Backbone, layout: ImageLayout, windows: Sequence[int], rows: int
) -> tuple[PassCost, ...]:
    """Seconds of a pass by window, half the image being cached (ours).

    Windows take turns, and the least of seven passes counts: other load of the machine only adds time.

    Args:
        backbone: model, in eval mode.
        layout: layout of the images.
        windows: tokens fed to a pass.
        rows: number of rows of the batch; guidance doubles them.
    """
    calls = {window: _one_pass(backbone, layout.num_slots // 2, window, rows) for window in windows}
    least = dict.fromkeys(calls, float("inf"))
    for repeat in range(_REPEATS + 1):
        for window, call in calls.items():
            seconds = timed(call, backbone.device)[1]
            if repeat:  # the first round warms up
                least[window] = min(least[window], seconds)
    return tuple(PassCost(window, rows, seconds) for window, seconds in least.items())


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


def _one_pass(backbone: Backbone, prefix: int, window: int, rows: int) -> Callable[[], object]:
    device = backbone.device
    cache = backbone.new_cache(rows, prefix + window)
    embeddings = backbone.slot_table()[:1].expand(rows, window, -1)
    columns = (prefix + torch.arange(window, device=device)).expand(rows, -1)
    visible = torch.ones(1, rows, 1, cache.max_len, dtype=torch.bool, device=device)

    def call() -> object:
        mask = window_mask(columns, None, visible)
        cache.place(columns, cache.max_len, prefix)
        return backbone.image_logits(backbone(embeddings, columns, mask, cache))

    return call
