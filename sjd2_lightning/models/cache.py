"""Keys and values of every layer, allocated once and written at positions that differ per row."""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Cache with per-row write positions; transformers' trunks call its `update`.

    Nothing is ever erased: an entry that is no longer valid is hidden by the attention mask until a later
    forward writes over it, so forgetting costs nothing (ours).

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
        shape = (batch, num_heads, max_len, head_dim)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.max_len = max_len
        self._index = torch.zeros(batch, 1, 0, 1, dtype=torch.long, device=device)
        self._start: int | None = None
        self._num_visible = max_len

    def place(self, positions: Tensor, num_visible: int | None = None, start: int | None = None) -> None:
        """Says where the next forward writes.

        Args:
            positions: (B, L) buffer positions of the tokens of the next forward.
            num_visible: the forward attends to the first so many positions; all of them by default.
            start: where the positions of every row are start, start + 1, ...: writing is then a plain copy.

        Raises:
            ValueError: if `num_visible` is longer than the cache.
        """
        if num_visible is not None and num_visible > self.max_len:
            raise ValueError(f"cache too short: {num_visible} positions needed, {self.max_len} allocated")
        self._index = positions[:, None, :, None]
        self._start = start
        self._num_visible = num_visible or self.max_len

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        """Writes the new entries, each (B, H, L, D), and returns all visible ones, (B, H, S, D)."""
        all_keys, all_values = self.keys[layer_idx], self.values[layer_idx]
        if self._start is not None:
            all_keys.narrow(2, self._start, keys.shape[2]).copy_(keys)
            all_values.narrow(2, self._start, keys.shape[2]).copy_(values)
        else:
            index = self._index.expand(keys.shape)
            all_keys.scatter_(2, index, keys)
            all_values.scatter_(2, index, values)
        return all_keys[:, :, : self._num_visible], all_values[:, :, : self._num_visible]

    def keep_rows(self, rows: Tensor) -> None:
        """Keeps only the given rows, (R,) int64: finished images leave the batch."""
        self.keys = [k.index_select(0, rows) for k in self.keys]
        self.values = [v.index_select(0, rows) for v in self.values]

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (*self.keys, *self.values))
