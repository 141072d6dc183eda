"""Plain autoregression without cache, window or batch: slow, short, and what every fast path is held to."""

from __future__ import annotations

import torch
from torch import Tensor

from sjd2_lightning.decoding.law import Sampling, has_law, log_law, without_law
from sjd2_lightning.decoding.randomness import Purpose, gumbel, slot_keys, stream
from sjd2_lightning.masks import attention_mask
from sjd2_lightning.models.backbone import Backbone, ImageLayout, position_ids


def _next_logits(backbone: Backbone, layout: ImageLayout, prompt_ids: list[int], slots: list[int]) -> Tensor:
    ids, length = torch.tensor([prompt_ids], device=backbone.device), len(prompt_ids)
    embeddings = backbone.embed_prompts(ids, torch.zeros_like(ids[:, 0]))
    drawn = backbone.slot_table()[torch.tensor(slots, dtype=torch.long, device=backbone.device)]
    embeddings = torch.cat([embeddings, drawn[None]], dim=1)
    columns = torch.arange(embeddings.shape[1], device=backbone.device)[None]
    clean = torch.zeros_like(columns)
    mask = attention_mask(columns, clean, clean[:, 0], columns.shape[1])
    distances = layout.distances(layout.num_slots).to(backbone.device)[None] if layout.axes else None
    lengths = torch.full_like(clean[:, 0], length)
    positions = position_ids(columns - length, lengths, distances, backbone.from_image)
    return backbone.image_logits(backbone(embeddings, positions, mask)[:, -1])


@torch.inference_mode()
def decode_reference(
    backbone: Backbone,
    prompt: str,
    seed: int,
    sampling: Sampling,
    layout: ImageLayout,
    num_slots: int | None = None,
) -> Tensor:
    """Slot ids (N,) of one image: a full forward a token, token = argmax(log law + the slot's Gumbel vector).

    Args:
        num_slots: stop after so many slots; all by default.

    Raises:
        ValueError: the logits are not finite.
    """
    contexts = [backbone.prompt_ids(prompt, layout)]
    if sampling.guidance_scale != 1:
        contexts.append(backbone.unconditional_ids(layout, contexts[0]))
    scales = sampling.scales(layout.num_slots).tolist()
    slots: list[int] = []
    for slot, forced in enumerate(layout.forced[:num_slots]):
        if forced >= 0:
            slots.append(forced)
            continue
        logits = torch.cat([_next_logits(backbone, layout, ids, slots) for ids in contexts])
        scale = scales[slot] if len(contexts) == 2 else 1.0
        conditional, unconditional = logits[0], logits[-1]
        mixed = unconditional + scale * (conditional - unconditional)
        banned = (conditional == -torch.inf) & (unconditional == -torch.inf)
        scores = log_law(mixed.masked_fill(banned, -torch.inf), sampling)
        if not has_law(scores):
            dtype = str(conditional.dtype).removeprefix("torch.")
            raise without_law(backbone, f"at slot {slot} of the image, in {dtype}")
        key = stream(slot_keys(torch.tensor(seed), torch.tensor(slot)), Purpose.GUMBEL).to(scores.device)
        slots.append(int((scores + gumbel(key, backbone.num_codes)).argmax()))
    return torch.tensor(slots)
