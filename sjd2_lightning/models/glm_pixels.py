"""Pixels of GLM-Image: diffusers' pipeline goes on from codes that were drawn here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sjd2_lightning.models.backbone import ImageLayout


def load_pixels(
    folder: str | Path, dtype: torch.dtype = torch.bfloat16, device: str | torch.device = "cpu"
) -> Any:
    """The diffusion stage of the release, `GlmImagePipeline` without its autoregressive model.

    Args:
        folder: `zai-org/GLM-Image`, or a local copy in diffusers' layout; nothing is downloaded.
        dtype: type of its numbers.
        device: where it runs.

    Raises:
        ValueError: a part is missing or cannot be read.
    """
    from diffusers import GlmImagePipeline

    without: dict[str, Any] = {"vision_language_encoder": None, "processor": None}
    try:
        pipeline = GlmImagePipeline.from_pretrained(
            folder, torch_dtype=dtype, local_files_only=True, use_safetensors=True, **without
        )
    except Exception as error:  # diffusers has many kinds
        raise ValueError(
            f"no diffusion stage of GLM-Image in {folder} ({error}); get it with `hf download "
            "zai-org/GLM-Image --local-dir weights/glm_image`"
        ) from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


@torch.no_grad()
def draw_pixels(
    pipeline: Any,
    image_ids: Tensor,
    layout: ImageLayout,
    prompts: Sequence[str],
    seeds: Sequence[int],
    num_steps: int = 50,
    guidance_scale: float = 1.5,
) -> Tensor:
    """Images (B, 3, h, w) in [0, 1] of drawn codes.

    Args:
        pipeline: from `load_pixels`.
        image_ids: (B, 1, n) codes of drafts and images, as decoding gives them.
        layout: layout of the images.
        prompts: their texts; words in quotation marks are what the picture is to have written in it.
        seeds: seeds of the diffusion's noise, one an image.
        num_steps, guidance_scale: settings of the diffusion; the pipeline's defaults.
    """
    height, width = layout.grid
    found = []
    for codes, prompt, seed in zip(image_ids, prompts, seeds, strict=True):
        drawn = codes.flatten()[-height * width :].view(1, 1, height, width)
        # a code covers two places of the diffusion's grid on each side
        prior = F.interpolate(drawn.float(), scale_factor=2, mode="nearest").long().view(1, -1)
        found.append(
            pipeline(
                prompt=prompt,
                prior_token_ids=prior.to(pipeline.device),
                height=layout.pixels[0],
                width=layout.pixels[1],
                num_inference_steps=num_steps,
                guidance_scale=guidance_scale,
                generator=torch.Generator().manual_seed(seed),
                output_type="pt",
            ).images
        )
    return torch.cat(found).float().clamp(0, 1)
