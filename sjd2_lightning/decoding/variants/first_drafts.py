"""What a slot may start with beside a random code and Gaussian noise.

First drafts: the maximum of the slot's own noise, or a neighbour's token: images are smooth, so the code
beside or above is a fair guess (SJD). A repeated draft is drawn from nothing: given what stands to its left
it is certain, so the law that is recorded for it has all its mass on it. In place of noise (ours): noise tied
to the slot's token, or the embedding of the code one row up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from sjd2_lightning.decoding.randomness import Purpose, gumbel, stream
from sjd2_lightning.decoding.rules import Scores
from sjd2_lightning.decoding.start import SlotSource
from sjd2_lightning.decoding.state import State
from sjd2_lightning.decoding.window import OnEntry, Window
from sjd2_lightning.models.backbone import ImageLayout, by_row
from sjd2_lightning.noise import tied_noise, tied_rows


class OwnMaximum(OnEntry):
    """The first draft is the maximum of the slot's own Gumbel vector."""

    def start(self, source: SlotSource, layouts: Sequence[ImageLayout], state: State) -> State:
        def best(slots: Tensor) -> Tensor:
            return source.gumbel(state.seeds, slots).argmax(-1)

        slots = torch.arange(state.tokens.shape[1], device=state.tokens.device)
        drafts = source.in_parts(slots, len(state.seeds) * source.num_codes, best)
        return replace(state, tokens=drafts.where(state.is_code, state.tokens))


class Repeated(OnEntry):
    """The first draft is the token of a neighbour.

    Args:
        kind: "repeat_left" or "repeat_above".
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def start(self, source: SlotSource, layouts: Sequence[ImageLayout], state: State) -> State:
        return replace(state, neighbour=_neighbours(layouts, self.kind, state))

    def entered(self, window: Window, committed: Tensor, scores: Scores) -> None:
        """Called when the window has moved on by `committed` (B,) slots."""
        state = window.state
        tokens, found = repeated(window, committed, state.neighbour, self.kind)
        found &= state.is_code.gather(1, window.index)
        drafts = tokens.where(found, state.tokens.gather(1, window.index))
        state.tokens.scatter_(1, window.index, drafts)
        if state.draft_probs is not None:
            num_codes = state.draft_probs.shape[-1]
            certain = F.one_hot(tokens.clamp_max(num_codes - 1), num_codes).to(state.draft_probs)
            state.draft_probs.copy_(certain.where(found[..., None], state.draft_probs))


class Tied:
    """Slots start from noise made of the Gumbel vector that decides their token, see `noise.tied_noise`.

    Args:
        rows: (K, D) normalised embeddings of the codes.
        white: whether the noise is without the table's correlations.
    """

    def __init__(self, rows: Tensor, white: bool) -> None:
        self.num_codes, self.rows = len(rows), tied_rows(rows, white)

    def __call__(self, keys: Tensor) -> Tensor:
        return tied_noise(gumbel(stream(keys, Purpose.GUMBEL), self.num_codes), self.rows)


class FromAbove(OnEntry):
    """Slots that enter the window hold the embedding of what now stands one row up.

    Args:
        rows: (K + structural, D) normalised embeddings by slot id.
    """

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def start(self, source: SlotSource, layouts: Sequence[ImageLayout], state: State) -> State:
        return replace(state, upper=upper_slots(layouts, state))

    def entered(self, window: Window, committed: Tensor, scores: Scores) -> None:
        """Called when the window has moved on by `committed` (B,) slots."""
        assert window.state.noisy is not None
        tokens, found = repeated(window, committed, window.state.upper, "repeat_above")
        held = window.state.noisy[window.rows, window.index]
        noisy = F.embedding(tokens, self.rows).where(found[..., None], held)
        window.state.noisy[window.rows, window.index] = noisy


def _neighbours(layouts: Sequence[ImageLayout], kind: str, state: State) -> Tensor:
    """(B, N) `neighbours` of the images of a batch."""
    num = state.tokens.shape[1]
    return by_row(layouts, lambda layout: neighbours(layout, kind, num)).to(state.tokens.device)


def upper_slots(layouts: Sequence[ImageLayout], state: State) -> Tensor:
    """(B, N) the slot one row up of each slot, for `State.upper`; -1 where there is none."""
    return _neighbours(layouts, "repeat_above", state)


def neighbours(layout: ImageLayout, kind: str, num_columns: int) -> Tensor:
    """(num_columns,) int64: the slot whose token each slot repeats; -1 where there is none.

    Args:
        layout: layout of the image.
        kind: "repeat_left": the nearest code to the left, structural slots skipped, the end of the row above
            for the first of a row; "repeat_above": the same column one row up.
        num_columns: length of the result; slots right of the image repeat its last code or nothing.
    """
    codes = layout.code_slots.tolist()
    found = torch.full((num_columns,), -1)
    if kind == "repeat_above":
        above = torch.tensor(codes[: -layout.width], dtype=torch.long)  # empty for a single row
        found[codes[layout.width :]] = above
    else:
        is_code = torch.zeros(num_columns, dtype=torch.long)
        is_code[codes] = 1
        before = is_code.cumsum(0) - is_code  # codes left of each slot
        found = torch.where(before > 0, torch.tensor(codes)[(before - 1).clamp_min(0)], -1)
    return found


def repeated(window: Window, committed: Tensor, neighbour: Tensor | None, kind: str) -> tuple[Tensor, Tensor]:
    """Tokens (B, W) that the slots repeat, and which of them are new and have one to repeat, (B, W) bool.

    Args:
        window: the window, moved on.
        committed: (B,) slots by which it has moved.
        neighbour: (B, N) neighbours by slot, from `neighbours`.
        kind: kind of the neighbours.
    """
    assert neighbour is not None
    slots = window.index
    # the first new slot: those further right repeat the last draft
    ends = slots[:, -1:] + 1 - committed[:, None]
    source = neighbour.gather(1, slots.minimum(ends) if kind == "repeat_left" else slots)
    found = (source >= 0) & (source < ends) & (slots >= ends)
    return window.state.tokens.gather(1, source.clamp_min(0)), found
