"""What decoding counted: no times here, see metrics/efficiency for those."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sjd2_lightning.decoding.rules import Read
from sjd2_lightning.fixed_point import DecodeStats
from sjd2_lightning.models.backbone import ImageLayout


@dataclass(frozen=True)
class DecodeOutput:
    """Decoded images as ids.

    Attributes:
        slot_ids: (B, N) int64 with structural tokens; -1 right of an image shorter than others.
        layouts: B, of the images.
        stats: counts.
    """

    slot_ids: Tensor
    layouts: tuple[ImageLayout, ...]
    stats: DecodeStats

    @classmethod
    def of(cls, slot_ids: Tensor, layouts: Sequence[ImageLayout], stats: DecodeStats) -> DecodeOutput:
        """From slot ids (B, N) that hold anything right of each image."""
        ends = torch.tensor([layout.num_slots for layout in layouts], device=slot_ids.device)
        beyond = torch.arange(slot_ids.shape[1], device=slot_ids.device) >= ends[:, None]
        return cls(slot_ids.masked_fill(beyond, -1), tuple(layouts), stats)

    @property
    def image_ids(self) -> Tensor:
        """(B, H, W) codes of images of one size.

        Raises:
            ValueError: if they have several sizes: see `image_ids_by_row`.
        """
        if len(set(self.layouts)) > 1:
            raise ValueError("the images differ in size: read `image_ids_by_row` in place of `image_ids`")
        return self.layouts[0].image_ids(self.slot_ids)

    @property
    def image_ids_by_row(self) -> tuple[Tensor, ...]:
        """(H, W) codes of each image, whatever its size."""
        rows = zip(self.layouts, self.slot_ids, strict=True)
        return tuple(layout.image_ids(row[None, : layout.num_slots])[0] for layout, row in rows)


@dataclass(frozen=True)
class Iteration:
    """What an observer sees after each forward pass; tensors live on the device and are not copies.

    Attributes:
        index: number of the forward pass, from 0.
        rows: (R,) which images of the batch the rows are; finished ones have left.
        heads: (R,) first slot of the window.
        num_committed: (R,) slots that this pass committed.
        tokens: (R, W) what verification gave in every slot.
        levels: (R, W) noise levels that the slots were fed with.
        scores: (R, W, K) unnormalised log-probabilities of this pass.
        gumbel: (R, W, K) the slots' Gumbel noise in replay mode, else None.
        drafts: (R, W) what the slots held before.
        read: what the scores were read from.
    """

    index: int
    rows: Tensor
    heads: Tensor
    num_committed: Tensor
    tokens: Tensor
    levels: Tensor
    scores: Tensor
    gumbel: Tensor | None
    drafts: Tensor
    read: Read | None


class NearTies:
    """Observer: counts committed slots whose two best perturbed scores lie within `tolerance` (replay).

    Rounding may decide such a slot, so two decodings of the same seed may differ from there on.
    """

    def __init__(self, tolerance: float = 1e-5) -> None:
        self.tolerance = tolerance
        self.slots: list[tuple[int, int]] = []

    def __call__(self, iteration: Iteration) -> None:
        """Notes (image, slot) of each near tie."""
        if iteration.gumbel is None:
            raise ValueError("near ties are defined in replay mode only: set acceptance to 'replay'")
        best = (iteration.scores + iteration.gumbel).topk(2, dim=-1).values
        width = torch.arange(best.shape[1], device=best.device)
        close = (best[..., 0] - best[..., 1] <= self.tolerance) & (width < iteration.num_committed[:, None])
        # structural slots are forced: nothing to decide
        close &= iteration.tokens < iteration.scores.shape[-1]
        for row, slot in close.nonzero().tolist():
            self.slots.append((int(iteration.rows[row]), int(iteration.heads[row]) + slot))
