"""The cached part of a batch: timestep tokens, prompts, committed tokens; and one forward over the window."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sjd2_lightning.decoding.probs import guided
from sjd2_lightning.masks import attention_mask
from sjd2_lightning.models.backbone import Backbone, ImageLayout, right_aligned


class Context:
    """Cache and mask of a batch of prompts; with guidance its rows are the prompts, then their empty twins.

    Columns: timestep tokens, prompts aligned at their right ends, slots. Slot i has the same column in
    every row. Timestep tokens and prompts are computed once.

    Args:
        backbone: the model.
        prompts: texts, one an image.
        layout: of the images.
        side: (T, D) timestep tokens.
        window: W.
        max_refeed: most accepted tokens that a forward may have to feed again.
        guidance_scale: 1 is off.
    """

    def __init__(
        self,
        backbone: Backbone,
        prompts: Sequence[str],
        layout: ImageLayout,
        side: Tensor,
        window: int,
        max_refeed: int,
        guidance_scale: float,
    ) -> None:
        device = backbone.device
        self.backbone = backbone
        self.guidance_scale = guidance_scale
        self.copies = 1 if guidance_scale == 1 else 2
        rows = [backbone.prompt_ids(prompt, layout) for prompt in prompts]
        if self.copies == 2:
            rows += [backbone.unconditional_ids(layout, ids) for ids in rows]
        ids, starts = right_aligned(rows, pad_to=max_refeed)
        self.prompt = backbone.embed_tokens(ids.to(device))  # (rows, P, D)
        self.first = (starts + len(side)).to(device)
        self.num_side = len(side)
        self.first_slot = len(side) + ids.shape[1]
        self.cache = backbone.new_cache(len(rows), self.first_slot + layout.num_slots + window)
        self._prefill(side)

    def _prefill(self, side: Tensor) -> None:
        embeddings = torch.cat([side.expand(len(self.prompt), -1, -1), self.prompt], dim=1)
        columns = torch.arange(self.first_slot, device=side.device).expand(len(self.prompt), -1)
        self._forward(embeddings, columns, torch.zeros_like(columns), self.first_slot)

    def _forward(self, embeddings: Tensor, columns: Tensor, levels: Tensor, num_visible: int) -> Tensor:
        mask = attention_mask(columns, levels, self.first, num_visible)
        self.cache.place(columns, num_visible)
        positions = (columns - self.first[:, None]).clamp_min(0)
        return self.backbone(embeddings, positions, mask, self.cache)

    def logits(self, heads: Tensor, refeed: Tensor, drafts: Tensor, levels: Tensor, last_head: int) -> Tensor:
        """Guided logits (B, W, K) for slots heads .. heads + W - 1, each read at the column to its left.

        The last slot of the window is not fed: nothing is read from it.

        Args:
            heads: (B,) first slot that is not committed.
            refeed: (B, R, D) embeddings of the last R committed tokens; where a row has fewer, the places
                before its first slot are filled with its prompt.
            drafts: (B, W - 1, D) embeddings of the window.
            levels: (B, W - 1) their noise levels.
            last_head: the largest of `heads`, known to the host.
        """
        num_refeed, num_drafts = refeed.shape[1], drafts.shape[1]
        slots = heads[:, None] + torch.arange(-num_refeed, num_drafts, device=heads.device)
        fed = torch.cat([refeed, drafts], dim=1).repeat(self.copies, 1, 1)
        columns = (self.first_slot + slots).repeat(self.copies, 1)
        levels = torch.cat([levels.new_zeros(len(levels), num_refeed), levels], dim=1).repeat(self.copies, 1)
        before = (columns - self.num_side)[:, :num_refeed]
        in_prompt = before < self.prompt.shape[1]
        index = before.clamp_max(self.prompt.shape[1] - 1)[..., None].expand(-1, -1, fed.shape[-1])
        fed[:, :num_refeed] = self.prompt.gather(1, index).where(in_prompt[..., None], fed[:, :num_refeed])
        hidden = self._forward(fed, columns, levels, self.first_slot + last_head + num_drafts)
        return guided(self.backbone.image_logits(hidden[:, num_refeed - 1 :]), self.guidance_scale)

    def keep_rows(self, rows: Tensor, batch: int) -> None:
        """Keeps the given images, (R,) int64 of a batch of `batch`."""
        rows = torch.cat([rows + batch * copy for copy in range(self.copies)])
        self.cache.keep_rows(rows)
        self.prompt, self.first = self.prompt[rows], self.first[rows]
