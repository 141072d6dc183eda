"""What slots start as; all randomness is keyed by (seed, slot)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from sjd2_lightning.decoding.config import DecodingConfig
from sjd2_lightning.decoding.levels import NoiseLevels
from sjd2_lightning.decoding.randomness import Purpose, gumbel, integers, slot_keys, stream
from sjd2_lightning.decoding.state import State
from sjd2_lightning.models.backbone import ImageLayout, by_row

# Gumbel numbers of a batch that are kept: beyond, each pass draws those of its window again, which costs a
# GPU little and a CPU, whose models are small, more than all else that the loop does
MOST_KEPT = 2**28
_PART = 2**22  # numbers that are made at once


class SlotSource:
    """What slots start as.

    Args:
        config: the method's values.
        levels: noise of the slots.
        keeps: fields of `Slots` that are kept between iterations.
    """

    def __init__(self, config: DecodingConfig, levels: NoiseLevels, keeps: frozenset[str]) -> None:
        self.config, self.levels, self.keeps = config, levels, keeps
        self.table, self.num_codes = levels.table, levels.num_codes
        self.offsets = torch.arange(-config.size, config.size, device=self.table.device)

    def span(self, start: int, end: int) -> Tensor:
        """The numbers start .. end - 1, between -W and W, on the device: a view, so that nothing is made."""
        return self.offsets[self.config.size + start : self.config.size + end]

    def begin(self, seeds: Tensor, layouts: Sequence[ImageLayout], num_columns: int) -> State:
        """The state in front of the first slot.

        Args:
            seeds: (R,) seeds of the images.
            layouts: layouts of the images, one a row.
            num_columns: number N of slots that are kept, those right of the images included.
        """
        rows, device = len(seeds), seeds.device

        def padded(value: Callable[[ImageLayout], Sequence[int]]) -> Tensor:
            """(R, N) a value of each slot; 0 right of the image."""
            return by_row(
                layouts,
                lambda layout: F.pad(torch.tensor(value(layout)), (0, num_columns - layout.num_slots)),
            ).to(device)

        forced = padded(lambda layout: layout.forced)
        slots = torch.arange(num_columns, device=device)
        # noise at the top level with an independent uniform draft (paper); without levels a random code (SJD)
        random = integers(stream(slot_keys(seeds[:, None], slots), Purpose.INITIAL), self.num_codes)
        zeros = torch.zeros(rows, dtype=torch.long, device=device)
        return State(
            image=torch.arange(rows, device=device),
            seeds=seeds,
            head=zeros.clone(),
            end=torch.tensor([layout.num_slots for layout in layouts], device=device),
            uncached=zeros.clone(),
            iteration=zeros.clone(),
            committed=torch.zeros_like(random),
            tokens=random.where(forced < 0, forced),
            is_code=forced < 0,
            levels=torch.where(forced < 0, self.config.num_levels, 0),
            lawless=torch.full_like(zeros, num_columns),
            noisy=self._noisy(seeds, slots) if "noisy" in self.keeps else None,
            gumbel=self._kept_gumbel(seeds, slots) if "gumbel" in self.keeps else None,
            draft_probs=self._flat(rows) if "draft_probs" in self.keeps else None,
        )

    def gumbel(self, seeds: Tensor, slots: Tensor) -> Tensor:
        """(R, n, K) the Gumbel noise of slots (n,) or (R, n) of images with seeds (R,)."""
        return gumbel(stream(slot_keys(seeds[:, None], slots), Purpose.GUMBEL), self.num_codes)

    def in_parts(self, slots: Tensor, numbers: int, make: Callable[[Tensor], Tensor]) -> Tensor:
        """(R, N, ...) what `make` gives for slots (N,), some at a time.

        Args:
            slots: (N,) numbers of slots.
            numbers: number of values of a slot, in all rows, that `make` holds.
            make: from slots (n,) to their values (R, n, ...).
        """
        return torch.cat([make(part) for part in slots.split(max(1, _PART // numbers))], dim=1)

    def _noisy(self, seeds: Tensor, slots: Tensor) -> Tensor:
        def make(part: Tensor) -> Tensor:
            return self.levels.start(slot_keys(seeds[:, None], part)).to(self.table)

        return self.in_parts(slots, len(seeds) * max(self.num_codes, self.table.shape[1]), make)

    def _kept_gumbel(self, seeds: Tensor, slots: Tensor) -> Tensor | None:
        numbers = len(seeds) * self.num_codes
        if numbers * len(slots) > MOST_KEPT:
            return None
        return self.in_parts(slots, numbers, lambda part: self.gumbel(seeds, part))

    def _flat(self, rows: int) -> Tensor:
        """(R, W, K) laws of new slots: uniform."""
        shape = (rows, self.config.size, self.num_codes)
        return torch.full(shape, 1 / self.num_codes, device=self.table.device)
