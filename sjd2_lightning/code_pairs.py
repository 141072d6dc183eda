"""How much a code's left neighbour says of it: a table counted in training images (ours)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor


class PairTable(NamedTuple):
    """M[a, k] = log p(k | a to its left) - log p(k), as `left` @ `right`.T.

    Attributes:
        left: (K, R) float32.
        right: (K, R) float32.
    """

    left: Tensor
    right: Tensor

    @classmethod
    def of_counts(cls, counts: Float[Tensor, "K K"], rank: int, prior: float = 20.0) -> PairTable:
        """Factors of rank R = `rank` (at most K) of M, from how often code k stands right of code a.

        Args:
            counts: (K, K) by a and k.
            prior: pairs drawn as if the left code did not matter that are counted in each row, so that rare
                codes correct nothing.
        """
        single = counts.sum(0).double() + 0.5
        single /= single.sum()
        pairs = (counts + prior * single) / (counts.sum(1, keepdim=True) + prior)
        left, sizes, right = torch.linalg.svd((pairs / single).log(), full_matrices=False)
        rank = min(rank, len(sizes))
        return cls((left[:, :rank] * sizes[:rank]).float().contiguous(), right[:rank].T.float().contiguous())

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file, in half precision."""
        save_file({name: factor.half() for name, factor in self._asdict().items()}, path)

    @classmethod
    def load(cls, path: str | Path, num_codes: int) -> PairTable:
        """Reads a file of `save`.

        Raises:
            ValueError: the file is something else, or of another number of codes.
        """
        try:
            found = cls(**{name: factor.float() for name, factor in load_file(path).items()})
        except (OSError, SafetensorError, TypeError) as error:
            raise ValueError(f"pairs.table: {path} is no table of code pairs: {error}") from None
        if len(found.left) != num_codes or found.left.shape != found.right.shape:
            raise ValueError(
                f"pairs.table: {path} is of {len(found.left)} codes, the model has {num_codes}; make one "
                "from shards of its own image tokenizer by python -m sjd2_lightning.data.pairs"
            )
        return found


@dataclass(frozen=True)
class PairSweeps:
    """How drafts are corrected.

    Attributes:
        table: file of `PairTable.save`; None = drafts are left alone.
        strength: share of the table's correction, > 0.
        sweeps: over the window, >= 1.
    """

    table: str | None = None
    strength: float = 0.7
    sweeps: int = 2

    def problems(self) -> list[str]:
        """What is wrong with the values, a sentence each."""
        found = []
        if self.strength <= 0:
            found.append(
                f"pairs.strength must be > 0 (without a table nothing is corrected), got {self.strength}"
            )
        if self.sweeps < 1:
            found.append(
                f"pairs.sweeps must be >= 1 (without a table nothing is corrected), got {self.sweeps}"
            )
        if self.table is not None and not Path(self.table).is_file():
            found.append(
                f"pairs.table: there is no file {self.table}; make it by python -m sjd2_lightning.data.pairs"
            )
        return found
