"""What becomes of drafts that verification did not reach. One refiner, one function.

A refiner returns tokens and the law that it says they follow. Where that is the law they were really drawn
from, given what stands to their left, the method is exact; `keep` is the paper's rule and is not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from sjd2_lightning.decoding.probs import draw
from sjd2_lightning.decoding.verify import Verdict

KEEP_RATIO = 0.5  # least ratio target / draft of a draft that is kept (paper)


class Laws(NamedTuple):
    """Drafts of one iteration, what they were drawn from, and what the model says now."""

    draft_tokens: Tensor  # (B, W)
    draft_probs: Tensor  # (B, W, K)
    target_probs: Tensor  # (B, W, K)
    noisy: Tensor | None  # (B, W) True = the slot was fed with noise; None = no slot was


class Refined(NamedTuple):
    """Drafts of the next iteration, tokens (B, W), and the law that they follow, probs (B, W, K)."""

    tokens: Tensor
    probs: Tensor


Refiner = Callable[[Laws, Verdict, Tensor], Refined]


def resample(laws: Laws, verdict: Verdict, uniform: Tensor) -> Refined:
    """Fresh independent draws (SJD, Teng et al. 2024); `uniform` (B, W)."""
    return Refined(draw(laws.target_probs, uniform), laws.target_probs)


def couple(laws: Laws, verdict: Verdict, uniform: Tensor) -> Refined:
    """What accept-or-residual gave in every slot: a maximal coupling of old and new law (MC-SJD / SCD)."""
    return Refined(verdict.tokens, laws.target_probs)


def keep(laws: Laws, verdict: Verdict, uniform: Tensor) -> Refined:
    """Keep a clean draft whose ratio target / draft is at least 0.5, else draw anew (paper).

    Not exact: the law is recorded as the target's, which drafts that were kept do not follow.
    """
    chosen = laws.draft_tokens[..., None]
    target, draft = (p.gather(-1, chosen).squeeze(-1) for p in (laws.target_probs, laws.draft_probs))
    kept = target >= KEEP_RATIO * draft
    if laws.noisy is not None:
        kept &= ~laws.noisy
    tokens = laws.draft_tokens.where(kept, draw(laws.target_probs, uniform))
    return Refined(tokens, laws.target_probs)


def reuse(laws: Laws, verdict: Verdict, uniform: Tensor) -> Refined:
    """`keep`, with the law that its drafts really follow (ours; the idea of reuse is SJD++'s).

    A draft is one that was kept, or a fresh draw in place of one that was not: a mixture of the old law
    where its ratio is at least 0.5, and of the target with the mass of all other codes.
    """
    stays = laws.target_probs >= KEEP_RATIO * laws.draft_probs  # (B, W, K)
    kept = stays.gather(-1, laws.draft_tokens[..., None]).squeeze(-1)
    tokens = laws.draft_tokens.where(kept, draw(laws.target_probs, uniform))
    old = laws.draft_probs.where(stays, 0)
    return Refined(tokens, old + (1 - old.sum(-1, keepdim=True)) * laws.target_probs)


REFINERS: dict[str, Refiner] = {"resample": resample, "couple": couple, "keep": keep, "reuse": reuse}
