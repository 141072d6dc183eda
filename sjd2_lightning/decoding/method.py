"""A method put together for a batch: the one place that looks names up."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from sjd2_lightning.decoding.config import REPEATED, DecodingConfig
from sjd2_lightning.decoding.levels import Gaussian, NoiseLevels, Start, TableMean
from sjd2_lightning.decoding.passes import Pass
from sjd2_lightning.decoding.randomness import Purpose, gumbel, integers, slot_keys, stream
from sjd2_lightning.decoding.rules import (
    Exact,
    Match,
    Refiner,
    Replay,
    Rule,
    Scores,
    Slots,
    Verdict,
    couple,
    resample,
    reuse,
)
from sjd2_lightning.decoding.variants.first_drafts import OnEntry, OwnMaximum, Repeated
from sjd2_lightning.decoding.variants.grouped import Grouped
from sjd2_lightning.decoding.variants.pairs import Sweeper
from sjd2_lightning.decoding.variants.paper import Paper, Pure, keep
from sjd2_lightning.decoding.variants.starts import FromAbove, Tied
from sjd2_lightning.decoding.variants.tree import Tree, TreePass
from sjd2_lightning.embedding import EmbeddingSpace
from sjd2_lightning.models.backbone import ImageLayout, by_row
from sjd2_lightning.noise import TIED

REFINERS: dict[str, Refiner] = {"resample": resample, "couple": couple, "keep": keep, "reuse": reuse}
RULES: dict[str, Callable[[DecodingConfig, EmbeddingSpace], Rule]] = {
    "replay": lambda config, space: Replay(),
    "exact": lambda config, space: Exact(REFINERS[config.refiner]),
    "match": lambda config, space: Match(),
    "paper": lambda config, space: Paper(REFINERS[config.refiner], space),
    "pure": lambda config, space: Pure(max(1, config.size // max(1, config.num_levels))),
    "grouped": lambda config, space: Grouped(REFINERS[config.refiner], space, config.groups),
}

# (slots, verdict, scores, which slots this pass commits (B, W)) -> the next drafts (B, W)
Redraft = Callable[[Slots, Verdict, Scores, Tensor], Tensor]


class Method:
    """What one batch is decoded with; all randomness is keyed by (seed, slot).

    Args:
        config: the method's values.
        layouts: layouts of the images, one for all rows or one a row.
        table: (K + structural, D) embeddings by slot id.
        num_codes: K.
    """

    def __init__(
        self, config: DecodingConfig, layouts: Sequence[ImageLayout], table: Tensor, num_codes: int
    ) -> None:
        self.config, self.layouts = config, tuple(layouts)
        self.table, self.num_codes = table, num_codes
        self.size, self.num_levels = config.size, config.num_levels
        self.space = EmbeddingSpace(table[:num_codes])
        self.levels = NoiseLevels(config, table, self.space, self._start())
        self.rule = RULES[config.acceptance](config, self.space)
        self.on_entry = self._on_entry()
        tree = Tree.of(config, table, num_codes)
        self.one_pass = Pass(self) if tree is None else TreePass(self, tree)
        sweeps = config.pairs.table is not None and config.size > 1
        self.redraft: Redraft = Sweeper(config.pairs, table, num_codes) if sweeps else verified
        # what is kept of a slot between iterations
        self.keeps = self.rule.keeps | self.one_pass.keeps | ({"noisy"} if config.num_levels else set())

    def _start(self) -> Start:
        source = self.config.noise.source
        if source in TIED and self.num_levels:
            return Tied(self.space.normalise(self.space.table), source == "tied_white")
        return (Gaussian if source == "gaussian" else TableMean)(self.table.shape[1])

    def _on_entry(self) -> tuple[OnEntry, ...]:
        found: list[OnEntry] = []
        if self.config.draft_init == "gumbel":
            found.append(OwnMaximum())
        if self.config.draft_init in REPEATED:
            found.append(Repeated(self.layouts, self.config.draft_init))
        if self.config.noise.source == "above" and self.num_levels:
            found.append(FromAbove(self.layouts, self.levels.normalised))
        return tuple(found)

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
        levels = torch.where(forced < 0, self.num_levels, 0)
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


def verified(slots: Slots, verdict: Verdict, scores: Scores, settled: Tensor) -> Tensor:
    """The next drafts (B, W): the verdict's tokens where they are committed, its drafts elsewhere."""
    return verdict.tokens.where(settled, verdict.drafts)
