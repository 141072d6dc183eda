"""Wall clock and device memory of a callable.

A CUDA call returns before its work is done, so the device is synchronised on both sides of every timing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch

T = TypeVar("T")


@dataclass
class PeakMemory:
    """Most bytes the device held inside `peak_memory`; None where that cannot be measured (CPU)."""

    num_bytes: int | None = None


def timed(function: Callable[[], T], device: str | torch.device = "cpu") -> tuple[T, float]:
    """Result of one call and its seconds, with the device synchronised before and after."""
    _synchronise(device)
    start = time.perf_counter()
    found = function()
    _synchronise(device)
    return found, time.perf_counter() - start


@contextmanager
def peak_memory(device: str | torch.device = "cpu") -> Iterator[PeakMemory]:
    """Measures the most bytes that the CUDA allocator held inside the block.

    On the CPU `num_bytes` stays None: a process knows only its peak since it started, not that of a block.
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


def _synchronise(device: str | torch.device) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
