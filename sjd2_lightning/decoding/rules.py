"""Which drafts stand, and what becomes of the others: one class for each acceptance rule.

A rule says what must be kept of a slot for it (`keeps`) and gives a verdict on every slot of the window from
one pass. The variants' rules are in `variants`; `method` finds a rule by its name.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sjd2_lightning.decoding.law import draw, residual

KEEP_RATIO = 0.5  # least ratio target / draft of a draft that is kept (paper)


class Slots(NamedTuple):
    """The window in one iteration, (B, W, ...) each. A field that a method has no use for is None.

    Attributes:
        tokens: (B, W) drafts, as slot ids.
        is_code: (B, W) True = a code is drawn here; False = structural, the draft is the token.
        levels: (B, W) noise level; 0 = fed as the clean embedding of its draft.
        noisy: (B, W, D) normalised noisy embedding; its value matters where the level is not 0.
        draft_probs: (B, W, K) the law that the draft was drawn from.
        gumbel: (B, W, K) the slot's own Gumbel noise.
        uniforms: (B, W, 3) fresh numbers of this iteration: to accept, for the residual, for another draw.
        upper: (B, W) where in the window the slot one row up is; below 0 = left of it, or nowhere.
    """

    tokens: Tensor
    is_code: Tensor
    levels: Tensor
    noisy: Tensor | None = None
    draft_probs: Tensor | None = None
    gumbel: Tensor | None = None
    uniforms: Tensor | None = None
    upper: Tensor | None = None


class Read(NamedTuple):
    """What the laws of slots are read from.

    Attributes:
        hidden: (C * B, W, D) hidden states; with guidance those of the prompts, then of their empty twins.
        scale: guidance scale: one number, or (B, W) one a slot.
    """

    hidden: Tensor
    scale: float | Tensor

    def first(self, num: int) -> Read:
        """That of the first slots."""
        scale = self.scale[:, :num] if isinstance(self.scale, Tensor) else self.scale
        return Read(self.hidden[:, :num], scale)


class Scores:
    """What a pass says of slots.

    Attributes:
        log: (B, W, K) unnormalised log-probabilities of every code.
        read: what they were read from; None where nobody asks.
    """

    def __init__(self, log: Float[Tensor, "B W K"], read: Read | None = None) -> None:
        self.log, self.read = log, read

    @cached_property
    def probs(self) -> Float[Tensor, "B W K"]:
        """The laws (B, W, K), made when somebody first reads them."""
        return self.log.softmax(-1)


def known_codes(tokens: Int[Tensor, "B W"], levels: Int[Tensor, "B W"], num_codes: int) -> Int[Tensor, "B W"]:
    """(B, W) codes that a pass was fed as they are; K where it was fed noise or a structural token.

    Args:
        tokens: (B, W) slot ids.
        levels: (B, W) noise levels.
        num_codes: K.
    """
    return tokens.clamp_max(num_codes).masked_fill(levels > 0, num_codes)


class Verdict(NamedTuple):
    """What a rule says of every slot, as if all slots to its left stood.

    Attributes:
        tokens: (B, W) what the slot holds if it is reached: its draft, or the token drawn in its place.
        accept_mask: (B, W) True = the draft stands.
        drafts: (B, W) what the slot drafts next if it is not reached.
        draft_probs: (B, W, K) the law that `drafts` follow; None = that of this pass.
    """

    tokens: Int[Tensor, "B W"]
    accept_mask: Bool[Tensor, "B W"]
    drafts: Int[Tensor, "B W"]
    draft_probs: Float[Tensor, "B W K"] | None = None


@runtime_checkable
class Rule(Protocol):
    """An acceptance rule.

    Attributes:
        keeps: fields of `Slots` that it reads, so that they are kept between iterations.
        accepts_noisy: whether drafts that were fed with noise may stand: they are fed again, clean.
    """

    keeps: frozenset[str]
    accepts_noisy: bool

    def __call__(self, slots: Slots, scores: Scores) -> Verdict:
        """The verdict of one pass; noisy slots are judged like clean ones."""
        ...


class Replay:
    """The token is the maximum of the law perturbed by the slot's own Gumbel vector (ours).

    Autoregression with the same vectors takes the same maximum: same seed, same image.
    """

    keeps, accepts_noisy = frozenset({"gumbel"}), False

    def __call__(self, slots: Slots, scores: Scores) -> Verdict:
        tokens = (scores.log + _kept(slots.gumbel)).argmax(-1)
        return Verdict(tokens, tokens == slots.tokens, tokens)


class Match:
    """A draft stands if it is the token that is drawn now: every token is a draw from its target.

    Source: Song et al. 2021 and Santilli et al. 2023 for greedy decoding, where the draw is the maximum;
    with fresh numbers it is the sampling baseline of SJD.
    """

    keeps, accepts_noisy = frozenset({"uniforms"}), False

    def __call__(self, slots: Slots, scores: Scores) -> Verdict:
        tokens = draw(scores.probs, _kept(slots.uniforms)[..., 2])
        return Verdict(tokens, tokens == slots.tokens, tokens)


class Exact:
    """Speculative sampling: accept with probability `min(1, target / draft)`, else draw from the residual.

    Source: Leviathan et al. 2023, alg. 1; in every slot at once it is a maximal coupling of the two laws.
    A draft of recorded probability zero is rejected.

    Args:
        refine: what becomes of drafts that were not reached.
    """

    keeps, accepts_noisy = frozenset({"draft_probs", "uniforms"}), False

    def __init__(self, refine: Refiner) -> None:
        self.refine = refine

    def __call__(self, slots: Slots, scores: Scores) -> Verdict:
        accept_u, residual_u, fresh_u = _kept(slots.uniforms).unbind(-1)
        drafted = Drafted(self.codes(slots, scores), _kept(slots.draft_probs), scores.probs, slots.levels > 0)
        accept_mask = self.accept(drafted, accept_u)
        replacement = draw(residual(drafted.target_probs, drafted.draft_probs), residual_u)
        tokens = drafted.codes.where(accept_mask, replacement)
        return Verdict(tokens, accept_mask, *self.refine(drafted, tokens, fresh_u))

    def codes(self, slots: Slots, scores: Scores) -> Tensor:
        """The drafts (B, W) as codes; of structural slots any code, which `judged` ignores."""
        return slots.tokens.clamp_max(scores.probs.shape[-1] - 1)

    def accept(self, drafted: Drafted, accept_u: Tensor) -> Tensor:
        """(B, W) True = the draft stands; `accept_u` (B, W) uniform numbers."""
        target, draft = (at(probs, drafted.codes) for probs in (drafted.target_probs, drafted.draft_probs))
        return (accept_u * draft < target) & (draft > 0)


class Drafted(NamedTuple):
    """Drafts of one iteration, what they were drawn from, and what the model says now.

    Attributes:
        codes: (B, W) drafts.
        draft_probs: (B, W, K) the laws that they were really drawn from.
        target_probs: (B, W, K) the laws of this pass.
        noisy: (B, W) True = the slot was fed with noise.
    """

    codes: Tensor
    draft_probs: Tensor
    target_probs: Tensor
    noisy: Tensor


# (drafts of this iteration, the verdict's tokens (B, W), fresh numbers (B, W)) -> next drafts and their law
Refiner = Callable[[Drafted, Tensor, Tensor], tuple[Tensor, Tensor]]


def resample(drafted: Drafted, tokens: Tensor, fresh_u: Tensor) -> tuple[Tensor, Tensor]:
    """Fresh independent draws (SJD, Teng et al. 2024)."""
    return draw(drafted.target_probs, fresh_u), drafted.target_probs


def couple(drafted: Drafted, tokens: Tensor, fresh_u: Tensor) -> tuple[Tensor, Tensor]:
    """What accept-or-residual gave in every slot: a maximal coupling of old and new law (MC-SJD / SCD)."""
    return tokens, drafted.target_probs


def reuse(drafted: Drafted, tokens: Tensor, fresh_u: Tensor) -> tuple[Tensor, Tensor]:
    """Likely drafts are kept, with the law that results (ours; the idea of reuse is SJD++'s).

    A draft is one that was kept, or a fresh draw in place of one that was not: a mixture of the old law
    where its ratio is at least 0.5, and of the target with the mass of all other codes.
    """
    stays = drafted.target_probs >= KEEP_RATIO * drafted.draft_probs  # (B, W, K)
    drafts = drafted.codes.where(at(stays, drafted.codes), draw(drafted.target_probs, fresh_u))
    old = drafted.draft_probs.where(stays, 0)
    return drafts, old + (1 - old.sum(-1, keepdim=True)) * drafted.target_probs


def judged(rule: Rule, slots: Slots, scores: Scores) -> Verdict:
    """The verdict of a rule; structural slots, whose law is one-hot on their token, always stand."""
    verdict = rule(slots, scores)
    return Verdict(
        verdict.tokens.where(slots.is_code, slots.tokens),
        verdict.accept_mask | ~slots.is_code,
        verdict.drafts.where(slots.is_code, slots.tokens),
        verdict.draft_probs,
    )


def num_leading(mask: Bool[Tensor, "B W"]) -> Int[Tensor, " B"]:
    """(B,) length of the run of True at the left end of each row (B, W)."""
    return mask.cumprod(-1, dtype=torch.long).sum(-1)


def at(values: Tensor, codes: Tensor) -> Tensor:
    """(B, W) the values (B, W, K) of one code each."""
    return values.gather(-1, codes[..., None]).squeeze(-1)


def _kept(field: Tensor | None) -> Tensor:
    assert field is not None, "a rule reads what it does not keep"
    return field
