"""Drafts that agree with their left neighbours: sweeps over the window with a table of code pairs (ours).

A pass reads a slot's law behind the draft (or noise) that was fed to its left, and draws that left neighbour
anew at the same time. Nine rejected drafts in ten had a wrong left neighbour when they were drawn, and that
was all that was wrong (docs/study.md). What the neighbour's change does to a slot is known roughly from how
often codes stand side by side in training images, M[a, k] = log p(k | a to its left) - log p(k):

    draft = argmax(log p + g + strength (M[new neighbour] - M[fed neighbour])),   M[noise] = 0

All slots are corrected at once, by the neighbours of the last sweep; two sweeps nearly reach what going from
left to right gives. Drafts are guesses: replay compares them with autoregression's tokens whatever they are
made of, so images do not change. Rules that record a draft's law could not use this one.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from sjd2_lightning.code_pairs import PairTable
from sjd2_lightning.decoding.window import Slots, SlotSource


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
        return None if source.config.pairs.table is None or source.config.window == 1 else cls(source)

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
