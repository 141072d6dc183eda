"""What is kept of slots from pass to pass and is as wide as the vocabulary or an embedding."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from sjd2_lightning.decoding.config import DecodingConfig
from sjd2_lightning.decoding.levels import NoiseLevels
from sjd2_lightning.decoding.randomness import Purpose, gumbel, integers, slot_keys, stream, uniform
from sjd2_lightning.models.backbone import ImageLayout, by_row


class Span:
    """Columns `start .. start + length - 1` of each row of a batch.

    Where all rows start alike, as they do at batch 1, it is a slice: reading gives a view. Otherwise it is
    an index. The host knows the starts, so that this choice waits for no device.

    Args:
        starts: first columns of the rows, on the host.
        start: (B,) the same numbers on the device.
        length: number of columns.
        columns: (N,) the numbers 0 .. N - 1 on the device; N exceeds every column read.
    """

    def __init__(self, starts: Sequence[int], start: Tensor, length: int, columns: Tensor) -> None:
        self.length = length
        self.least, self.most = min(starts), max(starts)
        self.is_slice = self.least == self.most >= 0
        if self.is_slice:
            self.index = columns[self.least : self.least + length].expand(len(starts), -1)
        else:
            self.index = start[:, None] + columns[:length]

    def read(self, buffer: Tensor) -> Tensor:
        """(B, length, ...) columns of a buffer (B, N, ...), a view where the span is a slice.

        Columns left of the buffer are read as its first one: callers put something else there.
        """
        if self.is_slice:
            return buffer.narrow(1, self.least, self.length)
        index = self.index if self.least >= 0 else self.index.clamp_min(0)
        return buffer[_rows(buffer), index]

    def write(self, buffer: Tensor, values: Tensor) -> None:
        """Puts values (B, length, ...) into a buffer (B, N, ...)."""
        if self.is_slice:
            buffer.narrow(1, self.least, self.length).copy_(values)
        else:
            buffer[_rows(buffer), self.index] = values


def _rows(buffer: Tensor) -> Tensor:
    return torch.arange(len(buffer), device=buffer.device)[:, None]


# slots whose random numbers are drawn before they are needed
_LEAST_AHEAD = 16
# numbers, as wide as the vocabulary, that they may be: memory is held for the window alone
_MOST_AHEAD = 2**15


class SlotSource:
    """What slots start as; all randomness is keyed by (seed, slot).

    Args:
        config: the method's values.
        layouts: layouts of the images, one for all rows or one a row.
        levels: noise of the slots.
        keeps: fields of `Slots` that are kept between iterations.
    """

    def __init__(
        self,
        config: DecodingConfig,
        layouts: Sequence[ImageLayout],
        levels: NoiseLevels,
        keeps: frozenset[str],
    ) -> None:
        self.config, self.layouts, self.levels, self.keeps = config, tuple(layouts), levels, keeps
        self.table, self.num_codes = levels.table, levels.num_codes

    def of_slots(self, num_columns: int, value: Callable[[ImageLayout], Tensor]) -> Tensor:
        """(B or 1, num_columns) int64: a value (N,) of each layout's slots; 0 right of the image."""

        def padded(layout: ImageLayout) -> Tensor:
            return F.pad(value(layout), (0, num_columns - layout.num_slots))

        return by_row(self.layouts, padded).to(self.table.device)

    def forced(self, num_columns: int) -> Tensor:
        """(B or 1, num_columns): -1 where a code is drawn, else the slot id that stands there."""
        return self.of_slots(num_columns, lambda layout: torch.tensor(layout.forced))

    def first_slots(self, seeds: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Drafts and levels (B, n) that slots start with; seeds (B,), slots (n,) numbers in the image.

        Noise at the top level with an independent uniform draft (paper); without levels a random code
        (SJD). Structural slots start, and stay, at their token. Slots right of the image hold any clean
        content: they are never committed.
        """
        random = integers(stream(slot_keys(seeds[:, None], slots), Purpose.INITIAL), self.num_codes)
        forced = self.forced(len(slots)).expand(len(seeds), -1)
        levels = torch.where(forced < 0, self.config.num_levels, 0)
        return random.where(forced < 0, forced), levels

    def fresh(self, seeds: Tensor, slots: Tensor) -> dict[str, Tensor]:
        """The wide fields (B, n, ...) that slots (B, n) start with; seeds (B,)."""
        keys = slot_keys(seeds[:, None], slots)
        found = {}
        if "gumbel" in self.keeps:
            found["gumbel"] = gumbel(stream(keys, Purpose.GUMBEL), self.num_codes)
        if "draft_probs" in self.keeps:
            flat = torch.full((), 1 / self.num_codes, device=slots.device)
            found["draft_probs"] = flat.expand(*slots.shape, self.num_codes)
        if "noisy" in self.keeps:
            found["noisy"] = self.levels.start(keys, found).to(self.table)
        return found


class Strip:
    """Fields of W + A slots of each row, from a slot at or left of its head on.

    The strip moves on only when a window would leave it, so that random numbers are drawn for many slots at
    once: on small models a draw for each iteration costs more than its numbers do. On large vocabularies,
    whose numbers cost more than the call does, A is small.

    Args:
        source: what makes the fields of new slots.
        seeds: (B,) seeds of the rows.
    """

    def __init__(self, source: SlotSource, seeds: Tensor) -> None:
        self.source, self.seeds = source, seeds
        self.ahead = min(max(_LEAST_AHEAD, source.config.size // 2), _MOST_AHEAD // source.num_codes)
        self.length = source.config.size + self.ahead
        self.bases, self.base = [0] * len(seeds), torch.zeros_like(seeds)  # its first slot, by row
        self.fields: dict[str, Tensor] = {}
        self.uniforms: Tensor | None = None

    @property
    def num_bytes(self) -> int:
        """Memory of the fields and the uniform numbers."""
        held = list(self.fields.values()) + ([] if self.uniforms is None else [self.uniforms])
        return sum(field.numel() * field.element_size() for field in held)

    def begin(self, columns: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Makes the fields of the first slots; gives the slots (B, n) and their fields.

        Args:
            columns: (N,) the numbers 0 .. N - 1 on the device.
        """
        self.columns = columns
        slots, new = self._made(0, self.length)
        self.fields = {name: field.contiguous() for name, field in new.items()}
        self._draw_uniforms(0)
        return slots, new

    def span(self, heads: Sequence[int], head: Tensor) -> Span:
        """Where the windows that start at `heads`, on the device `head`, lie in the strip."""
        starts = [start - base for start, base in zip(heads, self.bases, strict=True)]
        return Span(starts, head - self.base, self.source.config.size, self.columns)

    def leaves(self, heads: Sequence[int]) -> bool:
        """Whether a window that starts at its head would leave the strip."""
        return max(head - base for head, base in zip(heads, self.bases, strict=True)) > self.ahead

    def move(self, heads: Sequence[int], head: Tensor, iteration: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Moves the strip's start to the heads; gives the slots (B, n) that were made, and their fields."""
        offsets = [start - base for start, base in zip(heads, self.bases, strict=True)]
        most = max(offsets)
        slots, new = self._made(self.length, most)
        kept = Span(offsets, head - self.base, self.length, self.columns)
        for name, old in self.fields.items():
            if kept.is_slice:
                self.fields[name] = torch.cat([old[:, most:], new[name]], dim=1)
            else:
                self.fields[name] = kept.read(torch.cat([old, new[name]], dim=1))
        self.bases, self.base = list(heads), head
        self._draw_uniforms(iteration)
        return slots, new

    def fresh_numbers(self, span: Span, iteration: int) -> Tensor | None:
        """(B, W, 3) numbers of an iteration; None where no rule reads them."""
        return None if self.uniforms is None else span.read(self.uniforms[:, :, iteration - self.first_draw])

    def put(self, name: str, slots: Tensor, values: Tensor, where: Tensor) -> None:
        """Puts values (B, n, ...) into a field at some of the slots (B, n), those of `where` (B, n)."""
        field = self.fields[name]
        place = (slots - self.base[:, None])[..., None].expand(-1, -1, field.shape[-1])
        field.scatter_(1, place, values.to(field).where(where[..., None], field.gather(1, place)))

    def keep_rows(self, rows: Sequence[int], index: Tensor) -> None:
        """Keeps some rows; `index` holds the same numbers on the device."""
        self.bases, self.base = [self.bases[row] for row in rows], self.base[index]
        self.seeds = self.seeds[index]
        self.fields = {name: field[index] for name, field in self.fields.items()}
        if self.uniforms is not None:
            self.uniforms = self.uniforms[index]

    def _made(self, start: int, num: int) -> tuple[Tensor, dict[str, Tensor]]:
        slots = self.base[:, None] + self.columns[start : start + num]
        return slots, self.source.fresh(self.seeds, slots)

    def _draw_uniforms(self, iteration: int) -> None:
        """Numbers of every slot of the strip for as many iterations as it can stay where it is."""
        if "uniforms" not in self.source.keeps:
            return
        slots = self.base[:, None] + self.columns[: self.length]
        draws = iteration + self.columns[: self.ahead + 1]
        keys = slot_keys(self.seeds[:, None], slots)[..., None]
        self.uniforms, self.first_draw = uniform(stream(keys, Purpose.VERDICT, draws), 3), iteration
