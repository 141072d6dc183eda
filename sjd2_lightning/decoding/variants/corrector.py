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

# slots of a window that rounds after the first correct: changes run to the right, and the first count most
_FRONT = 4


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
        assert slots.upper is not None
        batch, window = verdict.tokens.shape
        place = torch.arange(window, device=verdict.tokens.device)
        starts = window * torch.arange(batch, device=place.device)[:, None]
        # the windows in one row: slot i has codes[i] to its left and is codes[i + 1]; codes[0] = not known
        fed = self._in_a_row(known_codes(slots.tokens, slots.levels, self.num_codes))
        kept = self._in_a_row(verdict.tokens)
        # what is left of the window stays what it is, and so does the code that is not known
        upper = torch.where(slots.upper < 0, 0, slots.upper + starts + 1).flatten()
        moves = F.pad((slots.is_code & ~settled).flatten(), (1, 0))
        best = (scores.log + slots.gumbel).flatten(0, 1)
        # 1. what the neighbours said that each law was read behind
        before = self._said(fed[:-1], fed[upper])
        # 2. what they say now, and with it the best of the codes under the slot's own noise: of all slots
        units = self._said(kept[:-1], kept[upper]) - before
        codes = F.pad(torch.addmm(best, units, self.effect).argmax(-1), (1, 0)).where(moves, kept)
        read = kept[:-1].clone()  # what was to the left of a slot when it was corrected
        later = window - place  # the first slots first
        now = later + window * (place > 0)
        for _ in range(1, self.config.rounds):
            # 3. once more of a few, first of those whose left neighbour has changed since
            turn = torch.where((codes[:-1] != read).view(batch, window), now, later)
            which = (turn.topk(min(_FRONT, window)).indices + starts).flatten()
            left = codes.index_select(0, which)
            read.index_copy_(0, which, left)
            units = self._said(left, codes[upper.index_select(0, which)]) - before.index_select(0, which)
            found = torch.addmm(best.index_select(0, which), units, self.effect).argmax(-1)
            codes = codes.index_copy(0, which + 1, found).where(moves, kept)
        return codes[1:].where(moves[1:], verdict.tokens.flatten()).view(batch, window)

    def _in_a_row(self, ids: Tensor) -> Tensor:
        """(1 + B * W,) the codes of slot ids (B, W); K in front and for structural ones = not known."""
        return F.pad(ids.clamp_max(self.num_codes).flatten(), (1, 0), value=self.num_codes)

    def _said(self, left: Tensor, upper: Tensor) -> Tensor:
        """(n, U) what the neighbours of n slots say to them."""
        return F.embedding(left, self.said_left) + F.embedding(upper, self.said_upper)
