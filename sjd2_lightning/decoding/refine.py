"""What becomes of drafts that verification did not reach. One refiner, one function.

Whatever a refiner returns was drawn so that its law is the current `target_probs`, except `keep`, which is
the paper's rule and not exact.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from sjd2_lightning.decoding.probs import draw
from sjd2_lightning.decoding.verify import Verdict


class Laws(NamedTuple):
    """Drafts of one iteration, what they were drawn from, and what the model says now."""

    draft_tokens: Tensor  # (B, W)
    draft_probs: Tensor  # (B, W, K)
    target_probs: Tensor  # (B, W, K)
    noisy: Tensor | None  # (B, W) True = the slot was fed with noise; None = no slot was


Refiner = Callable[[Laws, Verdict, Tensor], Tensor]


def resample(laws: Laws, verdict: Verdict, uniform: Tensor) -> Tensor:
    """Fresh independent draws (SJD, Teng et al. 2024); `uniform` (B, W)."""
    return draw(laws.target_probs, uniform)


def couple(laws: Laws, verdict: Verdict, uniform: Tensor) -> Tensor:
    """What accept-or-residual gave in every slot: a maximal coupling of old and new law (MC-SJD / SCD)."""
    return verdict.tokens


def keep(laws: Laws, verdict: Verdict, uniform: Tensor) -> Tensor:
    """Keep a clean draft whose ratio target / draft is at least 0.5, else draw anew (paper; not exact)."""
    chosen = laws.draft_tokens[..., None]
    target, draft = (p.gather(-1, chosen).squeeze(-1) for p in (laws.target_probs, laws.draft_probs))
    kept = target >= 0.5 * draft
    if laws.noisy is not None:
        kept &= ~laws.noisy
    return laws.draft_tokens.where(kept, draw(laws.target_probs, uniform))


REFINERS: dict[str, Refiner] = {"resample": resample, "couple": couple, "keep": keep}
