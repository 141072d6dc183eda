"""The space that noise lives in: embeddings normalised per dimension over the image vocabulary."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F


class EmbeddingSpace:
    """Normalisation `e = (m - mu) / sd` of embeddings m, with mu and sd over the vocabulary axis (paper).

    The paper leaves open whether the statistics are of the image rows or the whole table; ours are of the
    image rows. Without normalisation the paper's denoising produces pure noise.

    Args:
        table: (K, D) embeddings of the image codes, as the trunk is fed them.
    """

    def __init__(self, table: Float[Tensor, "K D"]) -> None:
        table = table.detach()
        self.mean = table.mean(0)
        self.std = table.std(0, correction=0).clamp_min(1e-6)
        self.table = table

    def normalise(self, embeddings: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        """(..., D) embeddings of the trunk, normalised."""
        return (embeddings - self.mean) / self.std

    def denormalise(self, normalised: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        """(..., D) normalised embeddings, as the trunk is fed them."""
        return normalised * self.std + self.mean

    def nearest_ids(self, normalised: Float[Tensor, "*batch D"]) -> Int[Tensor, "*batch"]:
        """Codes (...,) whose normalised embeddings are nearest by cosine (paper: drafts of noisy slots)."""
        rows = F.normalize(self.normalise(self.table), dim=-1)
        return (F.normalize(normalised, dim=-1) @ rows.T).argmax(-1)

    def timestep_tokens(self, t: Float[Tensor, " T"]) -> Float[Tensor, "T D"]:
        """Side tokens (T, D) for the amounts of noise t (T,).

        Sinusoidal encodings put through the same normalisation (paper): standardised over their dimensions,
        then de-normalised, so that they look like any other embedding. No new parameters.
        """
        half = (self.mean.shape[0] + 1) // 2
        rates = torch.exp(-math.log(10_000) * torch.arange(half, device=t.device) / half)
        angles = 1000 * t[:, None].float() * rates
        encoding = torch.cat([angles.sin(), angles.cos()], dim=-1)[:, : self.mean.shape[0]]
        encoding = F.layer_norm(encoding, encoding.shape[-1:]).to(self.mean.dtype)
        return self.denormalise(encoding)
