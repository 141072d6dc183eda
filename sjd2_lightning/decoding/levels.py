"""Noise of the drafted slots: what a slot starts from, and how each pass makes it one level cleaner."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from sjd2_lightning.decoding.config import DecodingConfig
from sjd2_lightning.decoding.randomness import Purpose, normal, stream
from sjd2_lightning.decoding.rules import Scores, Slots
from sjd2_lightning.embedding import EmbeddingSpace

# slot keys (B, n) -> what the slots start from, (B, n, D) normalised
Start = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Gaussian:
    """Slots start from standard normal noise of their own (paper).

    Attributes:
        dim: D.
    """

    dim: int

    def __call__(self, keys: Tensor) -> Tensor:
        return normal(stream(keys, Purpose.NOISE), self.dim)


@dataclass(frozen=True)
class TableMean:
    """Slots start from the mean embedding of the table, which is the origin of the normalised space (ours).

    Attributes:
        dim: D.
    """

    dim: int

    def __call__(self, keys: Tensor) -> Tensor:
        return torch.zeros(*keys.shape, self.dim, device=keys.device)


class NoiseLevels:
    """Levels and noisy embeddings of slots, from pass to pass.

    Args:
        config: the method: its number of levels, its noise, its level rule.
        table: (K + structural, D) embeddings by slot id.
        space: normalised space of the codes.
        start: what slots start from.
    """

    def __init__(self, config: DecodingConfig, table: Tensor, space: EmbeddingSpace, start: Start) -> None:
        self.config, self.start, self.space, self.table = config, start, space, table
        self.num_codes = len(space.table)
        # single precision whatever the trunk's: timestep tokens are of 1000 t, which half precision garbles
        self.timesteps = config.noise.grid(config.num_levels).to(table.device)
        if config.num_levels:
            self.normalised = space.normalise(table)
            self.t = self.timesteps.to(table)[:, None]  # (levels + 1, 1)

    def timestep_tokens(self) -> Tensor:
        """(levels, D) one for each noisy level."""
        return self.space.timestep_tokens(self.timesteps[1:])

    def embeddings(self, noisy: Tensor) -> Tensor:
        """(B, n, D) what the trunk is fed of noisy slots (B, n, D)."""
        return self.space.denormalise(noisy)

    def cleaner(self, slots: Slots, drafts: Tensor, scores: Scores) -> Tensor:
        """What noisy slots hold one level down (B, W, D), by the next drafts (B, W)."""
        assert slots.noisy is not None
        mean = None
        if self.config.noise.reads_mean:
            mean = scores.probs.to(self.normalised) @ self.normalised[: self.num_codes]
        drawn = F.embedding(drafts, self.normalised)
        t, s = F.embedding(slots.levels, self.t), F.embedding((slots.levels - 1).clamp_min(0), self.t)
        return self.config.noise.step(slots.noisy, drawn, mean, t, s)

    def lower(self, slots: Slots, drafts: Tensor, scores: Scores) -> Tensor:
        """Levels (B, W) of the next iteration, by the next drafts (B, W): one less, or 0 by the rule."""
        lower = (slots.levels - 1).clamp_min(0)
        skips = LEVEL_RULES[self.config.level_rule](self.config, slots, drafts, scores)
        return lower if skips is None else lower.masked_fill(skips, 0)


def _age(config: DecodingConfig, slots: Slots, drafts: Tensor, scores: Scores) -> None:
    """No slot skips a level (paper)."""


def _stable(config: DecodingConfig, slots: Slots, drafts: Tensor, scores: Scores) -> Tensor:
    """(B, W) slots whose next draft is their last one (ours); new slots have none that means anything."""
    return (drafts == slots.tokens) & (slots.levels < config.num_levels)


def _confident(config: DecodingConfig, slots: Slots, drafts: Tensor, scores: Scores) -> Tensor:
    """(B, W) slots whose law gives their draft at least `confidence` (ours)."""
    codes = drafts.clamp_max(scores.log.shape[-1] - 1)[..., None]  # structural slots are clean anyway
    return scores.probs.gather(-1, codes).squeeze(-1) >= config.confidence


LEVEL_RULES = {"age": _age, "stable": _stable, "confident": _confident}
