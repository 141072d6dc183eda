"""What a slot may start from beside Gaussian noise: noise tied to its token, the code one row up (ours)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn import functional as F

from sjd2_lightning.decoding.variants.first_drafts import OnEntry, neighbours, repeated
from sjd2_lightning.models.backbone import ImageLayout, by_row
from sjd2_lightning.noise import tied_noise, tied_rows

if TYPE_CHECKING:
    from sjd2_lightning.decoding.window import Window


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
