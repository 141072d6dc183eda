"""Checks of the Triton kernels in Triton's interpreter; prints a line of JSON for each.

A module of its own since Triton decides when it is first imported whether it interprets.
"""

import json
import os
import sys
from collections.abc import Iterator

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F
from triton.runtime import interpreter

from sjd2_lightning.masks import Visible
from sjd2_lightning.models import invariant_kernels as kernels

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def by_element(_: object, a: object, b: object, total: object, *__: object) -> object:
    """A product of tiles whose every element is summed up in one order, as tensor cores do.

    NumPy's own product depends on the place of a row in its tile, and the interpreter multiplies the bits of
    bfloat16 as if they were integers.
    """

    def wide(handle: object) -> np.ndarray:
        if handle.dtype == tl.bfloat16:
            return (handle.data.astype(np.uint32) << 16).view(np.float32)
        return handle.data

    product = np.add.reduce(wide(a)[:, :, None] * wide(b)[None], axis=1, dtype=np.float32)
    return interpreter.TensorHandle(product + total.data, total.dtype.scalar)


interpreter.InterpreterBuilder.create_dot = by_element


def error(found: Tensor, wanted: Tensor) -> float:
    """Largest distance over the largest value wanted."""
    return ((found.double() - wanted).abs().max() / wanted.abs().max()).item()


def products(dtype: torch.dtype) -> Iterator[tuple[str, float, bool]]:
    """Of widths with one split and several, with tails everywhere; rows alone and in other places."""
    for depth, columns in ((100, 70), (1100, 40)):
        splits = kernels.num_splits(depth, columns, kernels.DEPTH_BYTES // dtype.itemsize)
        assert (splits > 1) == (depth == 1100), "both ways of storing must be seen"
        x = torch.randn(70, depth).to(dtype)
        weight, bias = (
            (torch.randn(columns + 9, depth) / depth**0.5).to(dtype),
            torch.randn(columns).to(dtype),
        )
        rows = weight.narrow(0, 4, columns)  # as the head's
        full = kernels.linear(x, rows, bias)
        wanted = F.linear(x.double(), rows.double(), bias.double())
        equal = all(
            torch.equal(kernels.linear(x[a:b], rows, bias), full[a:b]) for a, b in ((3, 4), (66, 68), (5, 37))
        )
        bare = kernels.linear(x[:2], rows, None)
        close = error(bare, wanted[:2] - bias.double())
        yield f"linear {depth}x{columns}", max(error(full, wanted), close), equal


def norms(dtype: torch.dtype) -> Iterator[tuple[str, float, bool]]:
    x, weight, bias = (torch.randn(shape).to(dtype) for shape in ((9, 100), (100,), (100,)))
    full = kernels.norm(x, weight, None, 1e-5, False)
    wanted = F.rms_norm(x.double(), (100,), weight.double(), 1e-5)
    alone = kernels.norm(x[4:5], weight, None, 1e-5, False)
    yield "rms_norm", error(full, wanted), torch.equal(alone[0], full[4])
    full = kernels.norm(x, weight, bias, 1e-5, True)
    wanted = F.layer_norm(x.double(), (100,), weight.double(), bias.double(), 1e-5)
    yield (
        "layer_norm",
        error(full, wanted),
        torch.equal(kernels.norm(x[4:5], weight, bias, 1e-5, True)[0], full[4]),
    )
    wanted = F.layer_norm(x.double(), (100,), None, None, 1e-5)
    yield "layer_norm bare", error(kernels.norm(x, None, None, 1e-5, True), wanted), True


def attentions(dtype: torch.dtype) -> Iterator[tuple[str, float, bool]]:
    """Strided keys, a tail of columns, timestep tokens, a branch; then alone, shorter, moved to the right."""
    shapes = [(96, 2, 2)] if dtype == torch.float32 else [(64, 4, 2), (128, 2, 1)]
    for size, heads, key_heads in shapes:
        batch, length, columns = 2, 5, 290
        query = torch.randn(batch, heads, length, size).to(dtype)
        keys, values = (torch.randn(batch, columns, key_heads, size).to(dtype).transpose(1, 2) for _ in "kv")
        column = torch.arange(270, 275).expand(batch, -1)
        side = torch.tensor([-1, 0, 1, -1, 2]).expand(batch, -1)
        before = torch.tensor([271, 272, 273, 260, 260]).expand(batch, -1)
        own_from = torch.tensor([270, 271, 272, 272, 273]).expand(batch, -1)
        visible = Visible(torch.tensor([3, 8]), before, own_from, column, side)
        scale = size**-0.5
        full = kernels.attention(query, keys, values, visible, scale)
        wide = (part.double() for part in (query, keys, values))
        wanted = F.scaled_dot_product_attention(*wide, visible.dense(columns), scale=scale, enable_gqa=True)
        equal = []
        # alone: with the fewest columns; with a fully masked chunk more; 40 columns to the right
        for place in (4,) if dtype == torch.float32 else (1, 4):
            one = Visible(visible.first[1:], *(bound[1:, place : place + 1] for bound in visible[1:]))
            part = (query[1:, :, place : place + 1], keys[1:], values[1:])
            short = (part[0], *(held[:, :, :275] for held in part[1:]))
            longer = (part[0], *(F.pad(held, (0, 0, 0, 300), value=9.0) for held in part[1:]))
            moved = (
                part[0],
                *(torch.cat([held[:, :, :3], held[:, :, :40], held[:, :, 3:]], 2) for held in part[1:]),
            )
            later = Visible(one.first + 40, one.before + 40, one.own_from + 40, one.column + 40, one.side)
            for given, seen in ((short, one), (longer, one), (moved, later)):
                found = kernels.attention(*given, seen, scale)
                equal.append(torch.equal(found[0, :, 0], full[1, :, place]))
        yield f"attention {size}", error(full, wanted), all(equal)


def main() -> None:
    torch.manual_seed(0)
    for name in sys.argv[1:] or DTYPES:
        for checks in (products, norms, attentions):
            for check, distance, equal in checks(DTYPES[name]):
                print(json.dumps({"check": f"{check} {name}", "error": distance, "equal": equal}))


if __name__ == "__main__":
    main()
