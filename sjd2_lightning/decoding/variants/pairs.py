"""Drafts corrected by their left neighbours, by a table of code pairs counted in training images (ours).

A pass read the law of a slot behind what its left neighbour was then. The table says roughly what the
neighbour's new code makes of that law. Replay only: there it does not matter what a draft is made of.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from sjd2_lightning.decoding.config import PairSweeps
from sjd2_lightning.decoding.rules import Scores, Slots, Verdict, known_codes


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
            counts: (K, K) counts by a and k.
            rank: R.
            prior: number of pairs counted in each row as if the left code did not matter, so that rare codes
                correct nothing.
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
                "from shards of its own image tokenizer by `sjd2 pairs`"
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
        config: the table and how it is used.
        table: (K + structural, D) embeddings by slot id, for their device.
        num_codes: K.
    """

    def __init__(self, config: PairSweeps, table: Tensor, num_codes: int) -> None:
        self.config, self.num_codes = config, num_codes
        path = config.table
        assert path is not None
        self.left, self.right = _loaded(path, Path(path).stat().st_mtime_ns, num_codes, table.device)

    def __call__(
        self, slots: Slots, verdict: Verdict, scores: Scores, settled: Bool[Tensor, "B W"]
    ) -> Tensor:
        """The next drafts (B, W), as slot ids.

        Args:
            slots: the window that the pass was fed.
            verdict: its verdict: tokens that maximise log p + g.
            scores: what the pass says.
            settled: (B, W) True = committed by this pass: the token stays.
        """
        assert slots.gumbel is not None
        tokens = verdict.tokens
        fed = known_codes(slots.tokens, slots.levels, self.num_codes)
        before = F.embedding(fed[:, :-1], self.left)
        behind, moves = (scores.log + slots.gumbel)[:, 1:], (slots.is_code & ~settled)[:, 1:]
        for _ in range(self.config.sweeps):
            now = F.embedding(tokens[:, :-1].clamp_max(self.num_codes), self.left)
            shift = now - before if self.right is None else (now - before) @ self.right
            best = torch.add(behind, shift, alpha=self.config.strength).argmax(-1)
            tokens = torch.cat([tokens[:, :1], best.where(moves, tokens[:, 1:])], dim=1)
        return tokens
