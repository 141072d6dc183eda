"""The cached part of a batch: timestep tokens, prompts, committed tokens; and one forward over the window."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sjd2_lightning.decoding.config import DecodingConfig
from sjd2_lightning.decoding.law import guided
from sjd2_lightning.decoding.strip import Span
from sjd2_lightning.masks import attention_mask, window_mask
from sjd2_lightning.models.backbone import Backbone, ImageLayout, by_row, right_aligned


class Branches(NamedTuple):
    """Tokens that a forward is fed right of the window, E of them, in branches that start left of its end.

    Columns are counted from the first one right of what is fed of the window.

    Attributes:
        embeddings: (B, E, D) embeddings of the tokens.
        roots: (E,) column of the slot that each token's branch is another candidate for; below 0.
        firsts: (E,) column of the first token of each token's branch.
    """

    embeddings: Tensor
    roots: Tensor
    firsts: Tensor

    @property
    def columns(self) -> Tensor:
        """(E,) column of each token."""
        return torch.arange(len(self.roots), device=self.roots.device)

    @property
    def places(self) -> Tensor:
        """(E,) column of the slot that each token is for."""
        return self.roots + self.columns - self.firsts

    def mask(self, edge: Tensor, visible: Tensor) -> Tensor:
        """(copies * B, 1, E, S) bool: what each token sees.

        Args:
            edge: (B, 1) first column of the branches.
            visible: (copies, B, 1, S) which columns hold a prompt or a slot of each row.
        """
        keys = torch.arange(visible.shape[-1], device=edge.device) - edge  # (B, S)
        left = (keys[:, None] < self.roots[:, None]) & visible
        own = (keys[:, None] >= self.firsts[:, None]) & (keys[:, None] <= self.columns[:, None])
        return (left | own).view(-1, 1, *own.shape[1:])


class Context:
    """Cache and mask of a batch of prompts; with guidance its rows are the prompts, then their empty twins.

    Columns: timestep tokens, prompts aligned at their right ends, slots. Slot i has the same column in
    every row. Timestep tokens and prompts are computed once.

    Args:
        backbone: the model.
        prompts: texts, one an image.
        layouts: layouts of the images, one a prompt.
        timestep_tokens: (T, D) side tokens.
        num_columns: number of columns that a forward needs right of the committed slots.
        most_again: most committed tokens that a forward may have to feed again.
        config: the method; its sampling says how logits of both sides are combined.
    """

    def __init__(
        self,
        backbone: Backbone,
        prompts: Sequence[str],
        layouts: Sequence[ImageLayout],
        timestep_tokens: Tensor,
        num_columns: int,
        most_again: int,
        config: DecodingConfig,
    ) -> None:
        device = backbone.device
        self.backbone = backbone
        self.sampling = config.sampling
        # static shapes: every forward attends to the whole cache and writes by index
        self.static = config.compile
        self.forward = torch.compile(backbone) if config.compile else backbone
        self.copies = 1 if self.sampling.guidance_scale == 1 else 2
        rows = self._token_ids(prompts, layouts)
        ids, starts = right_aligned(rows, pad_to=most_again)
        self.prompt = backbone.embed_tokens(ids.to(device))  # (rows, P, D)
        self.first = (starts + len(timestep_tokens)).to(device)
        self.num_side = len(timestep_tokens)
        self.first_slot = len(timestep_tokens) + ids.shape[1]
        num_slots = max(layout.num_slots for layout in layouts)
        max_len = self.first_slot + num_slots + num_columns
        self.cache = backbone.new_cache(len(rows), max_len)
        self.columns = torch.arange(max_len, device=device)
        if self.cache.max_len < max_len:
            raise ValueError(
                f"cache too short: prompts, images and window take {max_len} positions, the backbone's "
                f"`new_cache` gave {self.cache.max_len}"
            )
        self.scales = by_row(layouts, lambda layout: self._scales(layout, num_slots + num_columns)).to(device)
        self._prefill(timestep_tokens)
        # (copies, B, 1, columns): what a slot may see as far as its row goes
        self.visible = (self.columns >= self.first[:, None]).view(self.copies, len(prompts), 1, -1)

    def _token_ids(self, prompts: Sequence[str], layouts: Sequence[ImageLayout]) -> list[list[int]]:
        """Token ids in front of the first slot: of the prompts, then of their empty twins."""
        rows = [self.backbone.prompt_ids(*one) for one in zip(prompts, layouts, strict=True)]
        if self.copies == 2:
            empty = [self.backbone.unconditional_ids(*one) for one in zip(layouts, rows, strict=True)]
            if not all(empty):
                raise ValueError(
                    f"sampling.guidance_scale is {self.sampling.guidance_scale}, but the backbone has no "
                    "unconditional prompt: set it to 1, or give `unconditional_ids` at least one token"
                )
            rows += empty
        return rows

    def _scales(self, layout: ImageLayout, num: int) -> Tensor:
        """(num,) guidance scales of the slots; right of the image, that of the last one."""
        scales = self.sampling.scales(layout.num_slots)
        return torch.cat([scales, scales[-1:].expand(num - len(scales))])

    def _prefill(self, timestep_tokens: Tensor) -> None:
        embeddings = torch.cat([timestep_tokens.expand(len(self.prompt), -1, -1), self.prompt], dim=1)
        columns = self.columns[: self.first_slot].expand(len(self.prompt), -1)
        mask = attention_mask(columns, torch.zeros_like(columns), self.first, self.first_slot)
        self.cache.place(columns, self.first_slot, 0)
        self.backbone(embeddings, (columns - self.first[:, None]).clamp_min(0), mask, self.cache)

    def logits(
        self,
        slots: Span,
        fed: Tensor,
        levels: Tensor | None,
        num_laws: int,
        branches: Branches | None = None,
    ) -> Tensor:
        """Guided logits (B, n + E, K) read at the last n slots fed and at branches, for what follows each.

        Args:
            slots: (B, L) the slots that are fed; those left of the first one are columns of the prompt.
            fed: (B, L, D) embeddings of the slots; in columns of the prompt, anything.
            levels: (B, W - 1) noise levels of the last slots fed; None = all are clean.
            num_laws: number n of slots whose laws are read.
            branches: E tokens that are fed beside the window.
        """
        columns = slots.index + self.first_slot
        extra = 0 if branches is None else len(branches.roots)
        num_laws += extra
        num_visible = self.first_slot + slots.most + slots.length + extra
        visible = self.visible if self.static else self.visible[..., :num_visible]
        mask = window_mask(columns, levels, visible)
        places = columns  # of the slots that the columns are for
        if branches is not None:
            edge = columns[:, -1:] + 1
            mask = torch.cat([mask, branches.mask(edge, visible)], dim=2)
            places = torch.cat([columns, edge + branches.places], dim=1)
            columns = torch.cat([columns, edge + branches.columns], dim=1)
            fed = torch.cat([fed, branches.embeddings], dim=1)
        if self.copies > 1:
            columns, fed = columns.repeat(self.copies, 1), fed.repeat(self.copies, 1, 1)
        if slots.least < 0:
            fed = self._with_prompt(columns, fed)
        alike = slots.least == slots.most and not self.static
        start = self.first_slot + slots.most if alike else None
        self.cache.place(columns, visible.shape[-1], start)
        positions = places.repeat(self.copies, 1) - self.first[:, None]
        hidden = self.forward(fed, positions, mask, self.cache)
        scale: float | Tensor = self.sampling.guidance_scale
        if self.copies > 1 and self.sampling.guidance_schedule != "constant":
            scale = self.scales.gather(1, places[:, -num_laws:] - self.first_slot + 1)
        return guided(self.backbone.image_logits(hidden[:, -num_laws:]), scale)

    def _with_prompt(self, columns: Tensor, fed: Tensor) -> Tensor:
        """`fed` with the prompt's embeddings in the columns of the prompt."""
        place = columns - self.num_side
        index = place.clamp_max(self.prompt.shape[1] - 1)[..., None].expand_as(fed)
        return self.prompt.gather(1, index).where((place < self.prompt.shape[1])[..., None], fed)

    def keep_rows(self, rows: Tensor, batch: int) -> None:
        """Keeps the given images, (R,) int64 of a batch of `batch`."""
        self.scales = self.scales[rows]
        rows = torch.cat([rows + batch * copy for copy in range(self.copies)])
        self.cache.keep_rows(rows)
        self.prompt, self.first = self.prompt[rows], self.first[rows]
        self.visible = (self.columns >= self.first[:, None]).view(self.copies, -1, 1, len(self.columns))
