"""The attention mask that training and decoding share.

Columns of a sequence: `num_side` timestep tokens first, then prompts aligned at their right ends (padding
on the left), then the slots of the image. So slot i has the same column in every row.
"""

from __future__ import annotations

from jaxtyping import Bool, Int
from torch import Tensor, arange


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
    keys = arange(num_columns, device=query_columns.device)
    query = query_columns[:, :, None]
    own = keys == query  # padding and timestep tokens see only themselves, so no row is fully masked
    past = (keys <= query) & (keys >= first_column[:, None, None])
    timestep = (keys == levels[:, :, None] - 1) & (levels[:, :, None] > 0)
    return (own | past | timestep)[:, None]
