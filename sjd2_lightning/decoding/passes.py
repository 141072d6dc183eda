"""One forward pass over the window, judged: how many slots stand, and how many of them the cache holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from sjd2_lightning.decoding.config import DecodingConfig
from sjd2_lightning.decoding.context import Context, Shape
from sjd2_lightning.decoding.law import log_law
from sjd2_lightning.decoding.rules import Rule, Scores, Slots, Verdict, judged, num_leading
from sjd2_lightning.decoding.window import Window
from sjd2_lightning.models.backbone import ImageLayout


class Judged(NamedTuple):
    """What a pass settles.

    Attributes:
        scores: what the model says of the window's slots.
        verdict: what the rule makes of it.
        run: (B,) slots at the left of the window that stand.
        cached: (B,) of them, those whose entry in the cache is that of the token that they are committed as.
    """

    scores: Scores
    verdict: Verdict
    run: Tensor
    cached: Tensor


class Pass:
    """A pass over the window alone.

    Args:
        config: the method's values.
        rule: which drafts stand.
    """

    keeps: frozenset[str] = frozenset()  # fields of `Slots` that it reads beside the rule's

    def __init__(self, config: DecodingConfig, rule: Rule) -> None:
        self.config, self.rule = config, rule
        # committed tokens that a pass feeds again since the cache does not hold them: fewest and most
        self.least_again, self.most_again = 1, config.size if rule.accepts_noisy else 1
        self.num_columns = config.size  # that a pass needs right of the committed slots

    def check(self, layouts: Sequence[ImageLayout]) -> None:
        """Raises ValueError for images that such passes cannot draw."""

    def __call__(self, context: Context, window: Window, slots: Slots, shape: Shape) -> Judged:
        """One forward pass.

        Args:
            context: cache and prompts.
            window: the window, whose committed slots are fed again as far as needed.
            slots: its slots.
            shape: shape of the pass.
        """
        index, fed = window.fed(slots, shape.again)
        logits, read = context.logits(index, fed, self.levels(slots), window.size, shape)
        return self.judge(slots, Scores(log_law(logits, self.config.sampling), read))

    def levels(self, slots: Slots) -> Tensor | None:
        """(B, W - 1) levels of the slots that are fed; None = all are clean, which costs no mask."""
        return slots.levels[:, :-1] if self.config.num_levels else None

    def judge(self, slots: Slots, scores: Scores) -> Judged:
        """The verdict, and the runs that follow from it.

        A slot may be committed if it and all before it stand. Its entry in the cache is right if they were
        also fed as the clean embeddings of what they are now.
        """
        verdict = judged(self.rule, slots, scores)
        stands = verdict.accept_mask[:, :-1]  # the last slot was not fed
        # a pass that is shaped for more slots than the method drafts commits no more of them
        most = self.config.num_drafted - 1
        cached = num_leading(stands & (slots.levels[:, :-1] == 0)).clamp_max(most)
        run = num_leading(stands).clamp_max(most) if self.rule.accepts_noisy else cached
        return Judged(scores, verdict, run, cached)
