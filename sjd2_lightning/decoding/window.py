"""The drafted region right of the committed slots, as one iteration finds it and leaves it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from sjd2_lightning.decoding.law import has_law
from sjd2_lightning.decoding.randomness import Purpose, slot_keys, stream, uniform
from sjd2_lightning.decoding.rules import Scores, Slots, Verdict
from sjd2_lightning.decoding.start import SlotSource
from sjd2_lightning.decoding.state import State
from sjd2_lightning.models.backbone import ImageLayout


class Window:
    """The next W slots of each row.

    Args:
        source: what slots start as.
        state: the slots of the batch.
    """

    def __init__(self, source: SlotSource, state: State) -> None:
        self.source, self.state = source, state
        self.size = source.config.size
        self.index = state.head[:, None] + source.span(0, self.size)  # (R, W) numbers in the image
        self.rows = torch.arange(len(state.head), device=state.head.device)[:, None]

    def slots(self) -> Slots:
        """The window as the iteration finds it."""
        state, keeps = self.state, self.source.keeps
        gumbel, uniforms = state.gumbel, None
        if gumbel is not None:
            gumbel = gumbel[self.rows, self.index]
        elif "gumbel" in keeps:
            gumbel = self.source.gumbel(state.seeds, self.index)
        if "uniforms" in keeps:
            uniforms = uniform(self.keys(Purpose.VERDICT, self.size), 3)
        return Slots(
            state.tokens.gather(1, self.index),
            state.is_code.gather(1, self.index),
            state.levels.gather(1, self.index),
            None if state.noisy is None else state.noisy[self.rows, self.index],
            state.draft_probs,
            gumbel,
            uniforms,
            None if state.upper is None else state.upper.gather(1, self.index) - state.head[:, None],
        )

    def keys(self, purpose: Purpose, num: int) -> Tensor:
        """(R, num) keys of this iteration's random numbers for the first slots."""
        keys = slot_keys(self.state.seeds[:, None], self.index[:, :num])
        return stream(keys, purpose, self.state.iteration[:, None])

    def fed(self, slots: Slots, again: int) -> tuple[Tensor, Tensor]:
        """Slots (R, L) head - again .. head + W - 2, which a forward is fed, and embeddings (R, L, D).

        The last slot of the window is not fed: nothing is read from it. Slots left of the image, whose
        numbers are below 0, hold anything.
        """
        index = self.state.head[:, None] + self.source.span(-again, self.size - 1)
        embeddings = F.embedding(self.state.tokens.gather(1, index.clamp_min(0)), self.source.table)
        if slots.noisy is not None:
            drafts = embeddings[:, again:]
            noisy = self.source.levels.embeddings(slots.noisy[:, :-1])
            drafts.copy_(noisy.where(slots.levels[:, :-1, None] > 0, drafts))
        return index, embeddings

    def note_lawless(self, slots: Slots, scores: Scores) -> None:
        """Notes the first slot, if any, whose scores say no law; a structural slot needs none."""
        state = self.state
        wrong = slots.is_code & ~has_law(scores.log)
        first = self.index.where(wrong, state.tokens.shape[1]).amin(1)
        torch.minimum(state.lawless, first, out=state.lawless)

    def renew(self, slots: Slots, drafts: Tensor, scores: Scores) -> None:
        """Puts the next drafts (R, W) in place, and makes noisy slots one level cleaner."""
        if slots.noisy is not None:
            assert self.state.noisy is not None
            levels = self.source.levels.lower(slots, drafts, scores)
            if self.source.config.num_levels > 1:  # from level 1 a slot goes straight to a clean embedding
                self.state.noisy[self.rows, self.index] = self.source.levels.cleaner(slots, drafts, scores)
            self.state.levels.scatter_(1, self.index, levels)
        self.state.tokens.scatter_(1, self.index, drafts)

    def advance(self, committed: Tensor, cached: Tensor, verdict: Verdict, scores: Scores) -> None:
        """Moves each row's window on.

        Args:
            committed: (R,) slots that are committed.
            cached: (R,) of them, those that the cache holds as they are.
            verdict, scores: the pass, for the laws that drafts follow.
        """
        state = self.state
        if state.draft_probs is not None:
            law = scores.probs if verdict.draft_probs is None else verdict.draft_probs
            place = self.index - state.head[:, None] + committed[:, None]
            moved = law[self.rows, place.clamp_max(self.size - 1)]
            state.draft_probs.copy_(moved.where((place < self.size)[..., None], 1 / self.source.num_codes))
        state.committed.scatter_(1, state.iteration[:, None], committed[:, None])
        state.uncached.copy_(committed - cached)
        state.head.add_(committed)
        state.iteration.add_(1)
        self.index = self.index + committed[:, None]


class OnEntry:
    """What happens to the state when it is made, and to slots when they enter the window: nothing."""

    def start(self, source: SlotSource, layouts: Sequence[ImageLayout], state: State) -> State:
        """The state that a batch starts with; `layouts` of its images, one a row."""
        return state

    def entered(self, window: Window, committed: Tensor, scores: Scores) -> None:
        """Called when the window has moved on by `committed` (R,) slots.

        Args:
            window: the window, moved on; its drafts are the next ones.
            committed: (R,) slots by which it has moved.
            scores: what the pass said of the slots that were its window.
        """
