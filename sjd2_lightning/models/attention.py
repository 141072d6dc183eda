"""Attention of a window over the cache, keys never repeated: under a dense mask, or by FlexAttention.

transformers repeats keys and values for each query head as soon as there is a mask; neither of these does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import AttentionInterface

from sjd2_lightning.masks import Visible, additive

SMALLEST_HEAD = 16  # numbers that a head must have for FlexAttention on CUDA
_BLOCK = 128  # columns and queries of a block, the one size that all of its kernels take


class Attention(NamedTuple):
    """A way of attending.

    Attributes:
        name: its name in transformers.
        mask: from what queries see, number of columns, dtype and query heads a key head to what `name` takes.
    """

    name: str
    mask: Callable[[Visible, int, torch.dtype, int], Any]


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Attention under a dense mask: query heads that share a key head are further rows of it.

    Args:
        module: the attention of a layer.
        query: (B, H, L, D); H is a multiple of G.
        key, value: (B, G, S, D).
        attention_mask: (B, 1, H / G * L, S) additive; the same L rows for each head.
        scaling: factor of the scores.

    Returns:
        (B, L, H, D), and no weights.
    """
    rows = query.reshape(*key.shape[:2], -1, query.shape[-1])  # (B, G, H / G * L, D)
    found = F.scaled_dot_product_attention(rows, key, value, attn_mask=attention_mask, scale=scaling)
    return found.reshape(query.shape).transpose(1, 2), None


def packed_mask(visible: Visible, num_columns: int, dtype: torch.dtype, groups: int) -> Tensor:
    """(B, 1, groups * L, S) additive mask of S = `num_columns` columns."""
    return additive(visible.dense(num_columns), dtype).repeat(1, 1, groups, 1)


def flexible_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: BlockMask,
    scaling: float | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Attention whose mask is a function of a few integers; arguments as those of `packed_attention`."""
    shared = query.shape[1] != key.shape[1]
    found = flex_attention(query, key, value, block_mask=attention_mask, scale=scaling, enable_gqa=shared)
    return found.transpose(1, 2), None


def flexible_mask(visible: Visible, num_columns: int, dtype: torch.dtype, groups: int) -> BlockMask:
    """What each query sees of `num_columns` columns, read column by column inside the kernel.

    All blocks are named: a pass reads keys up to the furthest head only, so there is little to pass over.
    """
    first, before, own_from, column, side = (torch.as_tensor(field) for field in visible.filled())
    length = column.shape[1]
    num_keys, num_queries = -(-num_columns // _BLOCK), -(-length // _BLOCK)
    blocks = torch.arange(num_keys, dtype=torch.int32, device=column.device)
    return BlockMask.from_kv_blocks(
        torch.full((1, 1, num_queries), num_keys, dtype=torch.int32, device=column.device),
        blocks.repeat(1, 1, num_queries, 1),
        BLOCK_SIZE=_BLOCK,
        mask_mod=lambda row, _, query, key: (
            ((key >= first[row]) & (key < before[row, query]))
            | ((key >= own_from[row, query]) & (key <= column[row, query]))
            | (key == side[row, query])
        ),
        seq_lengths=(length, num_columns),
        compute_q_blocks=False,  # of use to gradients only
    )


DENSE = Attention("sjd2_packed", packed_mask)
FLEX = Attention("sjd2_flexible", flexible_mask)

AttentionInterface.register(DENSE.name, packed_attention)
AttentionInterface.register(FLEX.name, flexible_attention)
