"""Wall clock and memory of a callable: the only place of this package that looks at a clock.

Source: ours. A CUDA call returns before its work is done, so the device is synchronised on both sides of
every timing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike

from sjd2_lightning.metrics.bootstrap import MetricResult, ratio_of_totals

T = TypeVar("T")


@dataclass(frozen=True)
class LatencySummary:
    """Seconds a call: median, 95th percentile and mean over `num_calls`."""

    median: float
    p95: float
    mean: float
    num_calls: int


@dataclass
class PeakMemory:
    """Highest allocation of the device inside `peak_memory`; None where it cannot be told (CPU)."""

    num_bytes: int | None = None


def timed(function: Callable[[], T], device: str | torch.device = "cpu") -> tuple[T, float]:
    """Result of one call and its seconds, the device's queue emptied before and after."""
    _synchronise(device)
    start = time.perf_counter()
    found = function()
    _synchronise(device)
    return found, time.perf_counter() - start


def warm_up(function: Callable[[], object], num_calls: int, device: str | torch.device = "cpu") -> None:
    """Calls that are not timed: caches, allocator and kernel choice settle in them."""
    for _ in range(num_calls):
        function()
    _synchronise(device)


@contextmanager
def peak_memory(device: str | torch.device = "cpu") -> Iterator[PeakMemory]:
    """Measures the highest number of bytes the CUDA allocator held inside the block.

    On the CPU the process knows only its highest point since it started, which is no property of the block:
    `num_bytes` stays None.
    """
    peak = PeakMemory()
    on_cuda = torch.device(device).type == "cuda"
    if on_cuda:
        _synchronise(device)
        torch.cuda.reset_peak_memory_stats(device)
    yield peak
    if on_cuda:
        _synchronise(device)
        peak.num_bytes = torch.cuda.max_memory_allocated(device)


@dataclass
class TimeInside:
    """Seconds spent so far in the functions that `time_inside` watches."""

    seconds: float = 0.0


@contextmanager
def time_inside(owner: object, *names: str, device: str | torch.device = "cpu") -> Iterator[TimeInside]:
    """Measures the seconds spent in some methods of an object inside the block (ours).

    The device is synchronised around every call, which slows a GPU down: a share of the wall clock of the
    block is what this is for, not a speed.

    Args:
        owner: whose methods are watched; it is as before when the block ends.
        names: of the methods; none may call another.
        device: that they run on.
    """
    spent = TimeInside()

    def watched(method: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            found, seconds = timed(lambda: method(*args, **kwargs), device)
            spent.seconds += seconds
            return found

        return call

    for name in names:
        setattr(owner, name, watched(getattr(owner, name)))
    try:
        yield spent
    finally:
        for name in names:
            delattr(owner, name)


def latency_summary(seconds: ArrayLike) -> LatencySummary:
    """Median, 95th percentile and mean of the seconds (N,) of timed calls.

    Raises:
        ValueError: no timings.
    """
    taken = np.asarray(seconds, dtype=np.float64)
    if taken.ndim != 1 or len(taken) == 0:
        raise ValueError(f"latency needs a list of seconds; got shape {taken.shape}: time at least one call")
    median, p95 = np.quantile(taken, [0.5, 0.95])
    return LatencySummary(float(median), float(p95), float(taken.mean()), len(taken))


def speedup_result(
    baseline_seconds: ArrayLike,
    method_seconds: ArrayLike,
    protocol: str = "wall clock, total of baseline / total of method, paired by prompt",
    num_resamples: int = 2000,
    seed: int = 0,
) -> MetricResult:
    """How many times faster the method ran through the same prompts, with an interval over prompts (ours).

    Args:
        baseline_seconds: (N,) seconds of each prompt, or prompt batch, by the baseline.
        method_seconds: (N,) seconds of the same prompts, in the same order, by the method.
        protocol: how they were timed.
        num_resamples: bootstrap resamples over prompts; 0 leaves the interval out.
        seed: of the resampling.

    Raises:
        ValueError: other lengths, no timings, or a timing that is not positive.
    """
    return ratio_of_totals("speedup", baseline_seconds, method_seconds, protocol, num_resamples, seed)


def _synchronise(device: str | torch.device) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
