"""The drafted region right of the accepted tokens: drafts, levels and noisy embeddings of W slots a row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sjd2_lightning.decoding.config import BY_LAWS, REPEATED, DecodingConfig
from sjd2_lightning.decoding.randomness import Purpose, gumbel, integers, normal, slot_keys, stream, uniform
from sjd2_lightning.decoding.span import Span
from sjd2_lightning.decoding.variants.first_drafts import neighbours, repeated
from sjd2_lightning.embedding import EmbeddingSpace
from sjd2_lightning.models.backbone import ImageLayout, by_row
from sjd2_lightning.noise import TIED, tied_noise, tied_rows

_LEAST_AHEAD = 16  # slots whose random numbers are drawn before they are needed, see `Window`
_MOST_AHEAD = (
    2**15
)  # numbers, as wide as the vocabulary, that they may be: memory is held for the window alone


class Slots(NamedTuple):
    """The window in one iteration, (B, W, ...) each. A field that a method has no use for is None.

    Attributes:
        tokens: (B, W) drafts, as slot ids.
        is_code: (B, W) True = a code is drawn here; False = structural, the draft is the token.
        levels: (B, W) noise level; 0 = fed as the clean embedding of its draft. None = all are 0.
        noisy: (B, W, D) normalised noisy embedding; its value matters where the level is above 0.
        draft_probs: (B, W, K) the law that the draft was drawn from (speculative rules).
        gumbel: (B, W, K) the slot's noise (replay).
        uniforms: (B, W, 3) fresh numbers of this iteration (speculative rules).
    """

    tokens: Tensor
    is_code: Tensor
    levels: Tensor | None
    noisy: Tensor | None
    draft_probs: Tensor | None
    gumbel: Tensor | None
    uniforms: Tensor | None


class SlotSource:
    """What slots are made of; all randomness is keyed by (seed, slot).

    Args:
        config: the method.
        layout: which slots are structural; one for all rows, or one a row.
        table: (K + structural, D) embeddings by slot id.
        num_codes: K.
    """

    def __init__(
        self,
        config: DecodingConfig,
        layout: ImageLayout | Sequence[ImageLayout],
        table: Tensor,
        num_codes: int,
    ) -> None:
        self.config = config
        self.layouts = (layout,) if isinstance(layout, ImageLayout) else tuple(layout)
        self.num_codes = num_codes
        self.table = table
        self.space = EmbeddingSpace(table[:num_codes])
        # single precision whatever the trunk's: timestep tokens are of 1000 t, which half precision garbles
        self.timesteps = config.noise.grid(config.num_levels).to(table.device)
        if config.num_levels:
            self.normalised = self.space.normalise(table)
            self.grid = self.timesteps.to(table)[:, None]  # (levels + 1, 1), t by level
            if config.noise.source in TIED:
                self.tied_rows = tied_rows(self.normalised[:num_codes], config.noise.source == "tied_white")

    def of_slots(self, num_columns: int, value: Callable[[ImageLayout], Tensor]) -> Tensor:
        """(B or 1, num_columns) int64: a value (N,) of each layout's slots; 0 right of the image."""

        def padded(layout: ImageLayout) -> Tensor:
            return F.pad(value(layout), (0, num_columns - layout.num_slots))

        return by_row(self.layouts, padded).to(self.table.device)

    def forced(self, num_columns: int) -> Tensor:
        """(B or 1, num_columns): -1 where a code is drawn, else the slot id that stands there."""
        return self.of_slots(num_columns, lambda layout: torch.tensor(layout.forced))

    def first_drafts(self, seeds: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Drafts and levels (B, n) that slots start with; seeds (B,), slots (n,) absolute.

        Noise at the top level with an independent uniform draft (paper); without levels a random
        code (SJD). Structural slots start, and stay, at their token. Slots right of the image hold any
        clean content: they are never committed.
        """
        random = integers(stream(slot_keys(seeds[:, None], slots), Purpose.INITIAL), self.num_codes)
        forced = self.forced(len(slots)).expand(len(seeds), -1)
        levels = torch.where(forced < 0, self.config.num_levels, 0)
        return random.where(forced < 0, forced), levels

    def fresh(self, seeds: Tensor, slots: Tensor) -> dict[str, Tensor]:
        """The wide contents (B, n, ...) that slots start with; seeds (B,), slots (B, n) absolute."""
        keys = slot_keys(seeds[:, None], slots)
        found = {}
        if self.config.acceptance == "replay":
            found["gumbel"] = gumbel(stream(keys, Purpose.GUMBEL), self.num_codes)
        if self.config.acceptance in BY_LAWS or self.config.tree.width > 1:
            flat = torch.full((), 1 / self.num_codes, device=slots.device)
            found["draft_probs"] = flat.expand(*slots.shape, self.num_codes)
        if self.config.num_levels:
            if self.config.noise.source in TIED:
                noisy = tied_noise(found["gumbel"], self.tied_rows)
            elif self.config.noise.source in ("mean", "above"):  # what stands above is not known yet
                noisy = torch.zeros(*slots.shape, self.table.shape[1], device=slots.device)
            else:
                noisy = normal(stream(keys, Purpose.NOISE), self.table.shape[1])
            found["noisy"] = noisy.to(self.table)
        return found

    def renewed(self, levels: Tensor, noisy: Tensor, tokens: Tensor, law: Tensor | None) -> Tensor:
        """What slots hold one level down (B, W, D), by the tokens (B, W) and laws (B, W, K) of this pass."""
        mean = None
        if law is not None and self.config.noise.reads_mean:
            mean = law.to(self.normalised) @ self.normalised[: self.num_codes]
        drawn = F.embedding(tokens, self.normalised)
        t, s = F.embedding(levels, self.grid), F.embedding((levels - 1).clamp_min(0), self.grid)
        return self.config.noise.step(noisy, drawn, mean, t, s)

    def next_levels(self, levels: Tensor, drafts: Tensor, tokens: Tensor, law: Tensor | None) -> Tensor:
        """Levels (B, W) of the next iteration, by the drafts (B, W) fed, tokens (B, W) and laws (B, W, K)."""
        lower = (levels - 1).clamp_min(0)
        if self.config.level_rule == "stable":
            return lower.masked_fill((tokens == drafts) & (levels < self.config.num_levels), 0)
        if self.config.level_rule == "confident" and law is not None:
            chosen = tokens.clamp_max(self.num_codes - 1)[..., None]  # structural slots are clean anyway
            return lower.masked_fill(law.gather(-1, chosen).squeeze(-1) >= self.config.confidence, 0)
        return lower


class Window:
    """State of a batch between iterations.

    Tokens and levels lie in one column for each slot of the image, committed tokens and drafts alike.
    Contents as wide as the vocabulary or an embedding lie in a strip of W + A slots that starts at or left
    of each row's head. It moves on only when a window would leave it, so that random numbers are drawn for
    many slots at once: on small models a draw for each iteration costs more than its numbers do. On large
    vocabularies, whose numbers cost more than the call does, A is small.

    Args:
        source: of the slots; holds the method.
        seeds: (B,) of the rows.
    """

    def __init__(self, source: SlotSource, seeds: Tensor) -> None:
        size, device = source.config.size, seeds.device
        self.source = source
        self.size = size
        self.ahead = min(max(_LEAST_AHEAD, size // 2), _MOST_AHEAD // source.num_codes)
        self.strip_len = size + self.ahead
        ends = [layout.num_slots for layout in source.layouts]
        self.ends = ends * (len(seeds) // len(ends))
        self.end = torch.tensor(self.ends, device=device)
        num_columns = max(ends) + 2 * self.strip_len
        self.columns = torch.arange(num_columns, device=device)
        self.tokens, self.levels = source.first_drafts(seeds, self.columns)
        self.is_code = (source.forced(num_columns) < 0).expand(len(seeds), -1)
        if source.config.draft_init in REPEATED:
            kind = source.config.draft_init
            found = by_row(source.layouts, lambda layout: neighbours(layout, kind, num_columns))
            self.neighbour = found.to(device).expand(len(seeds), -1)
        self.above: Tensor | None = None
        if source.config.noise.source == "above" and source.config.num_levels:
            found = by_row(source.layouts, lambda layout: neighbours(layout, "repeat_above", num_columns))
            self.above = found.to(device).expand(len(seeds), -1)
        self.seeds = seeds
        self.heads, self.head = [0] * len(seeds), torch.zeros_like(seeds)
        self.bases, self.base = [0] * len(seeds), torch.zeros_like(seeds)
        new = self._new_slots(0, self.strip_len)
        self.strip = {name: field.contiguous() for name, field in new.items()}
        self.iteration = 0
        self._draw_uniforms()
        self._place()

    @property
    def num_bytes(self) -> int:
        """Memory of the state, caches of the trunk excluded."""
        small = [self.columns, self.tokens, self.levels, self.is_code, self.seeds]
        if self.uniforms is not None:
            small.append(self.uniforms)
        return sum(field.numel() * field.element_size() for field in (*small, *self.strip.values()))

    def _new_slots(self, start: int, num: int) -> dict[str, Tensor]:
        slots = self.base[:, None] + self.columns[start : start + num]
        found = self.source.fresh(self.seeds, slots)
        if self.source.config.draft_init == "gumbel":
            best = found["gumbel"].argmax(-1)
            self.tokens.scatter_(
                1, slots, best.where(self.is_code.gather(1, slots), self.tokens.gather(1, slots))
            )
        return found

    def _draw_uniforms(self) -> None:
        """Numbers of every slot of the strip for as many iterations as it can stay where it is."""
        self.uniforms: Tensor | None = None
        if self.source.config.acceptance != "replay":
            slots = self.base[:, None] + self.columns[: self.strip_len]
            draws = self.iteration + self.columns[: self.ahead + 1]
            keys = slot_keys(self.seeds[:, None], slots)[..., None]
            self.uniforms = uniform(stream(keys, Purpose.VERDICT, draws), 3)
            self.first_draw = self.iteration

    def _place(self) -> None:
        """Where the window lies, in the image and in the strip."""
        self.span = Span(self.heads, self.head, self.size, self.columns)
        offsets = [head - base for head, base in zip(self.heads, self.bases, strict=True)]
        if max(offsets) > self.ahead:
            self._move_strip(offsets)
            offsets = [0] * len(offsets)
        self.in_strip = Span(offsets, self.head - self.base, self.size, self.columns)

    def _move_strip(self, offsets: Sequence[int]) -> None:
        """Moves the strip's start to the heads."""
        most = max(offsets)
        new = self._new_slots(self.strip_len, most)
        kept = Span(offsets, self.head - self.base, self.strip_len, self.columns)
        for name, old in self.strip.items():
            if kept.is_slice:
                self.strip[name] = torch.cat([old[:, most:], new[name]], dim=1)
            else:
                self.strip[name] = kept.read(torch.cat([old, new[name]], dim=1))
        self.bases, self.base = list(self.heads), self.head
        self._draw_uniforms()

    def slots(self) -> Slots:
        """The window as the coming iteration finds it."""
        tokens, is_code = self.span.read(self.tokens), self.span.read(self.is_code)
        levels = self.span.read(self.levels) if self.source.config.num_levels else None
        wide = {name: self.in_strip.read(field) for name, field in self.strip.items()}
        uniforms = None
        if self.uniforms is not None:
            uniforms = self.in_strip.read(self.uniforms[:, :, self.iteration - self.first_draw])
        noisy, draft_probs, gumbel = (wide.get(name) for name in ("noisy", "draft_probs", "gumbel"))
        return Slots(tokens, is_code, levels, noisy, draft_probs, gumbel, uniforms)

    def fed(self, slots: Slots, num_refeed: int) -> tuple[Span, Tensor]:
        """The slots that a forward is fed, head - R .. head + W - 2, and their embeddings (B, R + W - 1, D).

        The last slot of the window is not fed: nothing is read from it.
        """
        starts = [head - num_refeed for head in self.heads]
        span = Span(starts, self.head - num_refeed, num_refeed + self.size - 1, self.columns)
        embeddings = F.embedding(span.read(self.tokens), self.source.table)
        if slots.noisy is not None and slots.levels is not None:
            drafts = embeddings[:, num_refeed:]
            noisy = self.source.space.denormalise(slots.noisy[:, :-1])
            drafts.copy_(noisy.where(slots.levels[:, :-1, None] > 0, drafts))
        return span, embeddings

    def renew(self, slots: Slots, tokens: Tensor, law: Tensor | None) -> None:
        """One iteration later: `tokens` (B, W), for drafts of law (B, W, K); noisy slots cleaner."""
        if slots.levels is not None and slots.noisy is not None:
            levels = self.source.next_levels(slots.levels, slots.tokens, tokens, law)
            if self.source.config.num_levels > 1:  # from level 1 a slot goes straight to a clean embedding
                noisy = self.source.renewed(slots.levels, slots.noisy, tokens, law)
                self.in_strip.write(self.strip["noisy"], noisy)
            self.span.write(self.levels, levels)
        self.span.write(self.tokens, tokens)  # last: what is read of the window may be a view of it
        if law is not None and "draft_probs" in self.strip:
            self.in_strip.write(self.strip["draft_probs"], law)

    def advance(self, num_committed: Sequence[int], committed: Tensor) -> None:
        """Moves each row's window on; `num_committed` on the host, `committed` (B,) on the device."""
        self.heads = [head + num for head, num in zip(self.heads, num_committed, strict=True)]
        self.head = self.head + committed
        self.iteration += 1
        self._place()
        if self.source.config.draft_init in REPEATED:
            self._repeat(committed, max(num_committed))
        if self.above is not None:
            self._start_from_above(self.above, committed, max(num_committed))

    def _repeat(self, committed: Tensor, most: int) -> None:
        """Lets the slots that entered the window repeat a neighbour; of a row, at most the last `most`."""
        slots = self.span.index[:, self.size - most :]
        ends = (self.head - committed + self.size)[:, None]
        tokens, found = repeated(self.tokens, slots, ends, self.neighbour, self.source.config.draft_init)
        found &= (slots >= ends) & self.is_code.gather(1, slots)
        self.tokens.scatter_(1, slots, tokens.where(found, self.tokens.gather(1, slots)))
        if "draft_probs" in self.strip:
            probs = self.strip["draft_probs"]
            place = (slots - self.base[:, None])[..., None].expand(-1, -1, probs.shape[-1])
            certain = F.one_hot(tokens.clamp_max(probs.shape[-1] - 1), probs.shape[-1]).to(probs)
            probs.scatter_(1, place, certain.where(found[..., None], probs.gather(1, place)))

    def _start_from_above(self, above: Tensor, committed: Tensor, most: int) -> None:
        """Lets the slots that entered the window hold the embedding of what now stands one row up."""
        slots = self.span.index[:, self.size - most :]
        ends = (self.head - committed + self.size)[:, None]
        tokens, found = repeated(self.tokens, slots, ends, above, "repeat_above")
        found = (found & (slots >= ends))[..., None]
        noisy = self.strip["noisy"]
        place = (slots - self.base[:, None])[..., None].expand(-1, -1, noisy.shape[-1])
        rows = F.embedding(tokens, self.source.normalised)
        noisy.scatter_(1, place, rows.where(found, noisy.gather(1, place)))

    def unfinished(self) -> list[int]:
        """Rows whose image has slots left."""
        return [row for row, (head, end) in enumerate(zip(self.heads, self.ends, strict=True)) if head < end]

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Keeps some rows."""
        index = torch.tensor(rows, device=self.head.device)
        self.heads, self.bases = [self.heads[row] for row in rows], [self.bases[row] for row in rows]
        self.head, self.base, self.seeds = self.head[index], self.base[index], self.seeds[index]
        self.ends, self.end = [self.ends[row] for row in rows], self.end[index]
        self.tokens, self.levels, self.is_code = self.tokens[index], self.levels[index], self.is_code[index]
        if self.source.config.draft_init in REPEATED:
            self.neighbour = self.neighbour[index]
        if self.above is not None:
            self.above = self.above[index]
        self.strip = {name: field[index] for name, field in self.strip.items()}
        if self.uniforms is not None:
            self.uniforms = self.uniforms[index]
        self._place()
