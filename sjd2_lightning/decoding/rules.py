"""Which drafts stand: the acceptance rules. Each is a function of one iteration's laws and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sjd2_lightning.decoding.law import draw, residual


class Verdict(NamedTuple):
    """What a rule says of every slot, as if all slots to its left stood.

    Attributes:
        tokens: (B, W) what the slot holds if it is reached: its draft, or the token drawn in its place.
        accept_mask: (B, W) True = the draft stands.
    """

    tokens: Int[Tensor, "B W"]
    accept_mask: Bool[Tensor, "B W"]


def verify_replay(
    draft_tokens: Int[Tensor, "B W"], target_scores: Float[Tensor, "B W K"], gumbel: Float[Tensor, "B W K"]
) -> Verdict:
    """Replay (ours): a slot's token is the maximum of its law perturbed by the slot's own Gumbel vector.

    Autoregression with the same vectors takes the same maximum, so a draft that equals it is its token.

    Args:
        draft_tokens: (B, W).
        target_scores: (B, W, K) unnormalised log-probabilities.
        gumbel: (B, W, K), fixed for a slot's lifetime.
    """
    tokens = (target_scores + gumbel).argmax(-1)
    return Verdict(tokens, tokens == draft_tokens)


def verify_speculative(
    draft_tokens: Int[Tensor, "B W"],
    draft_probs: Float[Tensor, "B W K"],
    target_probs: Float[Tensor, "B W K"],
    accept_u: Float[Tensor, "B W"],
    residual_u: Float[Tensor, "B W"],
) -> Verdict:
    """Speculative sampling: accept with probability `min(1, target / draft)`, else draw from the residual.

    Source: Leviathan et al. 2023, alg. 1; in every slot at once it is a maximal coupling of the two laws.
    A draft of recorded probability zero is rejected.

    Args:
        draft_tokens: (B, W).
        draft_probs: (B, W, K) the laws that the drafts were really drawn from.
        target_probs: (B, W, K).
        accept_u, residual_u: (B, W) independent uniform numbers.
    """
    chosen = draft_tokens[..., None]
    target, draft = (p.gather(-1, chosen).squeeze(-1) for p in (target_probs, draft_probs))
    accept_mask = (accept_u * draft < target) & (draft > 0)
    replacement = draw(residual(target_probs, draft_probs), residual_u)
    return Verdict(draft_tokens.where(accept_mask, replacement), accept_mask)


def verify_siblings(
    candidates: Int[Tensor, "B n"],
    draft_probs: Float[Tensor, "B K"],
    target_probs: Float[Tensor, "B K"],
    accept_u: Float[Tensor, "B m"],
    residual_u: Float[Tensor, " B"],
) -> tuple[Int[Tensor, " B"], Int[Tensor, " B"]]:
    """A slot whose draft was rejected: its siblings in turn, then the residual of them all.

    Source: recursive rejection sampling without replacement (Yang et al. 2024, Jeon et al. 2024). After each
    rejection the target is the residual, and the law of the next candidate is the draft law without those
    that went before; both are made to sum to one again. With the draft's own test in front the token follows
    the target exactly.

    Args:
        candidates: (B, n) the rejected draft, then its n - 1 siblings, drawn from the draft law one after
            the other without replacement.
        draft_probs, target_probs: (B, K).
        accept_u: (B, n - 1) and residual_u: (B,) independent uniform numbers, not those of the draft's test.

    Returns:
        tokens (B,), and which sibling (B,) each is, from 0; -1 = none.
    """
    rest = residual(target_probs, draft_probs)
    which = torch.full_like(candidates[:, 0], -1)
    for number in range(candidates.shape[1] - 1):
        draft_probs = draft_probs.scatter(-1, candidates[:, number : number + 1], 0.0)
        draft_probs = draft_probs / draft_probs.sum(-1, keepdim=True).clamp_min(1e-30)
        rest = rest / rest.sum(-1, keepdim=True)
        chosen = candidates[:, number + 1 : number + 2]
        target, draft = (p.gather(-1, chosen).squeeze(-1) for p in (rest, draft_probs))
        stands = (accept_u[:, number] * draft < target) & (draft > 0)
        which = torch.where(stands & (which < 0), number, which)
        rest = residual(rest, draft_probs)
    tokens = candidates.gather(1, which[:, None] + 1).squeeze(1)
    return tokens.where(which >= 0, draw(rest, residual_u)), which


def verify_match(
    draft_tokens: Int[Tensor, "B W"], target_probs: Float[Tensor, "B W K"], uniform: Float[Tensor, "B W"]
) -> Verdict:
    """Jacobi decoding: a draft stands if it is the token that is drawn now.

    Source: Song et al. 2021 and Santilli et al. 2023 for greedy decoding, where the draw is the maximum;
    with fresh numbers it is the sampling baseline of SJD. Lossless: every token is a draw from its target.

    Args:
        draft_tokens: (B, W).
        target_probs: (B, W, K).
        uniform: (B, W) fresh numbers.
    """
    tokens = draw(target_probs, uniform)
    return Verdict(tokens, tokens == draft_tokens)


def verify_pure(
    draft_tokens: Int[Tensor, "B W"],
    target_probs: Float[Tensor, "B W K"],
    uniform: Float[Tensor, "B W"],
    clean: Bool[Tensor, "B W"],
    reach: int,
) -> Verdict:
    """Pure denoising: a slot near the head stands as soon as it is clean, whatever its target says.

    Source: SJD2, appendix B: fastest, with artefacts. Not exact.

    Args:
        draft_tokens: (B, W).
        target_probs: (B, W, K).
        uniform: (B, W) fresh numbers, for the slots that do not stand and are noisy.
        clean: (B, W) True = the slot was fed without noise.
        reach: slots from the head within which drafts may stand; window / num_levels in the paper.
    """
    tokens = draft_tokens.where(clean, draw(target_probs, uniform))
    accept_mask = clean.clone()
    accept_mask[:, reach:] = False
    return Verdict(tokens, accept_mask)


def num_leading(mask: Bool[Tensor, "B W"]) -> Int[Tensor, " B"]:
    """(B,) length of the run of True at the left end of each row (B, W)."""
    return mask.cumprod(-1, dtype=torch.long).sum(-1)


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
