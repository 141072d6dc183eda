"""Seconds spent inside some methods of an object: which share of a decoding the model takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from sjd2_lightning.metrics.efficiency import timed


@dataclass
class TimeInside:
    """Seconds spent so far in the functions that `time_inside` watches."""

    seconds: float = 0.0


@contextmanager
def time_inside(owner: object, *names: str, device: str | torch.device = "cpu") -> Iterator[TimeInside]:
    """Measures the seconds spent in some methods of an object inside the block.

    The device is synchronised around every call, which slows a GPU down: use it for shares, not for speeds.

    Args:
        owner: object whose methods are watched; unchanged when the block ends.
        names: names of the methods; none may call another.
        device: device that they run on.
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
