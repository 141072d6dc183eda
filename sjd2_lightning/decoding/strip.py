"""What is kept of slots and is as wide as the vocabulary or an embedding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sjd2_lightning.decoding.randomness import Purpose, slot_keys, stream, uniform
from sjd2_lightning.decoding.span import Span

if TYPE_CHECKING:
    from sjd2_lightning.decoding.method import Method

# slots whose random numbers are drawn before they are needed
_LEAST_AHEAD = 16
# numbers, as wide as the vocabulary, that they may be: memory is held for the window alone
_MOST_AHEAD = 2**15


class Strip:
    """Fields of W + A slots of each row, from a slot at or left of its head on.

    The strip moves on only when a window would leave it, so that random numbers are drawn for many slots at
    once: on small models a draw for each iteration costs more than its numbers do. On large vocabularies,
    whose numbers cost more than the call does, A is small.

    Args:
        method: the method; it makes the fields of new slots.
        seeds: (B,) seeds of the rows.
    """

    def __init__(self, method: Method, seeds: Tensor) -> None:
        self.method, self.seeds = method, seeds
        self.ahead = min(max(_LEAST_AHEAD, method.size // 2), _MOST_AHEAD // method.num_codes)
        self.length = method.size + self.ahead
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
        return Span(starts, head - self.base, self.method.size, self.columns)

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
        return slots, self.method.fresh(self.seeds, slots)

    def _draw_uniforms(self, iteration: int) -> None:
        """Numbers of every slot of the strip for as many iterations as it can stay where it is."""
        if "uniforms" not in self.method.keeps:
            return
        slots = self.base[:, None] + self.columns[: self.length]
        draws = iteration + self.columns[: self.ahead + 1]
        keys = slot_keys(self.seeds[:, None], slots)[..., None]
        self.uniforms, self.first_draw = uniform(stream(keys, Purpose.VERDICT, draws), 3), iteration
