"""Attention of one layer in two ways: packed SDPA under a dense mask, as in the engine, and FlexAttention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from benchmarks.gpu_cells import milliseconds
from sjd2_lightning.masks import Visible, additive
from sjd2_lightning.models.trunk import packed_attention


def flex(query: Tensor, key: Tensor, value: Tensor, visible: Visible, run: Callable[..., Any]) -> Tensor:
    """(B, L, H, D) attention whose mask is a function of a few integers; key heads are shared, not repeated.

    Args:
        query: (B, H, L, D).
        key, value: (B, G, S, D).
        visible: what each query sees.
        run: `flex_attention`, compiled on a GPU.
    """
    first, before, _, _, side = visible.filled()

    def seen(row: Tensor, head: Tensor, at: Tensor, column: Tensor) -> Tensor:
        context = (column >= first[row]) & (column < before[row, at])
        return context | (column == side[row, at])

    mask = create_block_mask(
        seen, len(query), None, query.shape[2], key.shape[2], device=query.device, _compile=query.is_cuda
    )
    return run(query, key, value, block_mask=mask, enable_gqa=True).transpose(1, 2)


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
    run = torch.compile(flex_attention) if device.type == "cuda" else flex_attention

    def packed() -> Tensor:
        mask = additive(visible.dense(columns), query.dtype).repeat(1, 1, heads // key_heads, 1)
        return packed_attention(nn.Module(), query, key, value, mask, size**-0.5)[0]

    def flexible() -> Tensor:
        return flex(query, key, value, visible, run)

    apart = (packed().float() - flexible().float()).abs().max()
    return {
        "packed_ms": milliseconds(packed, device),
        "flex_ms": milliseconds(flexible, device),
        "largest_difference": float(apart),
    }
