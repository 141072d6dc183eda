"""Attention under a dense mask or by FlexAttention: of a window over the cache, and of whole sequences.

transformers repeats keys and values for each query head as soon as there is a mask; none of these does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sjd2_lightning.masks import Visible, additive

SMALLEST_HEAD = 16  # numbers that a head must have for FlexAttention on CUDA
_LONG = 512  # tokens of a sequence from which groups of rows pay
_GROUPS = 4
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


def blocks_of(visible: Visible) -> BlockMask:
    """What each column of whole sequences sees: the levels are read inside the kernel, by timestep token.

    Blocks above the diagonal are left out. Those below it that hold no padding are seen whole, since every
    token sees what came before it in its row.

    Args:
        visible: what columns 0 to L - 1 see, see `Visible.of_prompt`; contexts end where each query stands.
    """
    first, side = visible.first, visible.filled().side
    assert side is not None
    length = side.shape[1]
    block = torch.arange(-(-length // _BLOCK), device=first.device)
    below = block[:, None] > block
    whole = below & (block * _BLOCK >= first[:, None, None])  # (B, blocks of queries, of keys)
    parts = (block[:, None] >= block) & ~whole
    lists = [_in_order(chosen[:, None]) for chosen in (parts, whole)]
    return BlockMask.from_kv_blocks(
        *lists[0],
        *lists[1],
        BLOCK_SIZE=_BLOCK,
        mask_mod=lambda row, _, query, key: (
            ((key >= first[row]) & (key < query)) | (key == query) | (key == side[row, query])
        ),
        seq_lengths=(length, length),
    )


def _in_order(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers (...,) of the chosen blocks (..., K), and their places (..., K), the chosen ones first."""
    places = chosen.int().argsort(dim=-1, descending=True, stable=True)
    return chosen.sum(-1, dtype=torch.int32), places.int()


def either_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """`flexible_attention` under a mask of blocks, else transformers' SDPA; arguments are theirs.

    A CPU's kernel computes columns that a mask hides. No token of a whole sequence sees one behind it, so
    groups of rows leave those out.
    """
    if not isinstance(attention_mask, BlockMask):
        sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
        length = query.shape[2]
        whole = query.device.type == "cpu" and key.shape[2] == length >= _LONG
        size = math.ceil(length / (_GROUPS if whole else 1))
        found = []
        for start in range(0, length, size):
            rows = slice(start, start + size)
            columns = slice(start + size if whole else None)
            mask = attention_mask[:, :, rows, columns]
            seen = key[:, :, columns], value[:, :, columns]
            found.append(sdpa(module, query[:, :, rows], *seen, mask, scaling=scaling, **options)[0])
        return torch.cat(found, dim=1), None
    # autocast knows SDPA and not this: norms of queries and keys leave them in another type
    query, key = query.to(value.dtype), key.to(value.dtype)
    return flexible_attention(module, query, key, value, attention_mask, scaling)


DENSE = Attention("sjd2_packed", packed_mask)
FLEX = Attention("sjd2_flexible", flexible_mask)
EITHER = "sjd2_either"  # the name that transformers knows `either_attention` by

AttentionInterface.register(DENSE.name, packed_attention)
AttentionInterface.register(FLEX.name, flexible_attention)
AttentionInterface.register(EITHER, either_attention)
