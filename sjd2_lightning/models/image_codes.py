"""What every image tokenizer does with codes: their bounds, and the name of the weights behind them."""

from __future__ import annotations

import hashlib
from pathlib import Path

from torch import Tensor, nn

from sjd2_lightning.models.weights import finite
from sjd2_lightning.run.stages import stage

PATCH_SETTINGS = "patch_tokenizer.json"  # of an image tokenizer whose codes are small pictures


def has_image_tokenizer(folder: Path) -> bool:
    """Whether an image tokenizer lies in a folder: small pictures or a VQModel."""
    return any((folder / name).is_file() for name in (PATCH_SETTINGS, "config.json"))


def weights_identity(module: nn.Module, prefix: bytes = b"") -> str:
    """Hash of a module's weights, the same in every precision that holds them exactly.

    Raises:
        ValueError: a weight is not finite: codes made with it would all be one.
    """
    digest = hashlib.sha256(prefix)
    with stage("identifying the image tokenizer"):
        for name, value in sorted(module.state_dict().items()):
            finite(name, value, "the image tokenizer")
            digest.update(name.encode())
            digest.update(value.float().cpu().numpy().tobytes())
    return digest.hexdigest()


def check_image_size(images: Tensor, downsample: int) -> None:
    """Raises ValueError if a side of images (B, 3, h, w) is no multiple of what a code covers."""
    height, width = images.shape[-2:]
    if height % downsample or width % downsample:
        raise ValueError(f"images of {width}x{height} pixels: must be multiples of {downsample}")


def check_image_ids(image_ids: Tensor, num_codes: int) -> None:
    """Raises ValueError if an id lies outside the codebook."""
    if image_ids.numel() and (image_ids.min() < 0 or image_ids.max() >= num_codes):
        raise ValueError(f"image ids must lie in [0, {num_codes}); got {image_ids.min()}..{image_ids.max()}")
