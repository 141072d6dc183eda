"""Acceptance by groups of similar codes (GSD): a draft stands if its group is likely enough, not exact.

Source: Grouped Speculative Decoding, So et al. 2025 (arXiv 2508.07747) and its published code
(github.com/junhyukso/GSD), read in November 2026. Public: groups are dynamic, made anew around each draft
from the law of the moment, since static clusters of embeddings did not help; the published code takes the 14
codes next to the draft in the order of the target's logits, of them those whose probability differs by less
than 0.15 and whose embedding lies within 0.5 (squared Euclidean, of Lumina-mGPT's table), and accepts with
the ratio of the group's masses; a rejected draft is replaced from the ordinary residual; drafts not reached
are drawn afresh.

Ours, where that does not carry over or is left open: distances are per dimension of normalised embeddings, so
that one number means the same in every model (2 is the mean over unrelated codes); a group at either end of
the order is shorter (the published code falls back to one code at the unlikely end); and a draft that the law
cuts off (top-k, top-p) never stands, whatever its group holds.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sjd2_lightning.decoding.config import Grouping
from sjd2_lightning.decoding.rules import Drafted, Exact, Refiner, at
from sjd2_lightning.embedding import EmbeddingSpace


class Grouped(Exact):
    """Accept with the ratio of masses of the draft's group, `min(1, target / draft)`, else draw anew (GSD).

    Not exact. With groups of one code it is `Exact`.

    Args:
        refine: what becomes of drafts that were not reached.
        space: normalised space of the codes.
        grouping: size of a group, and its limits.
    """

    def __init__(self, refine: Refiner, space: EmbeddingSpace, grouping: Grouping) -> None:
        super().__init__(refine)
        self.space, self.grouping = space, grouping

    def accept(self, drafted: Drafted, accept_u: Tensor) -> Tensor:
        """(B, W) True = the draft stands; `accept_u` (B, W) uniform numbers."""
        members, belongs = group_of(drafted.codes, drafted.target_probs, self.space, self.grouping)
        laws = (drafted.target_probs, drafted.draft_probs)
        target, draft = (probs.gather(-1, members).where(belongs, 0).sum(-1) for probs in laws)
        possible = at(drafted.target_probs.minimum(drafted.draft_probs), drafted.codes) > 0
        return (accept_u * draft < target) & possible


def group_of(
    draft_tokens: Int[Tensor, "B W"],
    target_probs: Float[Tensor, "B W K"],
    space: EmbeddingSpace,
    grouping: Grouping,
) -> tuple[Int[Tensor, "B W G"], Bool[Tensor, "B W G"]]:
    """Codes around each draft, and which of them are of its group (GSD; distances and ends ours).

    Args:
        draft_tokens: (B, W) drafts.
        target_probs: (B, W, K) laws of this pass.
        space: normalised space of the codes.
        grouping: size of a group, and its limits.
    """
    drafts = draft_tokens[..., None]
    order = target_probs.argsort(stable=True, dim=-1, descending=True)
    rank = (order == drafts).long().argmax(-1, keepdim=True)
    ranks = rank + torch.arange(grouping.size, device=rank.device) - (grouping.size - 1) // 2
    last = order.shape[-1] - 1
    codes = order.gather(-1, ranks.clamp(0, last))
    gap = (target_probs.gather(-1, codes) - target_probs.gather(-1, drafts)).abs()
    distance = ((space.table[codes] - space.table[drafts]) / space.std).square().mean(-1)
    belongs = (ranks >= 0) & (ranks <= last) & (gap <= grouping.gap) & (distance <= grouping.distance)
    return codes, belongs
