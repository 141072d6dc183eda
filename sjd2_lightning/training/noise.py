"""training.noise."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sjd2_lightning.noise import ESTIMATES, SOURCES, STATES, TIED, Renewal


def random_timesteps(num_levels: int, rng: torch.Generator) -> Float[Tensor, " grid"]:
    """A grid of t drawn at random (ours): sorted uniforms, 0 in front and 1 at the end; (num_levels + 1,)."""
    inner = torch.rand(max(0, num_levels - 1), generator=rng).clamp_min(1e-4).sort().values
    return torch.cat([torch.zeros(1), inner, torch.ones(min(1, num_levels))])


@dataclass(frozen=True)
class RampLaw:
    """How training cuts a sequence into segments of equal level (paper: random lengths, consecutive levels).

    A chain of ramps: a clean run, then levels 1, 2, ... in raster order; the ramp stops at a random level.
    The laws of the lengths are not in the paper; our choice. A ramp that reaches the top level may stay
    there: behind the window's ramp, decoding has a run of pure noise.

    Attributes:
        clean_run: (shortest, longest) run of clean tokens before a ramp, uniform.
        segment: (shortest, longest) run of tokens of one noisy level, uniform.
        top_run: (shortest, longest) extra tokens at the top level of a ramp that reaches it, uniform.
        clean_share: share of sequences that stay clean throughout.
    """

    clean_run: tuple[int, int] = (1, 32)
    segment: tuple[int, int] = (1, 6)
    top_run: tuple[int, int] = (0, 24)
    clean_share: float = 0.1


def draw_levels(
    batch: int, length: int, num_levels: int, law: RampLaw, rng: torch.Generator
) -> Int[Tensor, "batch length"]:
    """Levels (batch, length) int64 of a batch, drawn on the CPU (paper, segment-wise multi-level noise)."""
    levels = torch.zeros(batch, length, dtype=torch.long)
    if num_levels == 0:
        return levels
    for row in levels:
        if torch.rand((), generator=rng) >= law.clean_share:
            row.copy_(_chain_of_ramps(length, num_levels, law, rng))
    return levels


def _chain_of_ramps(length: int, num_levels: int, law: RampLaw, rng: torch.Generator) -> Tensor:
    def uniform(bounds: tuple[int, int]) -> int:
        return int(torch.randint(bounds[0], bounds[1] + 1, (), generator=rng))

    values: list[int] = []
    # the first ramp may start in its middle, as the window does when decoding starts
    start = uniform((0, num_levels))
    while len(values) < length:
        if start == 0:
            values += [0] * uniform(law.clean_run)
        top = uniform((max(1, start), num_levels))
        for level in range(max(1, start), top + 1):
            values += [level] * uniform(law.segment)
        if top == num_levels:
            values += [top] * uniform(law.top_run)
        start = 0
    return torch.tensor(values[:length])


@dataclass(frozen=True)
class NoiseConfig:
    """Noise of training.

    Attributes:
        num_levels: (fewest, most) levels; the grid size is drawn per batch, so that one checkpoint serves
            decoding with any number in between (not in the paper; our choice).
        schedule, t_min, rho: grid of t, see `timesteps`.
        ramp: law of the segments.
        enabled: False is ordinary autoregressive training.
        source: what slots start from at the top level: "gaussian" (paper), or "tied" and "tied_white" (ours):
            made of the Gumbel vector that decides the token, see `posterior`; or "above" (ours): the
            embedding of the code one row up, told from a clean one by its timestep token; or "mean" (ours):
            the mean embedding of the table, and below the top that under the law of clean input.
        trajectory: noisy slots hold what decoding's own iterations make of them, see `trajectory` (ours);
            False perturbs the true embedding (paper).
        state, estimate: how slots move on a trajectory, see `Renewal`.
        mark_drafts: whether timestep tokens tell the drafts of state "draft" from clean codes; False feeds
            them as decoding with one level does, as clean ones (ours).
        random_grid: training draws the grid per batch, see `random_timesteps`; validation keeps the schedule.
        consistency: share of the target behind noise that is the model's own law on clean input in place of
            the true code, see `objective` (consistency distillation).
    """

    num_levels: tuple[int, int] = (1, 8)
    schedule: str = "linear"
    t_min: float = 0.02
    rho: float = 7.0
    ramp: RampLaw = field(default_factory=RampLaw)
    enabled: bool = True
    source: str = "gaussian"
    trajectory: bool = False
    state: str = "blended"
    estimate: str = "drawn"
    mark_drafts: bool = True
    random_grid: bool = False
    consistency: float = 0.0

    @property
    def reads_gumbel(self) -> bool:
        """Whether the Gumbel vectors that decide the true codes are needed."""
        return self.trajectory or self.source in TIED

    @property
    def reads_law(self) -> bool:
        """Whether the law of clean input is needed, which costs a pass."""
        return self.reads_gumbel or self.source == "mean" or self.consistency > 0

    @property
    def renewal(self) -> Renewal:
        """What an iteration makes of a noisy slot."""
        return Renewal(self.source, self.state, self.estimate)

    def problems(self) -> list[str]:
        """What is wrong with the choices, a sentence each."""
        choices = {
            "source": (self.source, SOURCES),
            "state": (self.state, STATES),
            "estimate": (self.estimate, ESTIMATES),
        }
        found = [
            f"noise.{name} must be one of {', '.join(known)}; got {value!r}"
            for name, (value, known) in choices.items()
            if value not in known
        ]
        if self.state == "draft" and not self.trajectory:
            found.append("noise.state 'draft' needs drafts: set noise.trajectory to true")
        if self.estimate == "expected" and not self.trajectory:
            found.append("noise.estimate 'expected' needs laws on the way: set noise.trajectory to true")
        if not 0 <= self.consistency <= 1:
            found.append(f"noise.consistency is a share: it must lie in [0, 1], got {self.consistency}")
        if not self.mark_drafts and (self.state, self.estimate) != ("draft", "drawn"):
            found.append(
                "noise.mark_drafts false feeds drafts as clean codes: set noise.state to draft and "
                "noise.estimate to drawn"
            )
        return found
