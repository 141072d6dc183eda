"""A method put together for a batch: the one place that looks names up."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from sjd2_lightning.decoding.config import OWN, REPEATED, DecodingConfig
from sjd2_lightning.decoding.levels import Gaussian, NoiseLevels, Start, TableMean
from sjd2_lightning.decoding.passes import Pass
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
from sjd2_lightning.decoding.start import SlotSource
from sjd2_lightning.decoding.state import State
from sjd2_lightning.decoding.variants.corrector import Corrected, RowUp
from sjd2_lightning.decoding.variants.drafter import BlockDrafts
from sjd2_lightning.decoding.variants.early_exit import EarlyExitPass
from sjd2_lightning.decoding.variants.first_drafts import FromAbove, OwnMaximum, Repeated, Tied
from sjd2_lightning.decoding.variants.grouped import Grouped
from sjd2_lightning.decoding.variants.pairs import Sweeper
from sjd2_lightning.decoding.variants.paper import Paper, Pure, keep
from sjd2_lightning.decoding.variants.tree import ReplayTreePass, Tree, TreePass
from sjd2_lightning.decoding.window import OnEntry
from sjd2_lightning.embedding import EmbeddingSpace
from sjd2_lightning.models.backbone import Backbone, ImageLayout
from sjd2_lightning.models.draft_corrector import DraftCorrector
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
TREE_PASSES: dict[str, type[TreePass]] = {"replay": ReplayTreePass, "exact": TreePass}

# (slots, verdict, scores, which slots this pass commits (B, W)) -> the next drafts (B, W)
Redraft = Callable[[Slots, Verdict, Scores, Tensor], Tensor]


class Method:
    """What batches are decoded with.

    Args:
        config: the method's values.
        table: (K + structural, D) embeddings by slot id.
        num_codes: K.
        corrector: what the model itself corrects drafts by, if it does.
    """

    def __init__(
        self, config: DecodingConfig, table: Tensor, num_codes: int, corrector: DraftCorrector | None = None
    ) -> None:
        self.config, self.table = config, table
        self.space = EmbeddingSpace(table[:num_codes])
        self.levels = NoiseLevels(config, table, self.space, self._start())
        rule = RULES[config.acceptance](config, self.space)
        tree = Tree.of(config, table, num_codes)
        plain = EarlyExitPass if config.exits_early else Pass
        self.one_pass = (
            plain(config, rule) if tree is None else TREE_PASSES[config.acceptance](config, rule, tree)
        )
        self.redraft = self._redraft(num_codes, corrector)
        noisy = frozenset({"noisy"} if config.num_levels else ())
        self.source = SlotSource(config, self.levels, rule.keeps | self.one_pass.keeps | noisy)
        self.on_entry = self._on_entry(num_codes)

    @classmethod
    def of(cls, config: DecodingConfig, backbone: Backbone) -> Method:
        """A method with a model's table and what the model itself brings."""
        return cls(config, backbone.slot_table(), backbone.num_codes, backbone.corrector)

    def begin(self, seeds: Tensor, layouts: Sequence[ImageLayout], num_columns: int) -> State:
        """The state of a batch in front of its first slot; arguments of `SlotSource.begin`."""
        state = self.source.begin(seeds, layouts, num_columns)
        for event in self.on_entry:
            state = event.start(self.source, layouts, state)
        return state

    def _redraft(self, num_codes: int, corrector: DraftCorrector | None) -> Redraft:
        config = self.config
        if config.corrects and (config.corrector.weights != OWN or corrector is not None):
            temperature = config.sampling.temperature
            return Corrected(config.corrector, temperature, self.table, num_codes, corrector)
        if config.size > 1 and config.pairs.table is not None:
            return Sweeper(config.pairs, self.table, num_codes)
        return verified

    def _start(self) -> Start:
        source = self.config.noise.source
        if source in TIED and self.config.num_levels:
            return Tied(self.space.normalise(self.space.table), source == "tied_white")
        return (Gaussian if source == "gaussian" else TableMean)(self.table.shape[1])

    def _on_entry(self, num_codes: int) -> tuple[OnEntry, ...]:
        config = self.config
        found: list[OnEntry] = []
        if config.draft_init == "gumbel":
            found.append(OwnMaximum())
        if config.draft_init in REPEATED:
            found.append(Repeated(config.draft_init))
        if config.noise.source == "above" and config.num_levels:
            found.append(FromAbove(self.levels.normalised))
        if isinstance(self.redraft, Corrected):
            found.append(RowUp())
        if config.size > 1 and config.drafter.weights is not None:
            found.append(BlockDrafts(config.drafter, config.sampling, self.table, num_codes))
        return tuple(found)


def verified(slots: Slots, verdict: Verdict, scores: Scores, settled: Tensor) -> Tensor:
    """The next drafts (B, W): the verdict's tokens where they are committed, its drafts elsewhere."""
    return verdict.tokens.where(settled, verdict.drafts)
