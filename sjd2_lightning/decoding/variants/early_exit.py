"""Early exit: a pass after which all that is left of an image is taken as it stands (CEED-VLA; lossy).

Source: arXiv 2506.13725, a fixed cap on passes. The exit that adapts to the image is ours.
"""

from __future__ import annotations

from collections.abc import Sequence

from sjd2_lightning.decoding.context import Context, Shape
from sjd2_lightning.decoding.passes import Judged, Pass
from sjd2_lightning.decoding.rules import Slots
from sjd2_lightning.decoding.window import Window
from sjd2_lightning.models.backbone import ImageLayout


class EarlyExitPass(Pass):
    """A pass over the whole image, which may be its last; see `DecodingConfig.max_passes`."""

    def check(self, layouts: Sequence[ImageLayout]) -> None:
        longest, config = max(layout.num_slots for layout in layouts), self.config
        if config.num_drafted < longest:
            raise ValueError(
                f"decoding.max_passes={config.max_passes}, decoding.max_changed={config.max_changed}: the "
                f"window must hold all {longest} slots of an image that ends early; set "
                f"decoding.window={longest}"
            )

    def __call__(self, context: Context, window: Window, slots: Slots, shape: Shape) -> Judged:
        """One forward pass, with a run of all slots that are left where it is the last one."""
        this, state = super().__call__(context, window, slots, shape), window.state
        changed = this.verdict.tokens != slots.tokens  # never what is structural, or right of the image
        ends = changed.sum(1) <= self.config.max_changed
        if self.config.max_passes:
            ends = ends | (state.iteration + 1 >= self.config.max_passes)
        # what is committed is never fed again: the image ends here
        left = state.end - state.head - 1
        run, cached = (left.where(ends, kept) for kept in (this.run, this.cached))
        return this._replace(run=run, cached=cached)
