"""Noise levels and the one formula that training and decoding share.

Symbols of this file: `x0` clean normalised embedding, `xt` noisy one, `eps` standard normal noise,
`t` in [0, 1] the amount of noise, `s < t` the next one. A `level` indexes the grid of `t`: level 0 is
clean (t = 0), level `num_levels` pure noise (t = 1).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

SCHEDULES = ("linear", "karras")
PATHS = ("flow", "drafts")  # what a slot between pure noise and clean holds


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
