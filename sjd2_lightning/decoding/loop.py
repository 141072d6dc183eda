"""The decoding loop: one for every method of the Jacobi family, autoregression included.

Why a slot may be committed: its law is read at the slot to its left and never depends on its own embedding.
So the head can always be settled, and a run goes on as long as each slot before its end was fed as the clean
embedding of the very token that it is committed as.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sjd2_lightning.decoding.config import DecodingConfig
from sjd2_lightning.decoding.context import Context
from sjd2_lightning.decoding.method import Method
from sjd2_lightning.decoding.output import DecodeOutput, DecodeStats, Iteration
from sjd2_lightning.decoding.passes import Judged
from sjd2_lightning.decoding.rules import Slots
from sjd2_lightning.decoding.window import Window
from sjd2_lightning.models.backbone import Backbone, ImageLayout

Observer = Callable[[Iteration], None]
LEAVE_SHARE = 0.25  # finished rows leave the batch once they are this share of it: leaving copies the cache


@torch.inference_mode()
def decode(
    backbone: Backbone,
    prompts: Sequence[str],
    seeds: Sequence[int],
    config: DecodingConfig,
    layout: ImageLayout | Sequence[ImageLayout],
    observer: Observer | None = None,
) -> DecodeOutput:
    """Draws one image a prompt (paper, section on decoding; replay mode ours).

    Rows advance independently, and a prompt's tokens depend on its seed and size alone, not on its batch.

    Args:
        backbone: the model, in eval mode.
        prompts: B texts.
        seeds: B integers.
        config: the method.
        layout: layout of the images, from `backbone.layout`: one for all, or one a prompt.
        observer: called after each forward pass.

    Raises:
        ValueError: before the first forward, for bad values, an empty prompt or lists of unequal length.
    """
    layouts = _checked(prompts, seeds, config, layout)
    shared = [layout] if isinstance(layout, ImageLayout) else layouts
    method = Method(config, shared, backbone.slot_table(), backbone.num_codes)
    one_pass = method.one_pass
    columns, most_again = one_pass.num_columns, one_pass.most_again
    context = Context(
        backbone, prompts, layouts, method.levels.timestep_tokens(), columns, most_again, config
    )
    window = method.window(torch.tensor(list(seeds), device=backbone.device))
    images = _Images(layouts, backbone.device)
    again = one_pass.least_again
    while True:
        slots = window.slots()
        # 1. one forward pass over the window, and a verdict on every slot, as if all slots to its left stood
        this = one_pass(context, window, slots, again)
        # 2. the longest run that stands is committed, and the slot behind it, judged on its true prefix too
        committed = (this.run + 1).minimum(window.room)
        if observer is not None:
            observer(_seen(images, window, slots, committed, this))
        # 3. every other slot gets a better draft and is one level cleaner
        settled = window.columns[: window.size] <= this.run[:, None]
        drafts = method.redraft(slots, this.verdict, this.scores, settled)
        window.renew(slots, drafts, this.verdict, this.scores)
        # 4. the windows move on; the host learns by how much, which is its only wait for the device
        num_committed, again = one_pass.to_host(committed, this.cached)
        images.note(num_committed)
        window.advance(num_committed, committed)
        # 5. finished rows leave
        going = window.unfinished()
        if not going:
            images.take(window)
            return images.output()
        if len(images.rows) - len(going) >= LEAVE_SHARE * len(images.rows):
            images.take(window)
            context.keep_rows(torch.tensor(going, device=backbone.device), len(images.rows))
            window.keep_rows(going)
            images.rows = [images.rows[place] for place in going]


def _checked(
    prompts: Sequence[str],
    seeds: Sequence[int],
    config: DecodingConfig,
    layout: ImageLayout | Sequence[ImageLayout],
) -> list[ImageLayout]:
    """The layouts, one a prompt."""
    config.check()
    if len(prompts) != len(seeds) or not prompts:
        raise ValueError(f"need one seed a prompt and at least one; got {len(prompts)} and {len(seeds)}")
    layouts = [layout] * len(prompts) if isinstance(layout, ImageLayout) else list(layout)
    if len(layouts) != len(prompts):
        raise ValueError(f"need one layout for all prompts or one a prompt; got {len(layouts)}")
    return layouts


class _Images:
    """The images of a batch while they are drawn."""

    def __init__(self, layouts: Sequence[ImageLayout], device: torch.device) -> None:
        self.layouts = layouts
        self.rows = list(range(len(layouts)))  # which image each row of the batch is; finished ones leave
        num_slots = max(layout.num_slots for layout in layouts)
        self.slot_ids = torch.empty(len(layouts), num_slots, dtype=torch.long, device=device)
        self.log: list[list[int]] = []

    def note(self, num_committed: Sequence[int]) -> None:
        """Notes what a pass committed."""
        self.log.append([0] * len(self.layouts))
        for row, num in zip(self.rows, num_committed, strict=True):
            self.log[-1][row] = num

    def take(self, window: Window) -> None:
        """Takes what the window's rows hold so far."""
        self.slot_ids[self.rows] = window.tokens[:, : self.slot_ids.shape[1]]

    def output(self) -> DecodeOutput:
        """What `decode` returns."""
        return DecodeOutput.of(self.slot_ids, self.layouts, DecodeStats(torch.tensor(self.log)))


def _seen(images: _Images, window: Window, slots: Slots, committed: Tensor, this: Judged) -> Iteration:
    """What an observer sees; it may keep all of it, so views of buffers are copied."""
    gumbel = None if slots.gumbel is None else slots.gumbel.clone()
    rows = torch.tensor(images.rows, device=committed.device)
    levels, tokens, log = slots.levels.clone(), this.verdict.tokens, this.scores.log
    return Iteration(len(images.log), rows, window.head, committed, tokens, levels, log, gumbel)
