"""Pixels to image ids and back, on top of ``diffusers.VQModel``.

VQModel is the kept class whose layers fit the taming VQGAN that Lumina-mGPT decodes with, so the tiny
default and the 7B model share this file. A model with more than three input channels sees space-to-depth
patches (``in_channels = 3 * patch**2``), which makes small tokenizers cheap.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from diffusers import VQModel
from torch import Tensor, nn
from torch.nn import functional as F

from sjd2_lightning.models.image_codes import (
    PATCH_SETTINGS,
    check_image_ids,
    check_image_size,
    weights_identity,
)
from sjd2_lightning.models.patch_tokenizer import PatchTokenizer, load_patch_tokenizer
from sjd2_lightning.models.weights import finite, open_weights, read_json


@runtime_checkable
class ImageTokenizer(Protocol):
    """What sampling and shard writing need of an image tokenizer."""

    num_codes: int
    downsample: int

    @property
    def identity(self) -> str: ...

    def encode(self, images: Tensor) -> Tensor: ...

    def decode(self, image_ids: Tensor) -> Tensor: ...


def codes_shape(tokenizer: ImageTokenizer, height: int, width: int) -> tuple[int, int]:
    """(H, W) of the codes of pictures of (height, width) pixels, multiples of the tokenizer's `downsample`.

    A tokenizer whose codes are no grid of the picture says so by a method of this name.
    """
    own: Any = getattr(tokenizer, "codes_shape", None)
    grid = (height // tokenizer.downsample, width // tokenizer.downsample)
    return grid if own is None else own(*grid)


def to_uint8(images: Tensor) -> Tensor:
    """Images in [0, 1], (B, 3, h, w) float, as (B, h, w, 3) uint8 on the CPU.

    Raises:
        ValueError: if a value is not finite or lies outside [0, 1] by more than rounding.
    """
    if wrong := (~images.flatten(1).isfinite().all(1)).nonzero().flatten().tolist():
        raise ValueError(
            f"the pixels of image {wrong[0] + 1} of {len(images)} are not finite: weights of the image "
            "decoder hold NaN or infinity, or its numbers overflow; get the weights again"
        )
    if images.min() < -1e-3 or images.max() > 1 + 1e-3:
        raise ValueError("images must lie in [0, 1]; clamp what the image decoder returns")
    return (images.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()


_SETTINGS = "image_tokenizer.json"  # beside the diffusers config: what VQModel does not know


class VQImageTokenizer(nn.Module):
    """``diffusers.VQModel`` with ids in and out; images are floats in [0, 1].

    Args:
        vq: the model.
        isolate_patches: encode every patch of `downsample` pixels a side alone. VQModel normalises its
            features over the whole picture, so that the codes of a plain white patch differ from picture
            to picture, which makes codes needlessly hard to predict. Decoding always sees all codes.
    """

    def __init__(self, vq: VQModel, isolate_patches: bool = False) -> None:
        super().__init__()
        self.vq = vq
        self.isolate_patches = isolate_patches
        self.patch = round((vq.config.in_channels / 3) ** 0.5)
        self.num_codes = int(vq.config.num_vq_embeddings)
        self.downsample = self.patch * 2 ** (len(vq.config.block_out_channels) - 1)

    @property
    def identity(self) -> str:
        """Hash of weights and settings: shards say with it which tokenizer made them."""
        return weights_identity(self.vq, b"patches alone" if self.isolate_patches else b"")

    def save(self, folder: str | Path, half: bool | None = True) -> None:
        """Writes a ``diffusers`` folder.

        Args:
            folder: gets the files.
            half: in half precision; None only if that holds the weights exactly, so that the copy is the same
                tokenizer to the shards that this one made.
        """
        if half is None:
            half = all(torch.equal(value, value.half().to(value)) for value in self.vq.state_dict().values())
        copy = VQModel.from_config(self.vq.config)
        copy.load_state_dict(self.vq.state_dict())
        (copy.half() if half else copy).save_pretrained(folder, safe_serialization=True)
        settings = {"isolate_patches": self.isolate_patches}
        (Path(folder) / _SETTINGS).write_text(json.dumps(settings) + "\n")

    def latents(self, images: Tensor) -> Tensor:
        """Continuous latents (B, C, H, W) of images (B, 3, h, w) in [0, 1]."""
        if not self.isolate_patches:
            return self._encoded(images)
        side = self.downsample
        tiles = images.unfold(2, side, side).unfold(3, side, side)  # (B, 3, H, W, side, side)
        batch, _, height, width = tiles.shape[:4]
        alone = self._encoded(tiles.permute(0, 2, 3, 1, 4, 5).flatten(0, 2))
        return alone.view(batch, height, width, -1).permute(0, 3, 1, 2)

    def _encoded(self, images: Tensor) -> Tensor:
        return self.vq.encode(F.pixel_unshuffle(images * 2 - 1, self.patch)).latents

    def pixels(self, quantised: Tensor) -> Tensor:
        """Images (B, 3, h, w), not clamped, of quantised latents (B, C, H, W)."""
        decoded = self.vq.decoder(self.vq.post_quant_conv(quantised))
        return (F.pixel_shuffle(decoded, self.patch) + 1) / 2

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Image ids (B, H, W) int64 of images (B, 3, h, w) in [0, 1]."""
        latents = self.latents(images)
        _, _, (_, _, ids) = self.vq.quantize(latents)
        return ids.view(latents.shape[0], *latents.shape[-2:])

    @torch.no_grad()
    def decode(self, image_ids: Tensor) -> Tensor:
        """Images (B, 3, h, w) in [0, 1] of image ids (B, H, W).

        Raises:
            ValueError: if an id lies outside the codebook.
        """
        check_image_ids(image_ids, self.num_codes)
        return self.pixels(self.vq.quantize.embedding(image_ids).permute(0, 3, 1, 2)).clamp(0, 1)


def load_image_tokenizer(folder: str | Path) -> VQImageTokenizer | PatchTokenizer:
    """The tokenizer in a local folder, in fp32 and eval mode: small pictures, or a ``diffusers`` VQModel.

    Raises:
        ValueError: if the folder holds neither, or one of broken files or of weights that are not finite.
    """
    folder = Path(folder)
    if (folder / PATCH_SETTINGS).is_file():
        return load_patch_tokenizer(folder)
    weights = folder / "diffusion_pytorch_model.safetensors"
    if not weights.is_file():
        raise ValueError(
            f"no image tokenizer in {folder}: {weights.name} is missing; "
            "make that of the scenes with `sjd2 train experiment=tiny_tokenizer`"
        )
    with open_weights(weights):
        pass
    try:
        for name in ("config.json", _SETTINGS):
            if (folder / name).is_file():
                read_json(folder / name)
        vq = VQModel.from_pretrained(
            folder,
            torch_dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            low_cpu_mem_usage=False,  # needs a further package, and saves nothing at this size
        )
    except Exception as error:  # diffusers has many kinds
        raise ValueError(f"the image tokenizer in {folder} cannot be read: {error}") from error
    for name, value in vq.state_dict().items():
        finite(name, value, weights)
    settings = folder / _SETTINGS
    isolate = bool(read_json(settings).get("isolate_patches")) if settings.is_file() else False
    return VQImageTokenizer(vq, isolate).eval().requires_grad_(False)


class InnerTokenizer:
    """A tokenizer over a model's `vqmodel`; pixels go in and come out in [0, 1], the module's are in [-1, 1].

    Args:
        vq: the module, in single precision: half precision shows in flat areas.
        num_codes: size of its codebook.
        downsample: pixels a code covers on each side.
    """

    def __init__(self, vq: Any, num_codes: int, downsample: int) -> None:
        self.vq = vq.float().eval().requires_grad_(False)
        self.num_codes = num_codes
        self.downsample = downsample

    @property
    def identity(self) -> str:
        """Hash of the weights: shards say with it which tokenizer made them."""
        return weights_identity(self.vq)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Image ids (B, H, W) int64 of images (B, 3, h, w) in [0, 1].

        Raises:
            ValueError: if the size is no multiple of `downsample`.
        """
        check_image_size(images, self.downsample)
        return self._codes(images * 2 - 1)

    @torch.no_grad()
    def decode(self, image_ids: Tensor) -> Tensor:
        """Images (B, 3, h, w) in [0, 1] of image ids (B, H, W); raises ValueError outside the codebook."""
        check_image_ids(image_ids, self.num_codes)
        return ((self._pixels(image_ids) + 1) / 2).clamp(0, 1)

    def _codes(self, pixels: Tensor) -> Tensor:
        raise NotImplementedError

    def _pixels(self, image_ids: Tensor) -> Tensor:
        raise NotImplementedError
