"""Noise levels and the one formula that training and decoding share.

Symbols of this file: `x0` clean normalised embedding, `xt` noisy one, `eps` standard normal noise,
`t` in [0, 1] the amount of noise, `s < t` the next one. A `level` indexes the grid of `t`: level 0 is
clean (t = 0), level `num_levels` pure noise (t = 1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

SCHEDULES = ("linear", "karras")
TIED = ("tied", "tied_white")
SOURCES = ("gaussian", *TIED, "mean", "above")
STATES = ("blended", "draft")
ESTIMATES = ("drawn", "expected")

_GUMBEL_MEAN, _GUMBEL_STD = 0.5772156649015329, math.pi / math.sqrt(6)  # of a standard Gumbel number


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


def tied_rows(normalised: Float[Tensor, "K D"], white: bool = False) -> Float[Tensor, "K D"]:
    """What `tied_noise` multiplies Gumbel vectors with (ours), float32.

    Args:
        normalised: (K, D) normalised embeddings of the image codes.
        white: take the correlation of the table's dimensions out, so that the noise has none; of a table
            of fewer than D directions, noise is then white within those.
    """
    rows = normalised.float() / math.sqrt(len(normalised))
    if not white:
        return rows
    values, vectors = torch.linalg.eigh(rows.T @ rows)
    scale = torch.where(values > 1e-5 * values[-1], values.clamp_min(1e-30).rsqrt(), 0.0)
    return rows @ (vectors * scale) @ vectors.T


def tied_noise(gumbel: Float[Tensor, "*slots K"], rows: Float[Tensor, "K D"]) -> Float[Tensor, "*slots D"]:
    """Noise (..., D) that a slot starts from, made of the Gumbel vector that decides its token (ours).

    A sum of K embeddings with independent weights of mean 0 and variance 1, over sqrt(K): each dimension has
    mean 0 and variance 1, and for many codes it is nearly Gaussian.

    Args:
        gumbel: (..., K).
        rows: (K, D) from `tied_rows`.
    """
    return ((gumbel - _GUMBEL_MEAN) / _GUMBEL_STD) @ rows
