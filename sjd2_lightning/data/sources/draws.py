"""Random integers that are the same in every version of Python and NumPy, and on every machine."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def hashed(*name: object) -> int:
    """A number of 64 bits that depends on the name alone."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, name)).encode()).digest()[:8], "big")


class Draws:
    """A stream of random integers that depends on its name alone.

    Args:
        name: anything that prints the same everywhere, e.g. a seed and an index.
    """

    def __init__(self, *name: object) -> None:
        self._name = "/".join(map(str, name))
        self._count = 0

    def below(self, limit: int) -> int:
        """An integer from 0 to limit - 1, each equally often but for one part in 2**64 / limit."""
        self._count += 1
        return hashed(self._name, self._count) % limit

    def between(self, low: int, high: int) -> int:
        """An integer from low to high, both included."""
        return low + self.below(high - low + 1)

    def choice(self, items: Sequence[T]) -> T:
        """One of the items."""
        return items[self.below(len(items))]

    def sample(self, items: Sequence[T], count: int) -> list[T]:
        """Some different items, in random order."""
        left = list(items)
        return [left.pop(self.below(len(left))) for _ in range(count)]
