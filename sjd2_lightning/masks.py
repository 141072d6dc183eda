"""What a query may attend to: one rule for training and decoding, as integers or as a dense mask.

Columns of a sequence: `num_side` timestep tokens first, then prompts aligned at their right ends (padding
on the left), then the slots of the image. So slot i has the same column in every row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor, arange


class Seen(NamedTuple):
    """What each of L queries in B rows sees: some columns of its row, some beside itself, a timestep token.

    Column s is seen if `first <= s < before`, or `own <= s <= column`, or `s == side`.

    Attributes:
        first: (B,) column of each row's first prompt token.
        before: (B, L) first column of what lies in front of each query that it does not see.
        own: (B, L) first column of what a query sees up to itself; None = itself lies before `before`.
        column: (B, L) column of each query.
        side: (B, L) column of each query's timestep token, below 0 for none; None = no query has one.
    """

    first: Tensor
    before: Tensor
    own: Tensor | None
    column: Tensor
    side: Tensor | None

    def dense(self, num_columns: int) -> Bool[Tensor, "B 1 L S"]:
        """(B, 1, L, S) bool, True = seen; S = `num_columns`."""
        keys = arange(num_columns, device=self.column.device)
        seen = (keys < self.before[..., None]) & (keys >= self.first[:, None, None])
        if self.own is not None:
            seen |= (keys >= self.own[..., None]) & (keys <= self.column[..., None])
        if self.side is not None:
            seen |= keys == self.side[..., None]
        return seen[:, None]


def prompt_seen(columns: Int[Tensor, "B L"], first: Int[Tensor, " B"]) -> Seen:
    """What prompts, padding and timestep tokens see.

    Args:
        columns: (B, L) column of each query.
        first: (B,) column of each row's first prompt token.
    """
    return Seen(first, columns, columns, columns, None)


def attention_mask(
    query_columns: Int[Tensor, "B L"],
    levels: Int[Tensor, "B L"],
    first_column: Int[Tensor, " B"],
    num_columns: int,
) -> Bool[Tensor, "B 1 L S"]:
    """Which columns each query sees: itself, what came before it in its row, and its level's timestep token.

    Source: paper, section on timestep injection; placement of the side tokens ours. A clean token sees no
    timestep token, so a tuned model without noise is an ordinary autoregressive one. Padding and timestep
    tokens see only themselves, so no row is fully masked.

    Args:
        query_columns: (B, L) column of each query.
        levels: (B, L) noise level of each query; 0 = clean. Level l has its timestep token in column l - 1.
        first_column: (B,) column of each row's first prompt token.
        num_columns: S, number of columns that keys lie in.

    Returns:
        (B, 1, L, S) bool, True = visible.
    """
    seen = prompt_seen(query_columns, first_column)._replace(side=levels - 1)
    return seen.dense(num_columns)


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where a boolean mask is True, else -inf: attention would convert the mask once for each layer."""
    return torch.zeros((), dtype=dtype, device=mask.device).where(mask, -torch.inf)
