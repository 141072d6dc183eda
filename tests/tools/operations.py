"""The tensor operations that a block runs, for tests of what is not done."""

from __future__ import annotations

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique_consecutive")


class Operations(TorchDispatchMode):
    """Names of all operations, in order, with the shapes of what they return."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, list[tuple[int, ...]]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        shapes = [tuple(leaf.shape) for leaf in tree_leaves(found) if isinstance(leaf, Tensor)]
        self.seen.append((func.overloadpacket.__name__, shapes))
        return found

    def named(self, *names: str) -> list[tuple[str, list[tuple[int, ...]]]]:
        """Those of some names."""
        return [entry for entry in self.seen if entry[0] in names]
