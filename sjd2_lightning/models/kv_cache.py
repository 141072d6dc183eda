"""Keys and values of what a trunk was fed, with write positions for each row."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class KVCache:
    """Cache with per-row write positions; transformers' trunks call its `update`.

    Nothing is ever erased: an entry that is no longer valid is hidden by the attention mask until a later
    forward writes over it, so forgetting costs nothing (ours).

    Attributes:
        keys, values: (batch, num_heads, max_len, head_dim) of each layer.

    Args:
        num_layers, batch, num_heads, max_len, head_dim: sizes of the buffers.
    """

    def __init__(
        self,
        num_layers: int,
        batch: int,
        num_heads: int,
        max_len: int,
        head_dim: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        def buffers() -> list[Tensor]:
            shape = (batch, num_heads, max_len, head_dim)
            return [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]

        self._all = buffers(), buffers()
        self.all_rows()
        self.max_len = self.num_visible = max_len
        self.entries: Tensor | None = None  # (B * H * L,) those that a forward writes, of B * H * max_len

    def place(self, positions: Tensor, num_visible: int | None = None) -> None:
        """Says where the next forward writes.

        Args:
            positions: (B, L) buffer positions of the tokens of the next forward.
            num_visible: the forward attends to the first so many positions; all of them by default.

        Raises:
            ValueError: if `num_visible` is longer than the cache.
        """
        if num_visible is not None and num_visible > self.max_len:
            raise ValueError(f"cache too short: {num_visible} positions needed, {self.max_len} allocated")
        num_rows, num_heads = self.keys[0].shape[:2]
        starts = torch.arange(num_rows * num_heads, device=positions.device) * self.max_len
        self.entries = (starts.view(num_rows, num_heads, 1) + positions[:, None]).flatten()
        self.num_visible = num_visible or self.max_len

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        """Writes the new entries, each (B, H, L, D), and returns all visible ones, (B, H, S, D).

        transformers gives its own caches more, since 5.24 by keyword; none of it is needed here.
        """
        return self.layer(layer_idx).update(keys, values)

    def layer(self, number: int) -> LayerCache:
        """Keys and values of one layer, with where the next forward writes."""
        assert self.entries is not None, "`place` comes first"
        return LayerCache(self.keys[number], self.values[number], self.entries, self.num_visible)

    def all_rows(self) -> KVCache:
        """The cache with all rows that it was made with, for another batch."""
        self.keys, self.values = map(list, self._all)
        return self

    def keep_rows(self, rows: Tensor) -> None:
        """Keeps the given rows, (R,) int64, at the front of the same memory: finished images leave."""
        for buffers in (self.keys, self.values):
            for number, buffer in enumerate(buffers):
                buffer[: len(rows)] = buffer[rows]
                buffers[number] = buffer[: len(rows)]

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (*self.keys, *self.values))


class LayerCache(NamedTuple):
    """Keys and values of one layer, and where they are written; what a layer of transformers takes as cache.

    Attributes:
        keys, values: (B, H, max_len, D) buffers.
        entries: (B * H * L,) int64, those of the B * H * max_len that are written next.
        num_visible: number of columns that are returned.
    """

    keys: Tensor
    values: Tensor
    entries: Tensor
    num_visible: int

    def update(self, keys: Tensor, values: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Writes the new entries, each (B, H, L, D), and returns all visible ones, (B, H, S, D)."""
        for held, new in ((self.keys, keys), (self.values, values)):
            held.view(-1, held.shape[-1]).index_copy_(0, self.entries, new.reshape(-1, new.shape[-1]))
        return self.keys[:, :, : self.num_visible], self.values[:, :, : self.num_visible]
