"""First drafts of all slots that enter the window, guessed at once by a small network (ours).

A pass leaves the hidden states behind the laws of the window and, after redrafting, the tokens that now stand
there. From both `models.block_drafter` says what it can of the slots to their right, and each is guessed
under its own Gumbel vector. Replay only: there it does not matter what a draft is made of.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from sjd2_lightning.decoding.config import Drafting
from sjd2_lightning.decoding.law import Sampling, guided, log_law
from sjd2_lightning.decoding.rules import Scores, known_codes
from sjd2_lightning.decoding.start import SlotSource
from sjd2_lightning.decoding.state import State
from sjd2_lightning.decoding.window import OnEntry, Window
from sjd2_lightning.models.backbone import ImageLayout, by_row
from sjd2_lightning.models.block_drafter import BlockDrafter, copied_logits


@lru_cache(maxsize=4)
def _loaded(path: str, changed: int, hidden_size: int, device: torch.device) -> BlockDrafter:
    return BlockDrafter.load(path, hidden_size).to(device)


class BlockDrafts(OnEntry):
    """Slots that enter the window are clean and hold what the drafter guesses.

    Args:
        config: the network and how it is used.
        sampling: what makes laws of logits.
        table: (K + structural, D) embeddings by slot id, for their device.
        num_codes: K.
    """

    def __init__(self, config: Drafting, sampling: Sampling, table: Tensor, num_codes: int) -> None:
        self.config, self.sampling, self.num_codes = config, sampling, num_codes
        path = config.weights
        assert path is not None
        self.network = _loaded(path, Path(path).stat().st_mtime_ns, table.shape[1], table.device)
        self.codes = self.network.of_codes(table, num_codes)

    def start(self, source: SlotSource, layouts: Sequence[ImageLayout], state: State) -> State:
        num = state.tokens.shape[1]
        places = by_row(layouts, lambda layout: places_of(layout, num))
        return replace(state, places=places.to(state.tokens.device))

    def entered(self, window: Window, committed: Tensor, scores: Scores) -> None:
        """Called when the window has moved on by `committed` (B,) slots."""
        state, source, size = window.state, window.source, window.size
        assert state.places is not None
        first = window.index[:, -1:] + 1 - committed[:, None]
        seen, fresh = first + source.span(-size, 0), first + source.span(0, size)
        fresh = fresh.clamp_max(state.tokens.shape[1] - 1)  # no code is drawn there, so nothing is written
        noise = (
            source.gumbel(state.seeds, fresh) if state.gumbel is None else state.gumbel[window.rows, fresh]
        )
        # what is committed is clean
        levels = state.levels.gather(1, seen).masked_fill(seen < window.index[:, :1], 0)
        standing = known_codes(state.tokens.gather(1, seen), levels, self.num_codes)
        is_code = state.is_code.gather(1, fresh)
        places = state.places[window.rows, torch.cat([seen, fresh], dim=1)]
        guesses = self.guesses(scores, standing, places, noise, is_code)
        # as many as may enter are guessed in every pass; these have entered
        new = is_code & (fresh <= window.index[:, -1:])
        state.tokens.scatter_(1, fresh, guesses.where(new, state.tokens.gather(1, fresh)))
        state.levels.scatter_(1, fresh, state.levels.gather(1, fresh).masked_fill(new, 0))

    def guesses(
        self,
        scores: Scores,
        standing: Int[Tensor, "B W"],
        places: Float[Tensor, "B all 2"],
        noise: Float[Tensor, "B Q K"],
        is_code: Bool[Tensor, "B Q"],
    ) -> Int[Tensor, "B Q"]:
        """(B, Q) codes of the slots right of a window.

        Args:
            scores: what the pass said of the window.
            standing: (B, W) codes that stand there now; K where none is known.
            places: (B, W + Q, 2) row and column of the slots.
            noise: (B, Q, K) their Gumbel noise.
            is_code: (B, Q) True = a code is drawn there.
        """
        read = scores.read
        assert read is not None
        sides = len(read.hidden) // len(standing)
        known = self.network.known(
            read.hidden, standing.repeat(sides, 1), places.repeat(sides, 1, 1), self.codes
        )
        scale = read.scale[:, -1:] if isinstance(read.scale, Tensor) else read.scale

        def units(lefts: Tensor) -> Tensor:
            """(B, Q, U) of both sides of guidance, by the codes (B, Q) to the left."""
            return guided(self.network.units(known, lefts.repeat(sides, 1), self.codes), scale)

        # 1. the best codes of each slot, as if nothing were known of the guess on its left
        edge = standing[:, -1:]
        lefts = torch.cat([edge, torch.full_like(standing[:, 1:], self.num_codes)], dim=1)
        alone, copied = units(lefts), guided(known.copied, scale)
        logits = alone @ self.codes.effect.T + copied_logits(copied, standing, lefts, self.num_codes)
        law = log_law(logits, self.sampling) + noise
        best, codes = law.topk(min(self.config.candidates, self.num_codes), dim=-1)
        guesses = codes[..., 0]
        effect = F.embedding(codes, self.codes.effect)  # (B, Q, n, U)
        of_left = copied[..., -1:] * (lefts == self.num_codes)[..., None]  # of those that begin without one
        for _ in range(self.config.rounds):
            # 2. that guess changes which of them is the best
            lefts = torch.cat([edge, guesses.where(is_code, self.num_codes)[:, :-1]], dim=1)
            change = torch.einsum("bwnu,bwu->bwn", effect, units(lefts) - alone)
            change = change + of_left * (codes == lefts[..., None])
            change = best + change / self.sampling.temperature
            guesses = codes.gather(-1, change.argmax(-1, keepdim=True)).squeeze(-1)
        return guesses


def places_of(layout: ImageLayout, num: int) -> Float[Tensor, "num 2"]:
    """(num, 2) row and column of each slot; a structural slot is behind the code on its left.

    Args:
        layout: layout of the image; of several grids the rows are counted on.
        num: number of slots, those right of the image included, which are where the last one is.
    """
    grids = layout.grids or ((layout.height, layout.width),)
    places, first = [], 0
    for height, width in grids:
        places += [(first + row, column) for row in range(height) for column in range(width)]
        first += height
    is_code = torch.tensor(layout.forced) < 0
    found = torch.tensor(places)[(is_code.cumsum(0) - 1).clamp_min(0)]
    found[:, 1] += ~is_code
    return torch.cat([found, found[-1:].expand(num, -1)])[:num].float()
