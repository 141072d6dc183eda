"""Triton kernels of `models.invariant`: every sum has one order, whatever else a launch computes.

Tiles, splits and chunks depend on the width of a layer, never on the number of rows, queries or key columns;
these numbers are not specialized on, so all of them run the same compiled code. Nothing is tuned at run time
and nothing waits for the device: launches can be captured in a CUDA graph and traced by torch.compile.

Source: ours. Seen so far in Triton's interpreter only, whose product of tiles the tests replace; compiled for
compute capability 9.0 (products by wgmma, attention by mma) and not yet run on a device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sjd2_lightning.masks import Visible

# 64 rows are one tile of Hopper's wgmma and two passes of a window of 32: fewer would read weights again,
# more would multiply padding. One tile for one row and for a thousand: instructions may round
# differently.
ROWS = 64
COLUMNS = 64
DEPTH_BYTES = 256  # of one row of a tile's factors
# Enough programs to keep the memory of 132 multiprocessors busy; a constant, so that devices agree.
PROGRAMS = 256
MOST_SPLITS = 16
ELEMENTS = 1024  # of one program that adds splits up

# Queries and keys of one product of attention, by bytes of a number: float32 has no tensor cores, and fewer
# registers to spare.
TILE = {2: (32, 64), 4: (16, 32)}
CHUNK = 256  # key columns of one program
LOG2_E = 1.4426950408889634


# fmt: off
@triton.jit(do_not_specialize=["num_rows"])
def _multiply(
    x, weight, bias, out, num_rows, num_columns, depth, weight_stride, depth_a_split,
    WHOLE: tl.constexpr, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """One tile of x (rows, depth) times weight (columns, depth) transposed, over one split of the depth."""
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    columns = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
    split = tl.program_id(2)
    low = split * depth_a_split
    high = tl.minimum(low + depth_a_split, depth)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(low, high, DEPTH):
        inner = start + tl.arange(0, DEPTH)
        inside = inner < high
        left = tl.load(
            x + rows[:, None] * depth + inner[None, :],
            mask=(rows < num_rows)[:, None] & inside[None, :],
            other=0.0,
        )
        right = tl.load(
            weight + columns[None, :] * weight_stride + inner[:, None],
            mask=(columns < num_columns)[None, :] & inside[:, None],
            other=0.0,
        )
        total = tl.dot(left, right, total, input_precision="ieee")
    if HAS_BIAS:
        shift = tl.load(bias + columns, mask=columns < num_columns, other=0.0).to(tl.float32)
        total += shift[None, :]
    if not WHOLE:
        out += split.to(tl.int64) * num_rows * num_columns
    place = out + rows[:, None] * num_columns + columns[None, :]
    valid = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    tl.store(place, total.to(out.dtype.element_ty), mask=valid)
# fmt: on


@triton.jit(do_not_specialize=["num_rows"])
def _add_splits(
    parts,
    bias,
    out,
    num_rows,
    num_columns,
    SPLITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    """Sum of the splits of a product, first to last, and the bias."""
    places = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    size = tl.cast(num_rows, tl.int64) * num_columns
    total = tl.load(parts + places, mask=places < size, other=0.0)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(parts + split * size + places, mask=places < size, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias + places % num_columns).to(tl.float32)
    tl.store(out + places, total.to(out.dtype.element_ty), mask=places < size)


def num_splits(depth: int, num_columns: int, tile_depth: int) -> int:
    """Splits of the depth of a product, a power of two: enough programs for one tile of rows.

    Args:
        depth: K, length of the sum of each element.
        num_columns: N, columns of the product.
        tile_depth: depth of one tile; a split has at least two.
    """
    splits = 1
    while (
        splits < MOST_SPLITS
        and triton.cdiv(num_columns, COLUMNS) * splits < PROGRAMS
        and depth >= 4 * splits * tile_depth
    ):
        splits *= 2
    return splits


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(M, N) of x (M, K), weight (N, K) and bias (N,); sums in float32, output in the type of x."""
    num_rows, depth = x.shape
    num_columns = len(weight)
    out = x.new_empty(num_rows, num_columns)
    tile_depth = DEPTH_BYTES // x.element_size()
    splits = num_splits(depth, num_columns, tile_depth)
    whole = splits == 1
    parts = out if whole else x.new_empty((splits, num_rows, num_columns), dtype=torch.float32)
    # last: tiles of the same columns run side by side, and their weights come from memory once
    grid = (triton.cdiv(num_rows, ROWS), triton.cdiv(num_columns, COLUMNS), splits)
    has_bias = bias is not None
    shift = x if bias is None else bias
    # fmt: off
    _multiply[grid](
        x.contiguous(), weight, shift, parts, num_rows, num_columns, depth, weight.stride(0),
        triton.cdiv(triton.cdiv(depth, splits), tile_depth) * tile_depth, WHOLE=whole,
        HAS_BIAS=whole and has_bias, ROWS=ROWS, COLUMNS=COLUMNS, DEPTH=tile_depth, num_warps=4,
        num_stages=4,
    )
    # fmt: on
    if not whole:
        _add_splits[(triton.cdiv(out.numel(), ELEMENTS),)](
            parts,
            shift,
            out,
            num_rows,
            num_columns,
            SPLITS=splits,
            HAS_BIAS=has_bias,
            ELEMENTS=ELEMENTS,
            num_warps=4,
        )
    return out


@triton.jit
def _normalize(
    x,
    weight,
    bias,
    out,
    width,
    eps,
    CENTRED: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One row of a layer norm (centred) or an RMS norm, which rounds before the weight as in Llama."""
    row = tl.program_id(0).to(tl.int64)
    places = tl.arange(0, WIDTH)
    inside = places < width
    values = tl.load(x + row * width + places, mask=inside, other=0.0).to(tl.float32)
    if CENTRED:
        values = tl.where(inside, values - tl.sum(values, 0) / width, 0.0)
    values = values * (1.0 / tl.sqrt_rn(tl.sum(values * values, 0) / width + eps))
    if not CENTRED:
        values = values.to(out.dtype.element_ty).to(tl.float32)
    if HAS_WEIGHT:
        values = values * tl.load(weight + places, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        values = values + tl.load(bias + places, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + places, values.to(out.dtype.element_ty), mask=inside)


def norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, centred: bool) -> Tensor:
    """Layer norm (centred) or RMS norm of the rows of x (M, K), a program a row."""
    x = x.contiguous()
    out = torch.empty_like(x)
    width = triton.next_power_of_2(x.shape[1])
    _normalize[(len(x),)](
        x,
        x if weight is None else weight,
        x if bias is None else bias,
        out,
        x.shape[1],
        eps,
        CENTRED=centred,
        HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None,
        WIDTH=width,
        num_warps=min(max(width // 512, 1), 8),
    )
    return out


@triton.jit
def _meets(start, stop, low, high, own_low, own_high, alone):
    """Which queries see a column of start <= s < stop; bounds as those of `Visible`."""
    context = tl.maximum(low, start) < tl.minimum(high, stop)
    own = tl.maximum(own_low, start) <= tl.minimum(own_high, stop - 1)
    return context | own | ((alone >= start) & (alone < stop) & (alone >= 0))


# fmt: off
@triton.jit(do_not_specialize=["length", "num_columns", "num_heads", "batch_heads_length"])
def _attend(
    query, keys, values, first, before, own_from, column, side, maxima, sums, parts, length,
    num_columns, num_heads, group, batch_heads_length, scale, query_batch, query_head, query_place,
    key_batch, key_head, key_place, value_batch, value_head, value_place, SIZE: tl.constexpr,
    WIDTH: tl.constexpr, QUERIES: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):
    """Attention of a tile of queries to one chunk of keys: maximum, sum of powers, weighted values.

    A tile holds queries of all heads that share a key head, so keys are read once for a group.
    """
    chunk = tl.program_id(1)
    which = tl.program_id(2)
    row = (which // (num_heads // group)).to(tl.int64)
    key_of = (which % (num_heads // group)).to(tl.int64)
    spots = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    valid = spots < length * group
    place = (spots // group).to(tl.int64)
    head = key_of * group + spots % group
    dims = tl.arange(0, WIDTH)
    within = dims < SIZE

    bound = row * length + place
    low = tl.load(first + row).to(tl.int32)
    high = tl.load(before + bound, mask=valid, other=0).to(tl.int32)
    own_low = tl.load(own_from + bound, mask=valid, other=1).to(tl.int32)
    own_high = tl.load(column + bound, mask=valid, other=0).to(tl.int32)
    alone = tl.load(side + bound, mask=valid, other=-1).to(tl.int32)

    # chunks are counted from the row's first column, so a longer neighbour in the batch moves none
    start = low % CHUNK - CHUNK + chunk * CHUNK
    some = _meets(start, start + CHUNK, low, high, own_low, own_high, alone)

    best = tl.full((QUERIES,), -float("inf"), dtype=tl.float32)
    total = tl.zeros((QUERIES,), dtype=tl.float32)
    mixed = tl.zeros((QUERIES, WIDTH), dtype=tl.float32)
    if tl.max((some & valid).to(tl.int32), 0) > 0:
        own = row * query_batch + head[:, None] * query_head + place[:, None] * query_place
        asked = tl.load(query + own + dims[None, :], mask=valid[:, None] & within[None, :], other=0.0)
        keys += row * key_batch + key_of * key_head
        values += row * value_batch + key_of * value_head
        for offset in range(0, CHUNK, BLOCK):
            spot = start + offset + tl.arange(0, BLOCK)
            there = (spot >= 0) & (spot < num_columns)
            far = spot.to(tl.int64)
            one = tl.load(
                keys + far[None, :] * key_place + dims[:, None],
                mask=there[None, :] & within[:, None],
                other=0.0,
            )
            scores = tl.dot(asked, one, input_precision="ieee") * scale
            at = spot[None, :]
            seen = (at >= low) & (at < high[:, None])
            seen = seen | ((at >= own_low[:, None]) & (at <= own_high[:, None])) | (at == alone[:, None])
            seen = seen & there[None, :]
            scores = tl.where(seen, scores, -float("inf"))
            higher = tl.maximum(best, tl.max(scores, 1))
            base = tl.where(higher == -float("inf"), 0.0, higher)
            power = tl.exp2(scores - base[:, None])
            fade = tl.exp2(best - base)
            told = tl.load(
                values + far[:, None] * value_place + dims[None, :],
                mask=there[:, None] & within[None, :],
                other=0.0,
            )
            total = total * fade + tl.sum(power, 1)
            mixed = mixed * fade[:, None]
            mixed = tl.dot(power.to(told.dtype), told, mixed, input_precision="ieee")
            best = higher
    line = tl.cast(chunk, tl.int64) * batch_heads_length + (row * num_heads + head) * length + place
    tl.store(maxima + line, best, mask=valid)
    tl.store(sums + line, total, mask=valid)
    tl.store(
        parts + line[:, None] * SIZE + dims[None, :],
        mixed,
        mask=(valid & (total > 0))[:, None] & within[None, :],
    )
# fmt: on


@triton.jit(do_not_specialize=["num_chunks", "num_heads", "length", "batch_heads_length"])
def _combine(
    maxima,
    sums,
    parts,
    out,
    num_chunks,
    num_heads,
    length,
    batch_heads_length,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One query's chunks, first to last; a chunk without a visible column adds exact zeros."""
    line = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, WIDTH)
    best = tl.load(maxima + line)
    for chunk in range(1, num_chunks):
        best = tl.maximum(best, tl.load(maxima + tl.cast(chunk, tl.int64) * batch_heads_length + line))
    total = tl.sum(tl.zeros((WIDTH,), dtype=tl.float32), 0)
    mixed = tl.zeros((WIDTH,), dtype=tl.float32)
    for chunk in range(num_chunks):
        spot = tl.cast(chunk, tl.int64) * batch_heads_length + line
        weight = tl.exp2(tl.load(maxima + spot) - best)
        part = tl.load(sums + spot)
        total += weight * part
        written = tl.where(part > 0, SIZE, 0)  # what was not computed was not written either
        mixed += weight * tl.load(parts + spot * SIZE + dims, mask=dims < written, other=0.0)
    row = line // (num_heads * length)
    head = line // length % num_heads
    place = (row * length + line % length) * num_heads + head
    tl.store(out + place * SIZE + dims, (mixed / total).to(out.dtype.element_ty), mask=dims < SIZE)


def attention(query: Tensor, keys: Tensor, values: Tensor, visible: Visible, scale: float) -> Tensor:
    """(B, H, L, D), a transposed view of (B, L, H, D); arguments as `models.invariant.attention`."""
    batch, heads, length, size = query.shape
    key_heads, num_columns = keys.shape[1:3]
    group = heads // key_heads
    width = max(triton.next_power_of_2(size), 16)
    # one more than the columns fill, since chunks start at a row's first column
    num_chunks = triton.cdiv(num_columns, CHUNK) + 1
    maxima, sums = query.new_empty((2, num_chunks, batch, heads, length), dtype=torch.float32)
    parts = query.new_empty((num_chunks, batch, heads, length, size), dtype=torch.float32)
    out = query.new_empty(batch, length, heads, size)
    lines = batch * heads * length
    queries, block = TILE[query.element_size()]
    # fmt: off
    _attend[(triton.cdiv(length * group, queries), num_chunks, batch * key_heads)](
        query, keys, values, *visible.filled(), maxima, sums, parts, length,
        num_columns, heads, group, lines, scale * LOG2_E, *query.stride()[:3], *keys.stride()[:3],
        *values.stride()[:3], SIZE=size, WIDTH=width, QUERIES=queries, BLOCK=block, CHUNK=CHUNK,
        num_warps=4, num_stages=2,
    )
    # fmt: on
    _combine[(lines,)](
        maxima,
        sums,
        parts,
        out,
        num_chunks,
        heads,
        length,
        lines,
        SIZE=size,
        WIDTH=width,
        num_warps=1,
    )
    return out.transpose(1, 2)
