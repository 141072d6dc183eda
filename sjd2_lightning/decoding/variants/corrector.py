"""Drafts corrected by a small network, which reads the hidden state behind a slot's law (ours).

The network is `models.draft_corrector`. Replay only: there it does not matter what a draft is made of.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch
from jaxtyping import Bool
from torch import Tensor
from torch.nn import functional as F

from sjd2_lightning.decoding.config import OWN, Correction
from sjd2_lightning.decoding.law import guided
from sjd2_lightning.decoding.rules import Scores, Slots, Verdict, known_codes
from sjd2_lightning.models.draft_corrector import DraftCorrector, code_rows


@lru_cache(maxsize=4)
def _loaded(path: str, changed: int, hidden_size: int, device: torch.device) -> DraftCorrector:
    return DraftCorrector.load(path, hidden_size).to(device)


class Corrected:
    """Corrects the drafts of a window.

    Args:
        config: the network and how it is used.
        temperature: that of the law.
        table: (K + structural, D) embeddings by slot id, for their device.
        num_codes: K.
        own: the network that the model holds itself, for weights "own".
    """

    def __init__(
        self,
        config: Correction,
        temperature: float,
        table: Tensor,
        num_codes: int,
        own: DraftCorrector | None = None,
    ) -> None:
        self.config, self.num_codes = config, num_codes
        path = config.weights
        if path == OWN:
            assert own is not None
            self.network = own
        else:
            assert path is not None
            self.network = _loaded(path, Path(path).stat().st_mtime_ns, table.shape[1], table.device)
        rows = code_rows(table, num_codes).to(self.network.out.weight)
        self.old, new = self.network.old(rows), self.network.new(rows)  # (K + 1, U)
        self.new = F.pad(new, (0, 0, 0, len(table) - len(new)))  # (K + structural, U), which are not known
        # the change of code k is e_k . W u: the codes' part of it, (K, U), is made once
        self.effect = rows[:-1] @ self.network.out.weight / temperature

    def __call__(
        self, slots: Slots, verdict: Verdict, scores: Scores, settled: Bool[Tensor, "B W"]
    ) -> Tensor:
        """The next drafts (B, W), as slot ids; see `method.Redraft`."""
        read, tokens = scores.read, verdict.tokens.clone()
        assert slots.gumbel is not None
        assert read is not None
        left, drafts = tokens[:, :-1], tokens[:, 1:]  # views: a round reads what the one before wrote
        moves = (slots.is_code & ~settled)[:, 1:]
        # 1. the best codes of each slot under its own noise, and what the slot is known by
        best = (scores.log + slots.gumbel)[:, 1:]  # (B, W - 1, K)
        codes = effect = None
        if 0 < self.config.candidates < self.num_codes:
            best, codes = best.topk(self.config.candidates, dim=-1, sorted=False)  # (B, W - 1, n)
            effect = F.embedding(codes, self.effect)  # (B, W - 1, n, U)
        old = F.embedding(known_codes(slots.tokens, slots.levels, self.num_codes)[:, :-1], self.old)
        hidden = read.hidden[:, 1:].unflatten(0, (-1, len(old)))
        known = self.network.known(hidden, old)  # (C, B, W - 1, U)
        scale = read.scale[:, 1:] if isinstance(read.scale, Tensor) else read.scale
        for _ in range(self.config.rounds):
            # 2. the neighbour's new token changes the law, on both sides of guidance
            units = guided(F.gelu(known + F.embedding(left, self.new)).flatten(0, 1), scale).to(self.effect)
            change = units @ self.effect.T if effect is None else _products(effect, units)
            # 3. and with it which of the codes is the best
            chosen = (best + change).argmax(-1, keepdim=True)
            found = chosen if codes is None else codes.gather(-1, chosen)
            drafts.copy_(found.squeeze(-1).where(moves, drafts))
        return tokens


def _products(effect: Tensor, units: Tensor) -> Tensor:
    """(B, W, n) of (B, W, n, U) and (B, W, U); on a CPU six times faster than by `@`."""
    return torch.einsum("bwnu,bwu->bwn", effect, units)
