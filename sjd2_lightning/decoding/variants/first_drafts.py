"""First drafts that repeat a neighbour: images are smooth, so the code beside or above is a fair guess (SJD).

A repeated draft is drawn from nothing: given what stands to its left it is certain, so the law that the
speculative rules record for it has all its mass on it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sjd2_lightning.models.backbone import ImageLayout


def neighbours(layout: ImageLayout, kind: str, num_columns: int) -> Tensor:
    """(num_columns,) int64: the slot whose token each slot repeats; -1 where there is none.

    Args:
        layout: of the image.
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
        tokens: (B, N) by slot.
        slots: (B, n) absolute.
        ends: (B, 1) drafts exist left of it: a slot further right repeats the last of them.
        neighbour: (B, N) from `neighbours`.
        kind: as there.
    """
    source = neighbour.gather(1, slots.minimum(ends) if kind == "repeat_left" else slots)
    return tokens.gather(1, source.clamp_min(0)), (source >= 0) & (source < ends)
