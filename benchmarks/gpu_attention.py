"""Attention of one layer in two ways: packed SDPA under a dense mask, as in the engine, and FlexAttention."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.gpu_cells import milliseconds
from sjd2_lightning.masks import Visible
from sjd2_lightning.models.attention import (
    flexible_attention,
    flexible_mask,
    packed_attention,
    packed_mask,
)


@torch.inference_mode()
def compare(
    window: int, columns: int, heads: int, key_heads: int, size: int, device: torch.device
) -> dict[str, float]:
    """Milliseconds of both for a layer, masks included, and how far their results lie apart.

    Args:
        window: number of queries L.
        columns: number of keys S; the window lies at their end.
        heads, key_heads: number of heads of queries and of keys.
        size: size of a head.
        device: device of the tensors.
    """
    generator = torch.Generator(device).manual_seed(0)

    def drawn(num_heads: int, length: int) -> Tensor:
        shape = (2, num_heads, length, size)
        return torch.randn(shape, device=device, generator=generator).to(torch.bfloat16)

    query, key, value = drawn(heads, window), drawn(key_heads, columns), drawn(key_heads, columns)
    column = torch.arange(columns - window, columns, device=device).expand(2, -1)
    first = torch.tensor([0, columns // 16], device=device)
    side = torch.full_like(column, -1)
    visible = Visible(first, column + 1, None, column, side)
    groups, scale, attention = heads // key_heads, size**-0.5, nn.Module()
    by_flex = torch.compile(flexible_attention) if device.type == "cuda" else flexible_attention

    def packed() -> Tensor:
        mask = packed_mask(visible, columns, query.dtype, groups)
        return packed_attention(attention, query, key, value, mask, scale)[0]

    def flexible() -> Tensor:
        mask = flexible_mask(visible, columns, query.dtype, groups)
        return by_flex(attention, query, key, value, mask, scale)[0]

    apart = (packed().float() - flexible().float()).abs().max()
    return {
        "packed_ms": milliseconds(packed, device),
        "flex_ms": milliseconds(flexible, device),
        "largest_difference": float(apart),
    }
