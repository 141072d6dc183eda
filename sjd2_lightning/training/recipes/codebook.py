"""Recipe of the shipped image tokenizers: the codebook of the objects and grounds of a set of scenes."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio

from sjd2_lightning.data.sources.scene_pixels import UNITS, cut_outs, ground_pixels
from sjd2_lightning.data.sources.scenes import (
    CATEGORY_SHARES,
    Variety,
    aligned_boxes,
    held_out_scene,
    training_scene,
)
from sjd2_lightning.models.patch_tokenizer import PatchTokenizer
from sjd2_lightning.run.stages import stage
from sjd2_lightning.training.recipes import TokenizerRecipe

log = logging.getLogger(__name__)

_NUM_GROUNDS = 3000  # scenes whose grounds are looked at
_MOST_COLOURS = 40_000
_LEAST_OPACITY = 12  # of 255; a patch without such a pixel is ground
_HELD_OUT_SCENES = 30  # of each category


def make_tokenizer(recipe: TokenizerRecipe, variety: Variety, folder: str | Path) -> dict[str, float]:
    """Cluster a codebook, save the tokenizer and measure it on held-out scenes.

    Args:
        recipe: sizes.
        variety: the scenes; their objects must be aligned, else patches do not repeat.
        folder: gets the tokenizer.

    Returns:
        "val/psnr": mean over held-out scenes, in dB.

    Raises:
        ValueError: the scenes are not aligned.
    """
    if not variety.aligned:
        raise ValueError(
            "data.aligned=false: a codebook of cut-outs needs aligned objects; use data=scenes_small"
        )
    with stage("clustering the pictures of the objects"):
        cut = kmeans(object_patches(variety, recipe.side).flatten(1), recipe.num_codes - recipe.num_grounds)
    with stage("clustering the colours of the grounds"):
        colours = kmeans(_ground_colours(variety, recipe.side), recipe.num_grounds)
    shape = (-1, 4, recipe.side, recipe.side)
    opaque = torch.cat([colours, torch.full((len(colours), 1), 255.0)], 1)[..., None, None].expand(shape)
    pictures = torch.cat([opaque, cut.view(shape)]).round().clamp(0, 255)
    tokenizer = PatchTokenizer(pictures, recipe.num_grounds)
    with stage("measuring it on held-out scenes"):
        psnr = _held_out_psnr(tokenizer, variety)
    tokenizer.save(folder)
    log.info("val/psnr %.1f dB on held-out scenes; the tokenizer is in %s", psnr, folder)
    return {"val/psnr": psnr}


def object_patches(variety: Variety, side: int) -> Tensor:
    """Every patch of every aligned object, (N, 4, side, side) in grey levels, colours times opacity."""
    found = []
    for noun, width, height in aligned_boxes(variety):
        picture = cut_outs()[noun].resize((width, height), Image.Resampling.LANCZOS)
        canvas = Image.new("RGBA", (-(-width // side) * side, -(-height // side) * side))
        canvas.paste(picture, (0, 0))
        pixels = torch.from_numpy(np.array(canvas)).float()
        pixels[..., :3] *= pixels[..., 3:] / 255
        tiles = pixels.unfold(0, side, side).unfold(1, side, side).flatten(0, 1)
        found.append(tiles[tiles[:, 3].amax((1, 2)) > _LEAST_OPACITY])
    return torch.cat(found)


def _ground_colours(variety: Variety, side: int) -> Tensor:
    """Mean colours of patches of ground, (N, 3) in grey levels."""
    found = []
    for index in range(_NUM_GROUNDS):
        ground = training_scene(0, index, variety).ground
        grid = ground_pixels(ground, UNITS).reshape(UNITS // side, side, UNITS // side, side, 3)
        found.append(np.unique(grid.mean((1, 3)).reshape(-1, 3).round(1), axis=0))
    colours = torch.from_numpy(np.concatenate(found)).float()
    order = torch.randperm(len(colours), generator=torch.Generator().manual_seed(0))
    return colours[order[:_MOST_COLOURS]]


def _held_out_psnr(tokenizer: PatchTokenizer, variety: Variety) -> float:
    values = [
        peak_signal_noise_ratio(tokenizer.decode(tokenizer.encode(images)), images, 1.0, dim=(1, 2, 3))
        for images in _held_out_images(variety)
    ]
    return float(torch.stack(values).mean())


def _held_out_images(variety: Variety) -> Iterator[Tensor]:
    """Held-out scenes, a batch (B, 3, h, w) in [0, 1] a category."""
    for category in CATEGORY_SHARES:
        scenes = [held_out_scene(category, 1, index, variety) for index in range(_HELD_OUT_SCENES)]
        pixels = np.stack([scene.image() for scene in scenes])
        yield torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255


def kmeans(vectors: Tensor, number: int, num_rounds: int = 15) -> Tensor:
    """Centres (number, C) of vectors (N, C): k-means++ (Arthur and Vassilvitskii 2007), then Lloyd's rounds.

    scipy's start compares every vector with every centre chosen so far, minutes at thousands of centres.
    """
    generator = torch.Generator().manual_seed(0)
    centres = vectors[torch.randint(len(vectors), (1,), generator=generator)]
    gaps = (vectors - centres).square().sum(1)
    for _ in range(number - 1):
        weights = gaps if gaps.sum() > 0 else torch.ones(len(gaps))
        new = vectors[torch.multinomial(weights, 1, generator=generator)]
        gaps = gaps.minimum((vectors - new).square().sum(1))
        centres = torch.cat([centres, new])
    for _ in range(num_rounds):
        nearest = torch.cat([torch.cdist(part, centres).argmin(1) for part in vectors.split(4096)])
        counts = torch.bincount(nearest, minlength=number)[:, None]
        sums = torch.zeros_like(centres).index_add_(0, nearest, vectors)
        centres = torch.where(counts > 0, sums / counts.clamp(min=1), centres)
    return centres
