"""The drafted region right of the committed slots: W slots a row, each with a draft and a noise level."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from sjd2_lightning.decoding.rules import Scores, Slots, Verdict
from sjd2_lightning.decoding.strip import SlotSource, Span, Strip


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


class Window:
    """State of a batch between iterations.

    Tokens and levels lie in one column for each slot of the image, committed tokens and drafts alike; wide
    fields lie in a strip, see `Strip`.

    Args:
        source: what slots start as.
        on_entry: what happens to slots when they are made, and when they enter.
        seeds: (B,) seeds of the rows.
    """

    def __init__(self, source: SlotSource, on_entry: Sequence[OnEntry], seeds: Tensor) -> None:
        self.source, self.on_entry, self.seeds = source, on_entry, seeds
        self.size = source.config.size
        ends = [layout.num_slots for layout in source.layouts]
        self.ends = ends * (len(seeds) // len(ends))
        self.end = torch.tensor(self.ends, device=seeds.device)
        self.heads, self.head = [0] * len(seeds), torch.zeros_like(seeds)
        self.iteration = 0
        self.strip = Strip(source, seeds)
        self.columns = torch.arange(max(ends) + 2 * self.strip.length, device=seeds.device)
        self.tokens, self.levels = source.first_slots(seeds, self.columns)
        self.is_code = (source.forced(len(self.columns)) < 0).expand(len(seeds), -1)
        self._made(*self.strip.begin(self.columns))
        for event in on_entry:
            event.start(self)
        self._place()

    @property
    def num_bytes(self) -> int:
        """Memory of the state, caches of the trunk excluded."""
        small = (self.columns, self.tokens, self.levels, self.is_code, self.seeds)
        return self.strip.num_bytes + sum(field.numel() * field.element_size() for field in small)

    @property
    def room(self) -> Tensor:
        """(B,) slots of each row that are not committed."""
        return self.end - self.head

    def slots(self) -> Slots:
        """The window as the coming iteration finds it."""
        tokens, is_code, levels = map(self.span.read, (self.tokens, self.is_code, self.levels))
        wide = {name: self.in_strip.read(field) for name, field in self.strip.fields.items()}
        uniforms = self.strip.fresh_numbers(self.in_strip, self.iteration)
        return Slots(tokens, is_code, levels, **wide)._replace(uniforms=uniforms)

    def fed(self, slots: Slots, again: int) -> tuple[Span, Tensor]:
        """Slots head - again .. head + W - 2, which a forward is fed, and embeddings (B, again + W - 1, D).

        The last slot of the window is not fed: nothing is read from it.
        """
        starts = [head - again for head in self.heads]
        span = Span(starts, self.head - again, again + self.size - 1, self.columns)
        embeddings = F.embedding(span.read(self.tokens), self.source.table)
        if slots.noisy is not None:
            drafts = embeddings[:, again:]
            noisy = self.source.levels.embeddings(slots.noisy[:, :-1])
            drafts.copy_(noisy.where(slots.levels[:, :-1, None] > 0, drafts))
        return span, embeddings

    def renew(self, slots: Slots, drafts: Tensor, verdict: Verdict, scores: Scores) -> None:
        """Puts the next drafts (B, W) and their laws in place, and makes noisy slots one level cleaner."""
        if slots.noisy is not None:
            levels = self.source.levels.lower(slots, drafts, scores)
            if self.source.config.num_levels > 1:  # from level 1 a slot goes straight to a clean embedding
                noisy = self.source.levels.cleaner(slots, drafts, scores)
                self.in_strip.write(self.strip.fields["noisy"], noisy)
            self.span.write(self.levels, levels)
        if slots.draft_probs is not None:
            law = scores.probs if verdict.draft_probs is None else verdict.draft_probs
            self.in_strip.write(self.strip.fields["draft_probs"], law)
        self.span.write(self.tokens, drafts)  # last: what is read of the window may be a view of it

    def advance(self, num_committed: Sequence[int], committed: Tensor) -> None:
        """Moves each row's window on; `num_committed` on the host, `committed` (B,) on the device."""
        self.heads = [head + num for head, num in zip(self.heads, num_committed, strict=True)]
        self.head = self.head + committed
        self.iteration += 1
        self._place()
        for event in self.on_entry:
            event.entered(self, committed, max(num_committed))

    def entered(self, committed: Tensor, most: int) -> tuple[Tensor, Tensor]:
        """The last `most` slots (B, most) of the window, and the first (B, 1) of each row that is new."""
        return self.span.index[:, self.size - most :], (self.head - committed + self.size)[:, None]

    def unfinished(self) -> list[int]:
        """Rows whose image has slots left."""
        return [row for row, (head, end) in enumerate(zip(self.heads, self.ends, strict=True)) if head < end]

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Keeps some rows."""
        index = torch.tensor(rows, device=self.head.device)
        self.heads, self.ends = [self.heads[row] for row in rows], [self.ends[row] for row in rows]
        self.head, self.end, self.seeds = self.head[index], self.end[index], self.seeds[index]
        self.tokens, self.levels, self.is_code = self.tokens[index], self.levels[index], self.is_code[index]
        self.strip.keep_rows(rows, index)
        for event in self.on_entry:
            event.keep_rows(index)
        self._place()

    def _place(self) -> None:
        """Where the window lies, in the image and in the strip."""
        self.span = Span(self.heads, self.head, self.size, self.columns)
        if self.strip.leaves(self.heads):
            self._made(*self.strip.move(self.heads, self.head, self.iteration))
        self.in_strip = self.strip.span(self.heads, self.head)

    def _made(self, slots: Tensor, fields: dict[str, Tensor]) -> None:
        for event in self.on_entry:
            event.made(self, slots, fields)
