"""Drafts corrected by their neighbours to the left and one row up, by a small network (ours).

The network is `models.draft_corrector`. Replay only: there it does not matter what a draft is made of.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch
from jaxtyping import Bool
from torch import Tensor
from torch.nn import functional as F

from sjd2_lightning.decoding.config import OWN, Correction
from sjd2_lightning.decoding.rules import Scores, Slots, Verdict, known_codes
from sjd2_lightning.decoding.start import SlotSource
from sjd2_lightning.decoding.state import State
from sjd2_lightning.decoding.variants.first_drafts import upper_slots
from sjd2_lightning.decoding.window import OnEntry
from sjd2_lightning.models.backbone import ImageLayout
from sjd2_lightning.models.draft_corrector import DraftCorrector, code_rows


@lru_cache(maxsize=4)
def _loaded(path: str, changed: int, hidden_size: int, device: torch.device) -> DraftCorrector:
    return DraftCorrector.load(path, hidden_size).to(device)


class RowUp(OnEntry):
    """The state says which slot is one row up."""

    def start(self, source: SlotSource, layouts: Sequence[ImageLayout], state: State) -> State:
        return replace(state, upper=upper_slots(layouts, state))


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
            network = own
        else:
            assert path is not None
            network = _loaded(path, Path(path).stat().st_mtime_ns, table.shape[1], table.device)
        rows = code_rows(table, num_codes).to(network.out.weight)
        self.said_left, self.said_upper = (said.float() for said in network.said(rows))  # (K + 1, U)
        # code k gains e_k . W u by units u: the codes' part of it, (U, K), is made once
        self.effect = (rows[:-1] @ network.out.weight / temperature).float().T.contiguous()

    def __call__(
        self, slots: Slots, verdict: Verdict, scores: Scores, settled: Bool[Tensor, "B W"]
    ) -> Tensor:
        """The next drafts (B, W), as slot ids; see `method.Redraft`."""
        assert slots.gumbel is not None
        tokens = verdict.tokens.clone()
        drafts = tokens[:, 1:]  # a view: a round reads what the one before wrote
        moves = (slots.is_code & ~settled)[:, 1:]
        best = (scores.log[:, 1:] + slots.gumbel[:, 1:]).flatten(0, 1)  # (B * (W - 1), K)
        changed = torch.empty_like(best)
        upper = None if slots.upper is None else slots.upper[:, 1:]
        # 1. what the neighbours said that each law was read behind
        before = self._said(known_codes(slots.tokens, slots.levels, self.num_codes), upper)
        for _ in range(self.config.rounds):
            # 2. what they say now, and with it the best of the codes under the slot's own noise
            units = self._said(tokens.clamp_max(self.num_codes), upper) - before
            found = torch.addmm(best, units.flatten(0, 1), self.effect, out=changed).argmax(-1)
            drafts.copy_(found.view_as(drafts).where(moves, drafts))
        return tokens

    def _said(self, codes: Tensor, upper: Tensor | None) -> Tensor:
        """(B, W - 1, U) what codes (B, W) of the window say to the slots behind its first."""
        said = F.embedding(codes[:, :-1], self.said_left)
        if upper is None:
            return said
        # one that is left of the window stays what it is
        inside = codes.gather(1, upper.clamp_min(0)).masked_fill(upper < 0, self.num_codes)
        return said + F.embedding(inside, self.said_upper)
