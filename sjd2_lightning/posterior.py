"""Noise that belongs to a token: the Gumbel vector that decides it, in decoding and given a real image.

Replay draws a slot's token as argmax(log p + g). Given the token, g has a posterior law; training draws from
it, so that a real image is what its vectors decide under the model's own law.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

_MEAN, _STD = 0.5772156649015329, math.pi / math.sqrt(6)  # of a standard Gumbel number


def posterior_gumbel(
    log_probs: Float[Tensor, "*slots K"], tokens: Int[Tensor, "*slots"], race: Float[Tensor, "*slots K"]
) -> Float[Tensor, "*slots K"]:
    """Gumbel vectors g (..., K) given that `tokens` are argmax(log_probs + g).

    Over tokens drawn from the law, g is standard Gumbel. Source: top-down sampling of Gumbel maxima (Maddison
    et al. 2014), as a race: exp(-g_k) / p_k is the time at which code k arrives. The first arrival takes a
    standard exponential time whatever the law; the others, being memoryless, start from there.

    Args:
        log_probs: (..., K) normalised.
        tokens: (...,) the codes of the maximum.
        race: (..., K) independent standard exponential numbers.
    """
    chosen = tokens[..., None]
    first = race.gather(-1, chosen)
    gumbel = -torch.log(log_probs.exp() * first + race)
    return gumbel.scatter(-1, chosen, -first.log() - log_probs.gather(-1, chosen))


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
    return ((gumbel - _MEAN) / _STD) @ rows
