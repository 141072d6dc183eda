"""What a slot may start with beside a random code and Gaussian noise.

First drafts: the maximum of the slot's own noise, or a neighbour's token: images are smooth, so the code
beside or above is a fair guess (SJD). A repeated draft is drawn from nothing: given what stands to its left
it is certain, so the law that is recorded for it has all its mass on it. In place of noise (ours): noise tied
to the slot's token, or the embedding of the code one row up.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from sjd2_lightning.decoding.window import OnEntry, Window
from sjd2_lightning.models.backbone import ImageLayout, by_row
from sjd2_lightning.noise import tied_noise, tied_rows


class OwnMaximum(OnEntry):
    """The first draft is the maximum of the slot's own Gumbel vector."""

    def made(self, window: Window, slots: Tensor, kept: dict[str, Tensor]) -> None:
        """Called when the fields `kept` of slots (B, n) were made."""
        best = kept["gumbel"].argmax(-1)
        best = best.where(window.is_code.gather(1, slots), window.tokens.gather(1, slots))
        window.tokens.scatter_(1, slots, best)


class Repeated(OnEntry):
    """The first draft is the token of a neighbour.

    Args:
        layouts: layouts of the images, one for all or one a row.
        kind: "repeat_left" or "repeat_above".
    """

    def __init__(self, layouts: Sequence[ImageLayout], kind: str) -> None:
        self.layouts, self.kind = layouts, kind

    def start(self, window: Window) -> None:
        """Finds each slot's neighbour."""
        num = len(window.columns)
        found = by_row(self.layouts, lambda layout: neighbours(layout, self.kind, num))
        self.neighbour = found.to(window.columns.device).expand(len(window.seeds), -1)

    def entered(self, window: Window, committed: Tensor, most: int) -> None:
        """Called when the window has moved on by `committed` (B,) slots, at most `most`."""
        slots, ends = window.entered(committed, most)
        tokens, found = repeated(window.tokens, slots, ends, self.neighbour, self.kind)
        found &= (slots >= ends) & window.is_code.gather(1, slots)
        window.tokens.scatter_(1, slots, tokens.where(found, window.tokens.gather(1, slots)))
        if "draft_probs" in window.strip.fields:
            num_codes = window.strip.fields["draft_probs"].shape[-1]
            window.strip.put(
                "draft_probs", slots, F.one_hot(tokens.clamp_max(num_codes - 1), num_codes), found
            )

    def keep_rows(self, index: Tensor) -> None:
        """Keeps some rows."""
        self.neighbour = self.neighbour[index]


class Tied:
    """Slots start from noise made of the Gumbel vector that decides their token, see `noise.tied_noise`.

    Args:
        rows: (K, D) normalised embeddings of the codes.
        white: whether the noise is without the table's correlations.
    """

    def __init__(self, rows: Tensor, white: bool) -> None:
        self.rows = tied_rows(rows, white)

    def __call__(self, keys: Tensor, kept: dict[str, Tensor]) -> Tensor:
        return tied_noise(kept["gumbel"], self.rows)


class FromAbove(OnEntry):
    """Slots that enter the window hold the embedding of what now stands one row up.

    Args:
        layouts: layouts of the images, one for all or one a row.
        rows: (K + structural, D) normalised embeddings by slot id.
    """

    def __init__(self, layouts: Sequence[ImageLayout], rows: Tensor) -> None:
        self.layouts, self.rows = layouts, rows

    def start(self, window: Window) -> None:
        """Finds the slot one row up of each slot."""
        num = len(window.columns)
        found = by_row(self.layouts, lambda layout: neighbours(layout, "repeat_above", num))
        self.above = found.to(window.columns.device).expand(len(window.seeds), -1)

    def entered(self, window: Window, committed: Tensor, most: int) -> None:
        """Called when the window has moved on by `committed` (B,) slots, at most `most`."""
        slots, ends = window.entered(committed, most)
        tokens, found = repeated(window.tokens, slots, ends, self.above, "repeat_above")
        window.strip.put("noisy", slots, F.embedding(tokens, self.rows), found & (slots >= ends))

    def keep_rows(self, index: Tensor) -> None:
        """Keeps some rows."""
        self.above = self.above[index]


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


def repeated(
    tokens: Tensor, slots: Tensor, ends: Tensor, neighbour: Tensor, kind: str
) -> tuple[Tensor, Tensor]:
    """Tokens (B, n) that slots repeat, and where there is one to repeat, (B, n) bool.

    Args:
        tokens: (B, N) tokens by slot.
        slots: (B, n) numbers of the slots in the image.
        ends: (B, 1) first slot without a draft: a slot further right repeats the last draft.
        neighbour: (B, N) neighbours by slot, from `neighbours`.
        kind: kind of the neighbours.
    """
    source = neighbour.gather(1, slots.minimum(ends) if kind == "repeat_left" else slots)
    return tokens.gather(1, source.clamp_min(0)), (source >= 0) & (source < ends)
