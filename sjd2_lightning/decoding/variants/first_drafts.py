"""First drafts that are more than a random code: the maximum of the slot's own noise, or a neighbour's token.

Images are smooth, so the code beside or above is a fair guess (SJD). A repeated draft is drawn from nothing:
given what stands to its left it is certain, so the law that is recorded for it has all its mass on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from sjd2_lightning.models.backbone import ImageLayout, by_row

if TYPE_CHECKING:
    from sjd2_lightning.decoding.window import Window


class OnEntry:
    """What happens to slots when they are made, and when they enter the window: nothing, by default."""

    def start(self, window: Window) -> None:
        """Called once, before the first iteration."""

    def made(self, window: Window, slots: Tensor, kept: dict[str, Tensor]) -> None:
        """Called when the fields `kept` of slots (B, n) were made."""

    def entered(self, window: Window, committed: Tensor, most: int) -> None:
        """Called when the window has moved on by `committed` (B,) slots, at most `most`."""

    def keep_rows(self, index: Tensor) -> None:
        """Called when rows leave the batch; `index` (R,) are those that stay."""


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
