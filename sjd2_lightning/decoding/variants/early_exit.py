"""Early exit: a pass after which all that is left of an image is taken as it stands (CEED-VLA; lossy).

Source: arXiv 2506.13725, a fixed cap on passes. The exit that adapts to the image is ours.
"""

from __future__ import annotations

from sjd2_lightning.decoding.config import DecodingConfig
from sjd2_lightning.decoding.passes import Judged
from sjd2_lightning.decoding.rules import Slots
from sjd2_lightning.decoding.window import Window


class EarlyExit:
    """Says of each row whether this pass is its last.

    Args:
        config: the method's values.
    """

    def __init__(self, config: DecodingConfig) -> None:
        self.config = config

    def __call__(self, window: Window, slots: Slots, this: Judged) -> Judged:
        """The pass, with a run of all slots that are left where it is the last one."""
        state, config = window.state, self.config
        left = state.end - state.head - 1
        changed = this.verdict.tokens != slots.tokens  # never what is structural, or right of the image
        ends = changed.sum(1) <= config.max_changed
        if config.max_passes:
            ends = ends | (state.iteration + 1 >= config.max_passes)
        # what is committed is never fed again: the image ends here
        run, cached = (left.where(ends, kept) for kept in (this.run, this.cached))
        return this._replace(run=run, cached=cached)


class NoExit:
    """Every pass goes as far as its drafts stand."""

    def __call__(self, window: Window, slots: Slots, this: Judged) -> Judged:
        """The pass as it is."""
        return this
