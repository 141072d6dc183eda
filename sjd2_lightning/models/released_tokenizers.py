"""Image tokenizers that lie inside transformers' models: Emu3's and Janus' own, both ways.

They hold the model's own module and are no modules themselves, so that its weights are saved once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sjd2_lightning.models.image_tokenizer import check_image_ids, weights_identity


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
        height, width = images.shape[-2:]
        if height % self.downsample or width % self.downsample:
            raise ValueError(f"images of {width}x{height} pixels: must be multiples of {self.downsample}")
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


class Emu3Tokenizer(InnerTokenizer):
    """Emu3's: a video tokenizer that takes a picture as frames that are all alike."""

    def _codes(self, pixels: Tensor) -> Tensor:
        sizes = torch.tensor([pixels.shape[-2:]] * len(pixels))
        return torch.stack(list(self.vq.encode(pixels, sizes).image_tokens))

    def _pixels(self, image_ids: Tensor) -> Tensor:
        return self.vq.decode(image_ids)


class JanusTokenizer(InnerTokenizer):
    """Janus': its decoder reads codes as directions, so encoding compares directions too.

    The class of transformers compares lengths as well; the original implementation does not.
    """

    def _codes(self, pixels: Tensor) -> Tensor:
        latents = F.normalize(self.vq.quant_conv(self.vq.encoder(pixels)), dim=1)  # (B, C, H, W)
        rows = F.normalize(self.vq.quantize.embedding.weight, dim=-1)
        return torch.einsum("bchw,kc->bhwk", latents, rows).argmax(-1)

    def _pixels(self, image_ids: Tensor) -> Tensor:
        return self.vq.decode(image_ids.flatten(1))
