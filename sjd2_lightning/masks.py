"""What a query may attend to: one rule for training and decoding, as integers or as a dense mask.

Columns of a sequence: `num_side` timestep tokens first, then prompts aligned at their right ends (padding
on the left), then the slots of the image. So slot i has the same column in every row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor, arange


class Visible(NamedTuple):
    """What each query sees, in integers: kernels read these where a dense mask would be large.

    Key column s is seen where first <= s < before, or own_from <= s <= column, or s == side.

    Attributes:
        first: (B,) first column of each row's context, its first prompt token.
        before: (B, L) column that each query's context ends in front of.
        own_from: (B, L) first column of what each query sees up to itself, beside its context; None = its
            context holds itself.
        column: (B, L) column of each query.
        side: (B, L) column of each query's timestep token, below 0 for none; None = no query has one.
    """

    first: Int[Tensor, " B"]
    before: Int[Tensor, "B L"]
    own_from: Int[Tensor, "B L"] | None
    column: Int[Tensor, "B L"]
    side: Int[Tensor, "B L"] | None

    @classmethod
    def of_prompt(cls, columns: Int[Tensor, "B L"], first: Int[Tensor, " B"]) -> Visible:
        """Of clean tokens, padding and timestep tokens in `columns`; the last two see only themselves."""
        return cls(first, columns, columns, columns, None)

    def sees(self, keys: Int[Tensor, "rows S"]) -> Bool[Tensor, "B L S"]:
        """(B, L, S) bool: which of the key columns, (B, S) or the same for all rows (1, S), are seen."""
        keys = keys[:, None]
        seen = (keys >= self.first[:, None, None]) & (keys < self.before[..., None])
        if self.own_from is not None:
            seen |= (keys >= self.own_from[..., None]) & (keys <= self.column[..., None])
        if self.side is not None:
            seen |= keys == self.side[..., None]
        return seen

    @property
    def noisy(self) -> Bool[Tensor, "B L"] | None:
        """(B, L) bool: which queries have a timestep token, since they are noisy; None = none has."""
        return None if self.side is None else self.side >= 0

    def dense(self, num_columns: int) -> Bool[Tensor, "B 1 L S"]:
        """(B, 1, L, S) bool, True = seen, for keys in S = `num_columns` columns."""
        return self.sees(arange(num_columns, device=self.first.device)[None])[:, None]

    def filled(self) -> Visible:
        """The same without a None, contiguous: what kernels read."""
        own_from = self.column if self.own_from is None else self.own_from
        side = torch.full_like(self.column, -1) if self.side is None else self.side
        fields = (self.first, self.before, own_from, self.column, side)
        return Visible(*(field.contiguous() for field in fields))


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
    visible = Visible.of_prompt(query_columns, first_column)._replace(side=levels - 1)
    return visible.dense(num_columns)


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where a boolean mask is True, else -inf: attention would convert the mask once for each layer."""
    return torch.zeros((), dtype=dtype, device=mask.device).where(mask, -torch.inf)
