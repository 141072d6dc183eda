"""Bytes of the tensors that a block of code makes, on any device.

Source: ours. On CUDA the allocator's own counters say more (`efficiency.peak_memory`); the CPU has none for a
block, so the results of all tensor operations are followed until they are freed.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Follows the storage of every tensor made inside the block: `now` bytes are alive, `peak` were at most.

    What existed before the block does not count, nor does a view. What an operation needs only while it runs,
    inside its kernel, is not seen. Every operation gets slower: no timing belongs inside.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        for tensor in _tensors((args, kwargs or {})):
            self._known.add(tensor.untyped_storage())  # made before the block, or counted when it was made
        found = func(*args, **(kwargs or {}))
        for tensor in _tensors(found):
            self._count(tensor.untyped_storage())
        return found

    def _count(self, storage: Any) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        num_bytes = storage.nbytes()
        self.now += num_bytes
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, num_bytes)

    def _forget(self, num_bytes: int) -> None:
        self.now -= num_bytes


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
