"""The attention mask that training and decoding share.

Columns of a sequence: `num_side` timestep tokens first, then prompts aligned at their right ends (padding
on the left), then the slots of the image. So slot i has the same column in every row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor, arange


class Visible(NamedTuple):
    """What each query sees, in five integers a query: kernels read these where a dense mask would be large.

    Key column s is seen where first <= s < before, or own_from <= s <= column, or s == side.

    Attributes:
        first: (B,) first column of each row's context, its first prompt token.
        before: (B, L) column that each query's context ends in front of.
        own_from: (B, L) first column of what each query sees up to itself, beside its context.
        column: (B, L) column of each query.
        side: (B, L) column of each query's timestep token; -1 = none.
    """

    first: Int[Tensor, " B"]
    before: Int[Tensor, "B L"]
    own_from: Int[Tensor, "B L"]
    column: Int[Tensor, "B L"]
    side: Int[Tensor, "B L"]

    def sees(self, keys: Int[Tensor, "rows S"]) -> Bool[Tensor, "B L S"]:
        """(B, L, S) bool: which of the key columns, (B, S) or the same for all rows (1, S), are seen."""
        keys = keys[:, None]
        before, own_from, column, side = (bound[..., None] for bound in self[1:])
        context = (keys >= self.first[:, None, None]) & (keys < before)
        return context | ((keys >= own_from) & (keys <= column)) | (keys == side)

    def dense(self, num_columns: int) -> Bool[Tensor, "B 1 L S"]:
        """(B, 1, L, S) bool, True = seen, for keys in S = `num_columns` columns."""
        return self.sees(arange(num_columns, device=self.first.device)[None])[:, None]


def attention_mask(
    query_columns: Int[Tensor, "B L"],
    levels: Int[Tensor, "B L"],
    first_column: Int[Tensor, " B"],
    num_columns: int,
) -> Bool[Tensor, "B 1 L S"]:
    """Which columns each query sees: itself, what came before it in its row, and its level's timestep token.

    Source: paper, section on timestep injection; placement of the side tokens ours. A clean token sees no
    timestep token, so a tuned model without noise is an ordinary autoregressive one.

    Args:
        query_columns: (B, L) column of each query.
        levels: (B, L) noise level of each query; 0 = clean. Level l has its timestep token in column l - 1.
        first_column: (B,) column of each row's first prompt token.
        num_columns: S, number of columns that keys lie in.

    Returns:
        (B, 1, L, S) bool, True = visible.
    """
    # padding and timestep tokens see only themselves, so no row is fully masked; no column for level 0
    visible = Visible(first_column, query_columns + 1, query_columns, query_columns, levels - 1)
    return visible.dense(num_columns)


def window_mask(
    query_columns: Int[Tensor, "B L"],
    levels: Int[Tensor, "B n"] | None,
    visible: Bool[Tensor, "copies B 1 S"],
) -> Bool[Tensor, "rows 1 L S"]:
    """`attention_mask` of the window of decoding: nothing that stays the same is computed again.

    Args:
        query_columns: (B, L) column of each query; none is padding or a timestep token.
        levels: (B, n) noise level of the last n queries; None = all are clean.
        visible: (copies, B, 1, S) which columns hold a prompt or a slot of each row; with guidance the rows
            are the prompts, then their empty twins, and all twins share columns and levels.

    Returns:
        (copies * B, 1, L, S) bool.
    """
    copies, batch, _, num_columns = visible.shape
    keys = arange(num_columns, device=query_columns.device)
    mask = (keys <= query_columns[:, :, None]) & visible
    if levels is not None:
        mask[:, :, mask.shape[2] - levels.shape[1] :] |= keys == levels[:, :, None] - 1
    return mask.view(copies * batch, 1, -1, num_columns)


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where a boolean mask is True, else -inf: attention would convert the mask once for each layer."""
    return torch.zeros((), dtype=dtype, device=mask.device).where(mask, -torch.inf)
