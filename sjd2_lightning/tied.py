"""Noise tied to the Gumbel vector that decides a slot's token, and the posterior of that vector (ours).

In replay mode a slot's token is the maximum of its log-probabilities plus its Gumbel vector. A slot that
starts from noise made of that very vector tells the slots to its right what it will become, as far as
context and noise together say so.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

_MEAN, _STD = 0.5772156649, math.pi / math.sqrt(6)  # of a standard Gumbel number


def tied_noise(
    gumbel: Float[Tensor, "*slots K"], normalised: Float[Tensor, "K D"]
) -> Float[Tensor, "*slots D"]:
    """Noise (..., D) of unit variance: the standardised vector (..., K) times the normalised table (K, D).

    Its dimensions are as correlated as the table's.
    """
    return ((gumbel - _MEAN) / _STD).to(normalised) @ normalised / math.sqrt(len(normalised))


def posterior_gumbel(
    log_probs: Float[Tensor, "*slots K"], ids: Int[Tensor, "*slots"], exponential: Float[Tensor, "*slots K"]
) -> Float[Tensor, "*slots K"]:
    """Gumbel vectors (..., K) given that `argmax(log_probs + gumbel)` is `ids`.

    With E standard exponential, -log E is a Gumbel number. Perturbed by log p_k it is -log(E / p_k); the
    largest of all is one of location 0, independent of which it is, and the others are such numbers
    truncated there (Maddison et al. 2014): -log(E_max + E / p_k).

    Args:
        log_probs: log-probabilities, normalised.
        ids: the codes that were drawn.
        exponential: standard exponential numbers; that of the drawn code decides the maximum.
    """
    chosen = ids[..., None]
    largest = exponential.gather(-1, chosen)
    others = exponential.scatter(-1, chosen, 0.0)
    return -torch.log(log_probs.exp() * largest + others)
