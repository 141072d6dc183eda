"""SJD2's rules as the paper prints them: nearest-neighbour drafts, kept drafts, pure denoising. Not exact.

Source: Teng et al. 2025 (arXiv 2510.08994), section on decoding and appendix B.
"""

from __future__ import annotations

from torch import Tensor

from sjd2_lightning.decoding.law import draw
from sjd2_lightning.decoding.rules import KEEP_RATIO, Drafted, Exact, Refiner, Scores, Slots, Verdict, at
from sjd2_lightning.embedding import EmbeddingSpace


class Paper(Exact):
    """The ratio test on drafts that, while a slot is noisy, are the codes nearest to it.

    Such a draft was drawn from no law that is known, and it may stand although it was fed with noise.

    Args:
        refine: what becomes of drafts that were not reached.
        space: normalised space of the codes.
    """

    accepts_noisy = True

    def __init__(self, refine: Refiner, space: EmbeddingSpace) -> None:
        super().__init__(refine)
        self.space = space

    def codes(self, slots: Slots, scores: Scores) -> Tensor:
        """The nearest code where there is noise, else the draft (B, W)."""
        codes = super().codes(slots, scores)
        return (
            codes
            if slots.noisy is None
            else self.space.nearest_ids(slots.noisy).where(slots.levels > 0, codes)
        )


def keep(drafted: Drafted, tokens: Tensor, fresh_u: Tensor) -> tuple[Tensor, Tensor]:
    """Keep a clean draft whose ratio target / draft is at least 0.5, else draw anew.

    Not exact: the law is recorded as the target's, which drafts that were kept do not follow.
    """
    target, draft = (at(probs, drafted.codes) for probs in (drafted.target_probs, drafted.draft_probs))
    kept = (target >= KEEP_RATIO * draft) & ~drafted.noisy
    return drafted.codes.where(kept, draw(drafted.target_probs, fresh_u)), drafted.target_probs


class Pure:
    """A slot near the head stands as soon as it is clean, whatever its target says: fastest, with artefacts.

    Args:
        reach: number of slots from the head within which drafts may stand; window / num_levels in the paper.
    """

    keeps, accepts_noisy = frozenset({"uniforms"}), False

    def __init__(self, reach: int) -> None:
        self.reach = reach

    def __call__(self, slots: Slots, scores: Scores) -> Verdict:
        assert slots.uniforms is not None
        clean = slots.levels == 0
        tokens = slots.tokens.where(clean, draw(scores.probs, slots.uniforms[..., 2]))
        accept_mask = clean.clone()
        accept_mask[:, self.reach :] = False
        return Verdict(tokens, accept_mask, tokens)
