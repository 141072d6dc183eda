"""Which codes of a training sequence are noisy, and how much (paper, segment-wise multi-level noise)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sjd2_lightning.noise import TIED, NoiseProcess
from sjd2_lightning.run.values import Share, Within, wrong_values

Run = Annotated[int, Within(0, 2**20)]  # tokens of one level
Levels = Annotated[int, Within(1, 1000)]


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

    clean_run: tuple[Run, Run] = (1, 32)
    segment: tuple[Run, Run] = (1, 6)
    top_run: tuple[Run, Run] = (0, 24)
    clean_share: Share = 0.1

    def problems(self) -> list[str]:
        """What is wrong with the values, a line each, starting with the key."""
        least = {"clean_run": 1, "segment": 1, "top_run": 0}
        return wrong_values(self) + [
            f"{name}=[{low}, {high}]: must be [fewest, most] with {at_least} <= fewest <= most"
            for name, at_least in least.items()
            for low, high in [getattr(self, name)]
            if not at_least <= low <= high
        ]


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
class TrainingNoise:
    """Noise of training; the group `noise` of the configuration.

    Attributes:
        enabled: whether there is noise; without it training is ordinary next-token training.
        process: how noise comes and goes, as decoding will ask for it.
        num_levels: (fewest, most) levels; the number is drawn per batch, so that one checkpoint serves
            decoding with any number in between (not in the paper; our choice).
        val_levels: number of levels of the validation losses at noise.
        ramp: lengths of the segments of equal level.
        trajectory: whether noisy slots hold what decoding's own iterations make of them, see `states` (ours);
            otherwise the true embedding is perturbed (paper).
        mark_drafts: whether timestep tokens tell the drafts of state "draft" from clean codes; otherwise they
            are fed as decoding with one level feeds them, as clean ones (ours).
        random_grid: whether training draws the grid per batch, see `random_timesteps`; validation keeps the
            schedule.
        consistency: share of the target behind noise that is the model's own law on clean input in place of
            the true code, see `objective` (consistency distillation).
    """

    enabled: bool = True
    process: NoiseProcess = field(default_factory=NoiseProcess)
    num_levels: tuple[Levels, Levels] = (1, 8)
    val_levels: Levels = 4
    ramp: RampLaw = field(default_factory=RampLaw)
    trajectory: bool = False
    mark_drafts: bool = True
    random_grid: bool = False
    consistency: Share = 0.0

    @property
    def reads_gumbel(self) -> bool:
        """Whether the Gumbel vectors that decide the true codes are needed."""
        return self.trajectory or self.process.source in TIED

    @property
    def reads_law(self) -> bool:
        """Whether the law of clean input is needed, which costs a pass."""
        return self.reads_gumbel or self.process.source == "mean" or self.consistency > 0

    def problems(self) -> list[str]:
        """What is wrong with the values, a line each, starting with the key."""
        found = [f"process.{line}" for line in self.process.problems()]
        found += [f"ramp.{line}" for line in self.ramp.problems()] + wrong_values(self)
        low, high = self.num_levels
        if low > high:
            found.append(f"num_levels=[{low}, {high}]: must be [fewest, most] with 1 <= fewest <= most")
        if self.process.state == "draft" and not self.trajectory:
            found.append("process.state=draft: needs drafts; set noise.trajectory to true")
        if self.process.estimate == "expected" and not self.trajectory:
            found.append("process.estimate=expected: needs laws on the way; set noise.trajectory to true")
        if not self.mark_drafts and (self.process.state, self.process.estimate) != ("draft", "drawn"):
            found.append(
                "mark_drafts=False: feeds drafts as clean codes; set noise.process.state to draft and "
                "noise.process.estimate to drawn"
            )
        return found
