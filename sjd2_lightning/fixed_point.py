"""A causal fixed point x_j = f_j(x_<j), solved by passes: Jacobi, GS-Jacobi, a moving window, the loop.

Column 0 is given, and the value of a column depends on columns to its left alone. One *pass* is fed guesses
of columns and gives new values of the columns behind them; what was computed from final values is final. So n
passes make n columns final, whatever the guess (GS-Jacobi, arXiv 2505.12849).

Random choices are no part of this: tokens that are drawn go through `decoding.loop`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sjd2_lightning.run.values import Natural, Within, wrong_values

# Iterates beyond it begin again at 0: they are wrong, and their squares would overflow in layers, where what
# is not finite reaches columns that it is hidden from, since 0 times infinity is no number.
_LARGEST = 1e15


@dataclass(frozen=True)
class DecodeStats:
    """The trace of passes of a batch, on the CPU: what decoding counts, and every fixed point.

    Attributes:
        committed: (iterations, B) slots that each forward pass committed; 0 once a row is done.
    """

    committed: Tensor

    @property
    def settled_iteration(self) -> Tensor:
        """(B, N) forward pass (from 0) that committed each slot; -1 right of an image shorter than others."""
        passes = torch.arange(len(self.committed))
        rows = [passes.repeat_interleave(row) for row in self.committed.T]
        return pad_sequence(rows, batch_first=True, padding_value=-1)

    @property
    def nfe(self) -> Tensor:
        """(B,) forward passes of each image, prefill excluded."""
        return (self.committed > 0).sum(0)

    @property
    def num_generated(self) -> Tensor:
        """(B,) slots of each image."""
        return self.committed.sum(0)

    @property
    def step_compression(self) -> Tensor:
        """(B,) generated tokens a forward pass."""
        return self.num_generated / self.nfe

    @property
    def accepted(self) -> list[list[int]]:
        """For each image, the slots that each of its passes committed."""
        return [row[row > 0].tolist() for row in self.committed.T]


class CausalMap(Protocol):
    """The right side of x_j = f_j(x_<j) over `length` columns, with a cache of what it was fed."""

    @property
    def length(self) -> int:
        """T, number of columns, the given one included."""
        ...

    def values(self, first: int, fed: Tensor) -> Tensor:
        """(B, L, ...) new values of columns first + 1 .. first + L.

        Args:
            first: the first column that is fed; what lies left of it is read from the cache.
            fed: (B, L, ...) values of columns first .. first + L - 1, which replace their entries there.
        """
        ...


@dataclass(frozen=True)
class Schedule:
    """Which columns a pass is fed, and when a column is final.

    Attributes:
        window: columns a pass is fed; 1 is the sequential loop, 0 the whole segment, which is Jacobi.
        segments: pieces that are solved one after another (GS-Jacobi); the last one may be shorter.
        tolerance: largest change of any number of a column that counts as agreement.
        max_passes: most passes of a segment, what stands then is taken; 0 is no limit.
        guess: what columns hold before their first pass: `given`, or `zero` behind the given column.
    """

    window: Natural = 0
    segments: Annotated[int, Within(1)] = 1
    tolerance: Annotated[float, Within(0)] = 1e-5
    max_passes: Natural = 0
    guess: Literal["given", "zero"] = "given"

    def problems(self) -> list[str]:
        """What is wrong with the values, a line each, starting with the key."""
        return wrong_values(self)

    def ends(self, length: int) -> list[int]:
        """Last column of each segment; columns 1 .. length - 1 are divided."""
        size = -(-(length - 1) // self.segments)
        return [min(end, length - 1) for end in range(size, length - 1 + size, size)]


@dataclass(frozen=True)
class Solution:
    """A fixed point and how it was found.

    Attributes:
        values: (B, T, ...) all columns.
        stats: columns behind the given one that each pass made final, the same in all rows.
        residuals: for each pass (B,) the largest change of a number that the pass was fed a guess of.
        num_nonfinite: number of iterates that were not finite, or beyond 1e15, and began again at 0.
    """

    values: Tensor
    stats: DecodeStats
    residuals: tuple[Tensor, ...]
    num_nonfinite: int


def solve(causal: CausalMap, guess: Tensor, schedule: Schedule) -> Solution:
    """The fixed point of a causal map.

    A column that is kept was fed, and differs from the map's value by less than the tolerance, unless
    `max_passes` cut its segment short. Rows move on together, by the slowest; agreement is judged in each.

    Args:
        causal: the map, with an empty cache.
        guess: (B, T, ...) float; column 0 is final.
        schedule: which columns are fed.

    Raises:
        ValueError: the fixed point itself is not finite in a column, which is named.
    """
    usable = guess.abs() < _LARGEST
    usable[:, 1:] &= schedule.guess == "given"
    x = torch.where(usable, guess, 0)
    # columns up to `head` are final; of those before `cached` the cache holds what they are
    head = cached = num_nonfinite = 0
    counts: list[int] = []
    residuals: list[Tensor] = []
    for end in schedule.ends(causal.length):
        num_passes = 0
        while head < end:
            # 1. one pass over the window; columns that a cut left behind are fed again in front of it
            last = min(head + schedule.window, end) if schedule.window else end
            new = causal.values(cached, x[:, cached:last])[:, head - cached :]
            num_passes += 1
            finite = new.abs() < _LARGEST
            if not finite[:, 0].all():
                raise ValueError(f"column {head + 1} of the fixed point is not finite")
            # 2. columns head + 2 .. last were judged on what they were fed to their left
            new = torch.where(finite, new, 0)
            num_nonfinite += int((~finite).sum())
            change = (new - x[:, head + 1 : last + 1]).abs().flatten(2).amax(2)
            # 3. the leading run that agrees is final as it was fed, and the column behind it as it is now
            agrees = (change[:, : last - head - 1] <= schedule.tolerance).all(0)
            run = int(agrees.cumprod(0).sum())
            x[:, head + 1 + run : last + 1] = new[:, run:]
            cut = num_passes == schedule.max_passes
            cached = head + run + 1
            counts.append(end - head if cut else run + 1)
            head += counts[-1]
            residuals.append(change.amax(1))
    stats = DecodeStats(torch.tensor(counts)[:, None].expand(-1, len(x)))
    return Solution(x, stats, tuple(residuals), num_nonfinite)


def unroll(causal: CausalMap, guess: Tensor, num_passes: int) -> Tensor:
    """(B, T, ...) what passes over all columns make of a guess; gradients flow through all of them.

    Args:
        causal: the map; where gradients are wanted, one that writes nothing in place.
        guess: (B, T, ...); column 0 is final.
        num_passes: number of passes.
    """
    x = guess
    for _ in range(num_passes):
        x = torch.cat([x[:, :1], causal.values(0, x[:, :-1])], dim=1)
    return x


def follow(causal: CausalMap, guess: Tensor) -> Tensor:
    """(B, T, ...) the loop's values, one column at a time; gradients flow through all of them.

    Args:
        causal: the map; where gradients are wanted, one that writes nothing in place.
        guess: (B, 1 or more, ...); of it the given column 0 alone is read.
    """
    columns = [guess[:, :1]]
    for first in range(causal.length - 1):
        columns.append(causal.values(first, columns[-1]))
    return torch.cat(columns, dim=1)
