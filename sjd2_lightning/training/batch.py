"""One training batch as the trunk sees it: timestep tokens, prompts, noisy slots, mask, targets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sjd2_lightning.embedding import EmbeddingSpace
from sjd2_lightning.masks import Visible
from sjd2_lightning.models.backbone import Backbone, ImageLayout, position_ids, right_aligned
from sjd2_lightning.noise import perturb


class NoisyCodes(NamedTuple):
    """Noise of one batch.

    Attributes:
        levels: (B, n) of the n codes, on the CPU.
        timesteps: the grid of t.
        eps: (B, n, D) what codes start from at the top level.
        states: (B, n, D) what noisy codes hold, normalised; None = x_t of their level and eps.
        marked: whether levels between clean and the top have timestep tokens; False: only the top has one,
            and the states between them count as clean.
        clean_law: (B, n, K) log-probabilities of clean input, where they were computed.
    """

    levels: Tensor
    timesteps: Tensor
    eps: Tensor
    states: Tensor | None = None
    marked: bool = True
    clean_law: Tensor | None = None

    def reaches(self) -> Tensor:
        """(B, n) on the CPU, True = there is noise to the left of the code."""
        return self.levels.cumsum(1) > self.levels

    def seen(self) -> tuple[Tensor, Tensor]:
        """Levels (B, n) and grid of the timestep tokens."""
        if self.marked:
            return self.levels, self.timesteps
        return (self.levels == len(self.timesteps) - 1).long(), self.timesteps[[0, -1]]


class TrunkInput(NamedTuple):
    """Columns: `num_side` timestep tokens, `prompt_len` prompt tokens, slots but the last.

    `noisy` (B, L) bool says which tokens are noisy; None = none is.
    """

    embeddings: Tensor
    position_ids: Tensor
    attention_mask: Tensor | Visible
    num_side: int
    prompt_len: int
    noisy: Tensor | None


def trunk_input(
    backbone: Backbone,
    prompt_ids: Sequence[Sequence[int]],
    image_ids: Tensor,
    layout: ImageLayout,
    noise: NoisyCodes | None,
    bucket: int = 1,
) -> TrunkInput:
    """Builds what the trunk is fed for teacher forcing; a noise of `None` or all-clean levels adds nothing.

    Args:
        prompt_ids: B lists of token ids in front of the first slot.
        image_ids: (B, height, width) clean codes.
        noise: levels and noise of the codes; structural slots and prompts stay clean.
        bucket: the number of columns is made a multiple of it, by padding in front of the prompts.
    """
    device = image_ids.device
    slots = layout.slot_ids(image_ids)[:, :-1]  # nothing is predicted from the last slot
    table = backbone.slot_table()
    slot_embeddings = torch.nn.functional.embedding(slots, table)
    levels = torch.zeros_like(slots)
    side = slot_embeddings.new_zeros(0, slot_embeddings.shape[-1])
    if noise is not None and bool(noise.levels.any()):  # levels are on the CPU: no wait for the device
        space = EmbeddingSpace(table[: backbone.num_codes])
        fed = layout.code_slots[:-1].to(device)
        code_levels = noise.levels[:, :-1].to(device)
        t = noise.timesteps.to(device, slot_embeddings.dtype)[code_levels][..., None]
        clean = slot_embeddings[:, fed]
        if noise.states is None:
            states = perturb(space.normalise(clean), t, noise.eps[:, :-1].to(clean))
        else:
            states = noise.states[:, :-1].to(clean)
        noisy = space.denormalise(states)
        slot_embeddings = slot_embeddings.index_copy(1, fed, torch.where(t > 0, noisy, clean))
        seen, grid = noise.seen()
        levels = levels.index_copy(1, fed, seen[:, :-1].to(device))
        side = space.timestep_tokens(grid[1:].to(device))
    longest = max(map(len, prompt_ids))
    spare = -(len(side) + longest + slots.shape[1]) % bucket
    ids, starts = right_aligned(prompt_ids, longest + spare)
    ids, starts = ids.to(device), starts.to(device)
    num_side, prompt_len, batch = len(side), ids.shape[1], len(ids)
    prompts = backbone.embed_prompts(ids, starts)
    embeddings = torch.cat([side.expand(batch, -1, -1), prompts, slot_embeddings], dim=1)
    columns = torch.arange(embeddings.shape[1], device=device).expand(batch, -1)
    first = num_side + starts
    levels = torch.cat([levels.new_zeros(batch, num_side + prompt_len), levels], dim=1)
    visible = Visible.of_prompt(columns, first)._replace(side=levels - 1)
    mask = visible if backbone.takes_visible else visible.dense(embeddings.shape[1])
    # timestep tokens and padding are where the prompt starts
    places = columns.maximum(first[:, None]) - num_side - prompt_len
    distances = layout.distances(layout.num_slots).to(device).expand(batch, -1, -1) if layout.axes else None
    positions = position_ids(places, prompt_len - starts, distances, backbone.from_image)
    return TrunkInput(embeddings, positions, mask, num_side, prompt_len, visible.noisy if num_side else None)


def code_logits(backbone: Backbone, fed: TrunkInput, layout: ImageLayout) -> Tensor:
    """Logits (B, height * width, K) for every code, read at the column to its left."""
    return backbone.image_logits(code_hidden(backbone, fed, layout))


def code_hidden(backbone: Backbone, fed: TrunkInput, layout: ImageLayout) -> Tensor:
    """Hidden states (B, height * width, D) of the columns to the left of every code."""
    hidden = backbone(fed.embeddings, fed.position_ids, fed.attention_mask, noisy=fed.noisy)
    before_slot = layout.code_slots.to(hidden.device) + fed.num_side + fed.prompt_len - 1
    return hidden[:, before_slot]
