"""Codes that are small cut-out pictures on a smooth ground: the image tokenizer of the shipped models.

The first codes are colours of the ground, the others small pictures with transparency. A picture is drawn by
laying the small pictures on a ground that is interpolated between its colours, so the same object has the
same codes on every ground, and a plain ground is one code wherever it lies. That makes codes few and easy
to predict. Nothing here is learnt by gradients: the codebook is clustered from the pictures of the scenes.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from sjd2_lightning.models.image_codes import (
    PATCH_SETTINGS,
    check_image_ids,
    check_image_size,
    weights_identity,
)
from sjd2_lightning.models.weights import open_weights, read_json

WEIGHTS = "patch_tokenizer.safetensors"
_PART = 1024  # patches that are compared at once, so that their products stay in the cache
_FLAT = 8  # grey levels that differ within a patch of plain or graded ground
_GROUND = 16  # grey levels that a pixel of the ground may lie off the fitted ground
_ROUNDS = 6  # of the robust fit of the ground
_BLUR = 1.0  # deviation of the weights by which a missing ground is filled in, in codes


class PatchTokenizer(nn.Module):
    """A codebook of ground colours and of small pictures with transparency.

    Args:
        pictures: the codebook, (K, 4, side, side) uint8: red, green and blue times opacity, and opacity.
            The first `num_grounds` are plain and opaque.
        num_grounds: number of ground colours.
    """

    pictures: Tensor

    def __init__(self, pictures: Tensor, num_grounds: int) -> None:
        super().__init__()
        if pictures.ndim != 4 or pictures.shape[1] != 4 or not 0 < num_grounds < len(pictures):
            raise ValueError(
                f"a codebook of shape {[*pictures.shape]} with {num_grounds} grounds: must be "
                "(K, 4, side, side) with grounds and other pictures"
            )
        self.num_codes, _, self.downsample, _ = pictures.shape
        self.num_grounds = num_grounds
        self.register_buffer("pictures", pictures.to(torch.uint8))

    @property
    def identity(self) -> str:
        """Hash of the codebook: shards say with it which one made them."""
        return weights_identity(self, f"{self.num_grounds} grounds".encode())

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Image ids (B, H, W) int64 of images (B, 3, h, w) in [0, 1].

        Raises:
            ValueError: if the size is no multiple of `downsample`.
        """
        side = self.downsample
        check_image_size(images, side)
        pixels = (images * 255).round().unflatten(-1, (-1, side)).unflatten(-3, (-1, side))
        patches = pixels.permute(0, 2, 4, 1, 3, 5).flatten(-2)  # (B, H, W, 3, side * side)
        ground = fitted_ground(patches)
        is_ground = (patches - ground[..., None]).abs().flatten(-2).amax(-1) <= _GROUND
        colours = self.pictures[: self.num_grounds, :3, 0, 0].float()
        ids = nearest(patches.mean(-1)[is_ground], colours)
        found = torch.empty(is_ground.shape, dtype=torch.int64, device=images.device)
        found[is_ground] = ids
        found[~is_ground] = self.num_grounds + self._laid(patches[~is_ground], ground[~is_ground])
        return found

    def _laid(self, patches: Tensor, ground: Tensor) -> Tensor:
        """Which small picture, laid on its ground (N, 3), is nearest to each patch (N, 3, side * side).

        The squared error |x - p - (1 - a) g|^2 without |x|^2, as one product of what depends on the patch
        (x, x g, g, g^2) and what depends on the picture.
        """
        pictures = self.pictures[self.num_grounds :].flatten(2).float()
        colour, clear = pictures[:, :3], 1 - pictures[:, 3] / 255
        of_pictures = torch.cat(
            [
                -2 * colour.flatten(1),
                -2 * clear,
                2 * (colour * clear[:, None]).sum(-1),
                clear.square().sum(-1, keepdim=True),
                colour.square().sum((1, 2))[:, None],
            ],
            dim=1,
        )
        one = torch.ones_like(ground[:, :1])
        of_patches = torch.cat(
            [
                patches.flatten(1),
                (patches * ground[..., None]).sum(1),
                ground,
                ground.square().sum(-1, keepdim=True),
                one,
            ],
            dim=1,
        )
        parts = [(part @ of_pictures.T).argmin(1) for part in of_patches.split(_PART)]
        return torch.cat(parts) if parts else one.new_empty(0, dtype=torch.int64)

    @torch.no_grad()
    def decode(self, image_ids: Tensor) -> Tensor:
        """Images (B, 3, h, w) in [0, 1] of image ids (B, H, W).

        Raises:
            ValueError: if an id lies outside the codebook.
        """
        check_image_ids(image_ids, self.num_codes)
        chosen = (self.pictures.float() / 255)[image_ids]  # (B, H, W, 4, side, side)
        is_ground = image_ids < self.num_grounds
        ground = filled(chosen[..., :3, 0, 0].movedim(-1, 1), is_ground)
        ground = F.interpolate(ground, scale_factor=self.downsample, mode="bilinear", align_corners=False)
        laid = chosen * ~is_ground[..., None, None, None]
        laid = laid.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)  # (B, 4, h, w)
        return (laid[:, :3] + (1 - laid[:, 3:]) * ground).clamp(0, 1)

    def save(self, folder: str | Path, half: bool | None = True) -> None:
        """Writes codebook and settings; the bytes of a codebook have no other precision to be saved in."""
        del half
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({"pictures": self.pictures.cpu().contiguous()}, folder / WEIGHTS)
        settings = {"num_codes": self.num_codes, "side": self.downsample, "num_grounds": self.num_grounds}
        (folder / PATCH_SETTINGS).write_text(json.dumps(settings) + "\n")


def nearest(vectors: Tensor, centres: Tensor) -> Tensor:
    """The number of the nearest centre (K, C) of each vector (N, C), (N,) int64."""
    halves = centres.square().sum(1) / 2
    parts = [(halves - part @ centres.T).argmin(1) for part in vectors.split(_PART)]
    return torch.cat(parts) if parts else halves.new_empty(0, dtype=torch.int64)


def fitted_ground(patches: Tensor) -> Tensor:
    """Colour of the ground behind each patch, (B, H, W, 3), of patches (B, H, W, 3, N) in grey levels.

    A plane a channel through the means of the patches that are nearly flat, from the rim inwards; patches
    far off the plane lose their weight (iteratively reweighted least squares, Cauchy's weights).
    """
    means = patches.mean(-1)
    flat = ((patches.amax(-1) - patches.amin(-1)).amax(-1) <= _FLAT).float()
    height, width = flat.shape[1:]
    rows, columns = (torch.linspace(-1, 1, n, device=means.device) for n in (height, width))
    basis = torch.stack(
        [torch.ones(height, width, device=means.device), *torch.meshgrid(rows, columns, indexing="ij")], -1
    ).flatten(0, 1)  # (H * W, 3)
    rim = torch.ones_like(flat)
    rim[:, 1:-1, 1:-1] = 0
    weights, values = (flat * rim).flatten(1), means.flatten(1, 2)
    for _ in range(_ROUNDS):
        weighted = basis * (weights + 1e-6)[..., None]  # (B, H * W, 3)
        plane = torch.linalg.solve(weighted.mT @ basis, weighted.mT @ values)
        fitted = basis @ plane
        off = (values - fitted).abs().amax(-1)
        weights = flat.flatten(1) / (1 + (off / 4).square())
    return fitted.view(means.shape)


def filled(colours: Tensor, known: Tensor) -> Tensor:
    """Colours (B, 3, H, W) where they are known (B, H, W), and means of the known ones nearby elsewhere.

    Near and far means are added with falling weights, so that nothing stays empty; grey where nothing is
    known.
    """
    mask = known[:, None].to(colours)
    total, weight = torch.zeros_like(colours), torch.zeros_like(mask)
    for step in range(4):
        kernel = _blur_kernel(_BLUR * 2**step).to(colours)
        share = 1e-3**step
        total = total + share * _blurred(colours * mask, kernel)
        weight = weight + share * _blurred(mask, kernel)
    smooth = (total + 0.5e-12) / (weight + 1e-12)
    return torch.where(known[:, None], colours, smooth)


def _blur_kernel(deviation: float) -> Tensor:
    places = torch.arange(-int(3 * deviation), int(3 * deviation) + 1)
    kernel = torch.exp(-0.5 * (places / deviation).square())
    return kernel / kernel.sum()


def _blurred(images: Tensor, kernel: Tensor) -> Tensor:
    channels, reach = images.shape[1], len(kernel) // 2
    for shape in ((1, 1, -1, 1), (1, 1, 1, -1)):
        weight = kernel.view(shape).expand(channels, *([-1] * 3))
        padding = (reach, 0) if shape[2] == -1 else (0, reach)
        images = F.conv2d(images, weight, padding=padding, groups=channels)
    return images


def load_patch_tokenizer(folder: str | Path) -> PatchTokenizer:
    """The tokenizer that `save` wrote.

    Raises:
        ValueError: a file is missing or broken, or does not fit the settings.
    """
    folder = Path(folder)
    settings = read_json(folder / PATCH_SETTINGS)
    with open_weights(folder / WEIGHTS):
        pass
    try:
        tokenizer = PatchTokenizer(load_file(folder / WEIGHTS)["pictures"], settings["num_grounds"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / WEIGHTS} does not fit {PATCH_SETTINGS} beside it: {error}") from error
    return tokenizer.eval()
