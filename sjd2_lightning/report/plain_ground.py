"""Tokens a pass by how much of an image is plain ground: a method that is fast on empty pictures shows it.

A code is plain where it equals its left and its upper neighbour. That needs to know nothing of the picture,
so it holds for every kind of data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from sjd2_lightning.evaluation.results import EvaluationResult, MethodResult
from sjd2_lightning.evaluation.store import ImageRecord
from sjd2_lightning.metrics.bootstrap import MetricResult, ratio_of_totals
from sjd2_lightning.report.table import Column, cell

PLAIN_NOTE = (
    "Behind each number the share of codes that equal their left and their upper neighbour: of a picture of "
    "nothing all do."
)
THIRDS = ("least plain third", "middle third", "plainest third")


@dataclass(frozen=True)
class PlainThird:
    """Images of one method that are about equally plain.

    Attributes:
        share: mean share of plain codes.
        tokens: number of generated tokens a pass.
    """

    share: float
    tokens: MetricResult


def plain_share(record: ImageRecord) -> float:
    """Share of an image's codes that equal their left and upper neighbour, of those that have both."""
    codes = np.array(record.image_ids).reshape(record.size)
    inner = codes[1:, 1:]
    return float(((inner == codes[1:, :-1]) & (inner == codes[:-1, 1:])).mean()) if inner.size else 0.0


def plain_thirds(method: MethodResult, num_resamples: int = 2000) -> tuple[PlainThird, ...]:
    """The images of a method in three parts of about equal number, from the least plain to the plainest.

    Args:
        method: a method's result; of fewer than three images of codes there are no parts.
        num_resamples: bootstrap resamples over images.
    """
    coded = [record for record in method.records if isinstance(record, ImageRecord)]
    if len(coded) < len(THIRDS):
        return ()
    shares = np.array([plain_share(record) for record in coded])
    parts = np.array_split(np.argsort(shares, kind="stable"), len(THIRDS))
    found = []
    for part in parts:
        records = [coded[place] for place in part]
        tokens = ratio_of_totals(
            "step_compression",
            [record.num_generated for record in records],
            [record.nfe for record in records],
            "generated slots / nfe",
            num_resamples,
        )
        found.append(PlainThird(float(shares[part].mean()), tokens))
    return tuple(found)


def by_plain_ground(result: EvaluationResult) -> Mapping[str, tuple[PlainThird, ...]]:
    """`plain_thirds` of every method by its name; empty where there are too few images."""
    found = {name: plain_thirds(method) for name, method in result.methods.items()}
    return {name: thirds for name, thirds in found.items() if thirds}


def plain_cells(thirds: tuple[PlainThird, ...]) -> list[str]:
    """Tokens a pass of each part as text, with interval and share of plain codes."""
    cells = []
    for third in thirds:
        shown = cell({"tokens": third.tokens}, Column("tokens", "", 2, ""))
        cells.append(f"{shown.value} {shown.interval} at {100 * third.share:.0f} %".replace("  ", " "))
    return cells
