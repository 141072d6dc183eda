"""Noise levels and the one formula that training and decoding share.

Symbols of this file: `x0` clean normalised embedding, `xt` noisy one, `eps` standard normal noise,
`t` in [0, 1] the amount of noise, `s < t` the next one. A `level` indexes the grid of `t`: level 0 is
clean (t = 0), level `num_levels` pure noise (t = 1).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

SCHEDULES = ("linear", "karras")
TIED = ("tied", "tied_white")
SOURCES = ("gaussian", *TIED, "mean", "above")
STATES = ("blended", "draft")
ESTIMATES = ("drawn", "expected")


def timesteps(
    num_levels: int, kind: str = "linear", t_min: float = 0.02, rho: float = 7.0
) -> Float[Tensor, " grid"]:
    """The grid of t: `timesteps[0] == 0`, `timesteps[num_levels] == 1`, increasing.

    Source: paper ("can follow Karras": EDM, Karras et al. 2022, eq. 5, between 1 and `t_min`, then 0); the
    linear grid and all constants are not in the paper, our choice.

    Args:
        num_levels: number of noisy levels, >= 0.
        kind: "linear" (level / num_levels) or "karras".
        t_min: t of level 1, in (0, 1); karras only.
        rho: bend of the karras grid.

    Returns:
        (num_levels + 1,) float32.

    Raises:
        ValueError: for negative `num_levels` or an unknown kind.
    """
    if num_levels < 0:
        raise ValueError(f"num_levels must be >= 0, got {num_levels}")
    if kind == "linear":
        return torch.linspace(0, 1, num_levels + 1) if num_levels else torch.zeros(1)
    if kind == "karras":
        ramp = torch.linspace(0, 1, num_levels) if num_levels > 1 else torch.ones(num_levels)
        grid = (t_min ** (1 / rho) + ramp * (1 - t_min ** (1 / rho))) ** rho
        return torch.cat([torch.zeros(1), grid])
    raise ValueError(f"unknown noise schedule {kind!r}; known: {', '.join(SCHEDULES)}")


def random_timesteps(num_levels: int, rng: torch.Generator) -> Float[Tensor, " grid"]:
    """A grid of t drawn at random (ours): sorted uniforms, 0 in front and 1 at the end; (num_levels + 1,)."""
    inner = torch.rand(max(0, num_levels - 1), generator=rng).clamp_min(1e-4).sort().values
    return torch.cat([torch.zeros(1), inner, torch.ones(min(1, num_levels))])


def perturb(
    x0: Float[Tensor, "*batch D"], t: Float[Tensor, "*#batch #D"], eps: Float[Tensor, "*batch D"]
) -> Float[Tensor, "*batch D"]:
    """`x_t = (1 - t) x_0 + t eps` (paper, flow matching); `t` broadcasts against `x0` (..., D)."""
    return (1 - t) * x0 + t * eps


def kept_share(t: Float[Tensor, "*batch"], s: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """Share `s / t` of x_t that denoising from t to s < t keeps; 0 where t = 0."""
    return torch.where(t > 0, s / t.clamp_min(torch.finfo(t.dtype).tiny), 0.0)


def blend(
    xt: Float[Tensor, "*batch D"], x0_hat: Float[Tensor, "*batch D"], kept: Float[Tensor, "*#batch #D"]
) -> Float[Tensor, "*batch D"]:
    """`kept x_t + (1 - kept) x0_hat`."""
    return kept * xt + (1 - kept) * x0_hat


def denoise(
    xt: Float[Tensor, "*batch D"],
    x0_hat: Float[Tensor, "*batch D"],
    t: Float[Tensor, "*#batch #D"],
    s: Float[Tensor, "*#batch #D"],
) -> Float[Tensor, "*batch D"]:
    """`x_s = (s / t) x_t + (1 - s / t) x0_hat` for s < t (paper, in the form that holds at t = 1 too).

    At s = 0 it is `x0_hat`: an ordinary Jacobi update. Where t = 0 it returns `x0_hat` as well.
    """
    return blend(xt, x0_hat, kept_share(t, s))


@dataclass(frozen=True)
class Renewal:
    """What an iteration makes of a noisy slot; decoding and training's trajectories share it.

    Attributes:
        source: "mean": what plays the noise below the top is the mean embedding under the slot's law (ours);
            otherwise it is what the slot started from (paper).
        state: "blended" (paper: x_s) or "draft" (ours: x0_hat alone; below the top, the timestep token alone
            tells a noisy slot from a clean one).
        estimate: x0_hat: "drawn", the embedding of the token drawn (paper), or "expected", the mean
            embedding under the law (ours).
    """

    source: str = "gaussian"
    state: str = "blended"
    estimate: str = "drawn"

    @property
    def reads_mean(self) -> bool:
        """Whether mean embeddings under the law are needed."""
        return self.estimate == "expected" or (self.source == "mean" and self.state == "blended")

    def carried_share(self, grid: Float[Tensor, " grid"]) -> Float[Tensor, " grid"]:
        """By level, the share that is not x0_hat in what a slot holds one level down."""
        if self.state == "draft":
            return torch.zeros_like(grid)
        following = grid.roll(1)
        return following.where(grid > 0, 0.0) if self.source == "mean" else kept_share(grid, following)

    def __call__(
        self,
        held: Float[Tensor, "*batch D"],
        drawn: Float[Tensor, "*batch D"],
        mean: Float[Tensor, "*batch D"] | None,
        carried: Float[Tensor, "*#batch #D"],
    ) -> Float[Tensor, "*batch D"]:
        """What slots hold one level down, normalised.

        Args:
            held: (..., D) what they hold.
            drawn: (..., D) embeddings of the tokens drawn.
            mean: (..., D) mean embeddings under their laws; None where not `reads_mean`.
            carried: (..., 1) of their level, from `carried_share`.
        """
        if mean is None:
            return blend(held, drawn, carried)
        x0_hat = mean if self.estimate == "expected" else drawn
        return blend(mean if self.source == "mean" else held, x0_hat, carried)


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
