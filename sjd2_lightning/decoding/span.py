"""A run of columns that starts somewhere else in each row, read and written without needless copies."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Span:
    """Columns `start .. start + length - 1` of each row of a batch.

    Where all rows start alike, as they do at batch 1, it is a slice: reading gives a view. Otherwise it is
    an index. The host knows the starts, so that this choice waits for no device.

    Args:
        starts: of the rows, on the host.
        start: (B,) the same numbers on the device.
        length: number of columns.
        columns: (N,) the numbers 0 .. N - 1 on the device; N exceeds every column read.
    """

    def __init__(self, starts: Sequence[int], start: Tensor, length: int, columns: Tensor) -> None:
        self.length = length
        self.least, self.most = min(starts), max(starts)
        self.is_slice = self.least == self.most >= 0
        if self.is_slice:
            self.index = columns[self.least : self.least + length].expand(len(starts), -1)
        else:
            self.index = start[:, None] + columns[:length]

    def read(self, buffer: Tensor) -> Tensor:
        """(B, length, ...) columns of a buffer (B, N, ...), a view where the span is a slice.

        Columns left of the buffer are read as its first one: callers put something else there.
        """
        if self.is_slice:
            return buffer.narrow(1, self.least, self.length)
        index = self.index if self.least >= 0 else self.index.clamp_min(0)
        return buffer[_rows(buffer), index]

    def write(self, buffer: Tensor, values: Tensor) -> None:
        """Puts values (B, length, ...) into a buffer (B, N, ...)."""
        if self.is_slice:
            buffer.narrow(1, self.least, self.length).copy_(values)
        else:
            buffer[_rows(buffer), self.index] = values


def _rows(buffer: Tensor) -> Tensor:
    return torch.arange(len(buffer), device=buffer.device)[:, None]
