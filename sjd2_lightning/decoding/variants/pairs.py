"""How much a code's left neighbour says of it: a table counted in training images (ours)."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from sjd2_lightning.decoding.window import Slots, SlotSource


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
                "from shards of its own image tokenizer by python -m sjd2_lightning.cli.pairs"
            )
        return found


@lru_cache(maxsize=4)
def _loaded(path: str, changed: int, num_codes: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
    left, right = PairTable.load(path, num_codes)
    left = F.pad(left, (0, 0, 0, 1))  # of code K, noise, nothing is known: zeros
    if right.shape[1] >= num_codes:  # of full rank the table itself is no larger, and needs no product
        return (left @ right.T).to(device), None
    return left.to(device), right.T.contiguous().to(device)


class Sweeper:
    """Corrects the drafts of a window.

    Args:
        source: of the slots; holds the method, which has a table.
    """

    def __init__(self, source: SlotSource) -> None:
        self.config, self.num_codes = source.config.pairs, source.num_codes
        path = self.config.table
        assert path is not None
        changed = Path(path).stat().st_mtime_ns
        self.left, self.right = _loaded(path, changed, self.num_codes, source.table.device)

    @classmethod
    def of(cls, source: SlotSource) -> Sweeper | None:
        """The sweeper of a method; None where drafts are left alone."""
        return None if source.config.pairs.table is None or source.config.size == 1 else cls(source)

    def __call__(
        self,
        slots: Slots,
        tokens: Int[Tensor, "B W"],
        scores: Float[Tensor, "B W K"],
        settled: Bool[Tensor, "B W"],
    ) -> Int[Tensor, "B W"]:
        """Drafts (B, W), as slot ids.

        Args:
            slots: the window that the pass was fed.
            tokens: (B, W) slot ids, the best of log p + g.
            scores: (B, W, K) unnormalised log p.
            settled: (B, W) True = committed by this pass: the token stays.
        """
        assert slots.gumbel is not None
        fed = slots.tokens.clamp_max(self.num_codes)  # of structural slots nothing is known either
        if slots.levels is not None:
            fed = fed.masked_fill(slots.levels > 0, self.num_codes)
        before = F.embedding(fed[:, :-1], self.left)
        behind, moves = (scores + slots.gumbel)[:, 1:], (slots.is_code & ~settled)[:, 1:]
        for _ in range(self.config.sweeps):
            now = F.embedding(tokens[:, :-1].clamp_max(self.num_codes), self.left)
            shift = now - before if self.right is None else (now - before) @ self.right
            best = torch.add(behind, shift, alpha=self.config.strength).argmax(-1)
            tokens = torch.cat([tokens[:, :1], best.where(moves, tokens[:, 1:])], dim=1)
        return tokens
