"""The cached part of a batch: timestep tokens, prompts, committed tokens; and one forward over the window."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sjd2_lightning.decoding.config import DecodingConfig
from sjd2_lightning.decoding.law import guided
from sjd2_lightning.decoding.rules import Read
from sjd2_lightning.decoding.state import Prompts
from sjd2_lightning.masks import Visible
from sjd2_lightning.models.backbone import (
    Backbone,
    ImageLayout,
    Trunk,
    by_row,
    position_ids,
    right_aligned,
)
from sjd2_lightning.models.kv_cache import KVCache

_SHOWN = 40  # letters of a prompt that an error repeats


class Shape(NamedTuple):
    """What the host says of a pass: its tensors have the same shapes wherever these numbers are the same.

    Attributes:
        columns: number of columns that keys are read from: no slot that is fed lies right of them.
        again: number of committed slots that are fed again.
        in_prompt: whether some of these may lie left of the image, in columns of the prompt.
    """

    columns: int
    again: int
    in_prompt: bool


class Branches(NamedTuple):
    """Tokens that a forward is fed right of the window, E of them, in branches that start left of its end.

    Columns are counted from the first one right of what is fed of the window.

    Attributes:
        embeddings: (R, E, D) embeddings of the tokens.
        roots: (E,) column of the slot that each token's branch is another candidate for; below 0.
        firsts: (E,) column of the first token of each token's branch.
        columns: (E,) column of each token.
    """

    embeddings: Tensor
    roots: Tensor
    firsts: Tensor
    columns: Tensor

    @property
    def places(self) -> Tensor:
        """(E,) column of the slot that each token is for."""
        return self.roots + self.columns - self.firsts


class Context:
    """Cache and prompts of a batch; with guidance its rows are the prompts, then their empty twins.

    Columns: timestep tokens, prompts aligned at their right ends, slots. Slot i has the same column in
    every row. Timestep tokens and prompts are computed once.

    Args:
        backbone: the model.
        trunk: what runs its trunk and head.
        token_ids: ids in front of the first slot: of the prompts, then of their empty twins, if any.
        layouts: layouts of the images, one a prompt.
        timestep_tokens: (T, D) side tokens.
        num_prompt: least number of columns of the prompts.
        cache: cache of R * C rows; columns are written from the first one on.
        config: the method; its sampling says how logits of both sides are combined.
    """

    def __init__(
        self,
        backbone: Backbone,
        trunk: Trunk,
        token_ids: Sequence[Sequence[int]],
        layouts: Sequence[ImageLayout],
        timestep_tokens: Tensor,
        num_prompt: int,
        cache: KVCache,
        config: DecodingConfig,
    ) -> None:
        self.trunk, self.cache, self.sampling = trunk, cache, config.sampling
        self.from_image = backbone.from_image
        self.copies = len(token_ids) // len(layouts)
        ids, starts = right_aligned(token_ids, pad_to=num_prompt)
        self.num_side, self.num_prompt = len(timestep_tokens), ids.shape[1]
        self.first_slot = self.num_side + self.num_prompt
        device = backbone.device
        rows = (self.copies, len(layouts))
        embeddings = backbone.embed_prompts(ids.to(device), starts.to(device))  # (C * R, P, D)
        first = (starts + self.num_side).to(device)
        num_slots = max(layout.num_slots for layout in layouts) + config.size
        self.prompts = Prompts(
            embeddings.unflatten(0, rows).transpose(0, 1).contiguous(),
            first.view(rows).T.contiguous(),
            by_row(layouts, lambda layout: self._scales(layout, num_slots)).to(device),
            by_row(layouts, lambda layout: layout.distances(num_slots)).to(device)
            if layouts[0].axes
            else None,
        )
        self._prefill(torch.cat([timestep_tokens.expand(len(ids), -1, -1), embeddings], dim=1), first)

    def _scales(self, layout: ImageLayout, num: int) -> Tensor:
        """(num,) guidance scales of the slots; right of the image, that of the last one."""
        scales = self.sampling.scales(layout.num_slots)
        return torch.cat([scales, scales[-1:].expand(num - len(scales))])

    def _prefill(self, embeddings: Tensor, first: Tensor) -> None:
        columns = torch.arange(self.first_slot, device=first.device).expand(len(first), -1)
        self.cache.place(columns, self.first_slot)
        # timestep tokens and padding are where the prompt starts
        slots = columns.maximum(first[:, None]) - self.first_slot
        positions = self._positions(slots, first)
        self.trunk.prefill(embeddings, positions, Visible.of_prompt(columns, first), self.cache)

    def _positions(self, slots: Tensor, first: Tensor) -> Tensor:
        """Position ids of slots (C * R, L) of rows whose prompts start in columns `first` (C * R,)."""
        distances = self.prompts.distances
        if distances is not None:
            distances = distances.repeat(self.copies, 1, 1)
        return position_ids(slots, self.first_slot - first, distances, self.from_image)

    def logits(
        self,
        slots: Tensor,
        fed: Tensor,
        levels: Tensor | None,
        num_laws: int,
        shape: Shape,
        branches: Branches | None = None,
    ) -> tuple[Tensor, Read]:
        """Guided logits (R, n + E, K) read at the last n slots fed and at branches, for what follows each.

        And what they are read from.

        Args:
            slots: (R, L) the slots that are fed; those below 0 are columns of the prompt.
            fed: (R, L, D) embeddings of the slots; in columns of the prompt, anything.
            levels: (R, W - 1) noise levels of the last slots fed; None = all are clean.
            num_laws: number n of slots whose laws are read.
            shape: shape of the pass.
            branches: E tokens that are fed beside the window.
        """
        if self.copies > 1:  # for the empty twins too
            slots, fed = slots.repeat(self.copies, 1), fed.repeat(self.copies, 1, 1)
            levels = None if levels is None else levels.repeat(self.copies, 1)
        if shape.in_prompt:
            fed = self._with_prompt(slots[:, : shape.again], fed)
        columns = slots + self.first_slot
        places, before, own = columns, columns + 1, None  # a slot sees what lies left of it, and itself
        side = None if levels is None else F.pad(levels, (columns.shape[1] - levels.shape[1], 0)) - 1
        if branches is not None:
            num_laws += len(branches.roots)
            edge = columns[:, -1:] + 1
            # a token of a branch sees what lies left of the branch's root, and its branch up to itself
            own = torch.cat([columns, edge + branches.firsts], dim=1)
            before = torch.cat([before, edge + branches.roots], dim=1)
            places = torch.cat([columns, edge + branches.places], dim=1)
            columns = torch.cat([columns, edge + branches.columns], dim=1)
            fed = torch.cat([fed, branches.embeddings.repeat(self.copies, 1, 1)], dim=1)
            side = None if side is None else F.pad(side, (0, len(branches.roots)), value=-1)
        first = self.prompts.first.T.flatten()  # (C * R,)
        self.cache.place(columns, shape.columns)
        visible = Visible(first, before, own, columns, side)
        positions = self._positions(places - self.first_slot, first)
        hidden = self.trunk.run(fed, positions, visible, self.cache)
        scale: float | Tensor = self.sampling.guidance_scale
        if self.copies > 1 and self.sampling.guidance_schedule != "constant":
            scales = self.prompts.scales  # (R, N): twins share places with their prompts
            scale = scales.gather(1, places[: len(scales), -num_laws:] - self.first_slot + 1)
        read = Read(hidden[:, -num_laws:], scale)
        return guided(self.trunk.head(read.hidden), scale), read

    def _with_prompt(self, slots: Tensor, fed: Tensor) -> Tensor:
        """`fed` (C * R, L, D), with the prompt where the first slots (C * R, n) fed lie left of the image."""
        prompts = self.prompts.embeddings.transpose(0, 1).flatten(0, 1)  # (C * R, P, D)
        rows = torch.arange(len(slots), device=slots.device)[:, None]
        prompt = prompts[rows, (slots + self.num_prompt).clamp(0, self.num_prompt - 1)]
        lead = fed[:, : slots.shape[1]]
        lead.copy_(prompt.where(slots[..., None] < 0, lead))
        return fed

    def keep_rows(self, index: Tensor) -> None:
        """Keeps the rows `index` (n,)."""
        rows = len(self.prompts.first)
        self.cache.keep_rows(torch.cat([index + rows * copy for copy in range(self.copies)]))
        self.prompts = self.prompts.keep(index)


def prompt_token_ids(
    backbone: Backbone, prompts: Sequence[str], layouts: Sequence[ImageLayout], guidance_scale: float
) -> list[list[int]]:
    """Token ids in front of the first slot: of the prompts, then, with guidance, of their empty twins.

    Args:
        backbone: the model.
        prompts: texts, one an image.
        layouts: layouts of the images, one a prompt.
        guidance_scale: 1 is no guidance.

    Raises:
        ValueError: for an empty prompt, one that is longer than the model's positions, or guidance with a
            model that has no unconditional prompt.
    """
    rows = [backbone.prompt_ids(*one) for one in zip(prompts, layouts, strict=True)]
    for prompt, ids, layout in zip(prompts, rows, layouts, strict=True):
        if excess := backbone.excess(ids, layout):
            raise ValueError(f"the prompt {prompt[:_SHOWN]!r} has {excess}")
    if guidance_scale == 1:
        return rows
    empty = [backbone.unconditional_ids(*one) for one in zip(layouts, rows, strict=True)]
    for ids, layout in zip(empty, layouts, strict=True):
        if excess := backbone.excess(ids, layout):
            raise ValueError(f"the unconditional context of guidance has {excess}: see model.unconditional")
    if not all(empty):
        raise ValueError(
            f"sampling.guidance_scale is {guidance_scale}, but the backbone has no unconditional prompt: set "
            "it to 1, or give `unconditional_ids` at least one token"
        )
    return rows + empty
