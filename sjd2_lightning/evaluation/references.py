"""Real images that generated ones are measured against: emoji, a folder, COCO; scenes are in `scene_judge`.

Altered copies of real images show the scale of a distance.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from sjd2_lightning.data.captions import NO_CAPTION
from sjd2_lightning.data.names import NO_PICTURE
from sjd2_lightning.data.pictures import CROPPED, READING, LazyImages, cropped, read_image
from sjd2_lightning.data.sources.coco import CocoItem, CocoProtocol
from sjd2_lightning.data.sources.emoji import load_emoji_index, render
from sjd2_lightning.data.sources.folder import listed_pictures
from sjd2_lightning.evaluation.prompts import PromptItem, seed_of
from sjd2_lightning.metrics.judge import Asked
from sjd2_lightning.models.image_tokenizer import ImageTokenizer, to_uint8


@dataclass(frozen=True)
class ReferenceSet:
    """Real images.

    Attributes:
        name: name of the set in reports.
        keys: name of each image.
        captions: caption of each image; "" where none is known.
        images: (M, h, w, 3) uint8 at the size of generated images, or M images of any sizes that are read
            when they are looked at; the latter have no altered copies.
        num_prompts: number of prompts that the set's protocol asks for; None where it asks for none.
        reading: rule by which the images' files were read; goes into the protocol of every distance.
        asked: what each caption asks for; empty where no judge is at home.
    """

    name: str
    keys: tuple[str, ...]
    captions: tuple[str, ...]
    images: Tensor | LazyImages
    num_prompts: int | None = None
    reading: str = ""
    asked: tuple[Asked, ...] = ()

    @property
    def num_images(self) -> int:
        return len(self.keys)

    @cached_property
    def identity(self) -> str:
        """sha256 over keys and pixels."""
        digest = hashlib.sha256("\n".join(self.keys).encode())
        for image in self.images:
            digest.update(f"{tuple(image.shape)}".encode() + image.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def matching(self, prompts: Sequence[PromptItem]) -> ReferenceSet:
        """The images that the prompts name, as many as there are prompts if possible.

        Where the prompts name none, images are taken evenly from the whole set. A distance depends on the
        number of images: only rows of equal numbers compare.
        """
        wanted = {item.key for item in prompts}
        chosen = [i for i, key in enumerate(self.keys) if key in wanted]
        if not chosen:
            count = min(len(prompts), self.num_images)
            chosen = [round(i) for i in np.linspace(0, self.num_images - 1, count)]
        return self.part(chosen)

    def part(self, places: Sequence[int]) -> ReferenceSet:
        """The images at some places."""
        return replace(
            self,
            keys=tuple(self.keys[i] for i in places),
            captions=tuple(self.captions[i] for i in places),
            images=self.images[places] if isinstance(self.images, Tensor) else self.images.select(places),
            asked=tuple(self.asked[i] for i in places) if self.asked else (),
        )


def held_out_emoji(size: int = 64) -> ReferenceSet:
    """The held-out pictures of the embedded emoji set, canonical view, `size` pixels wide and high."""
    items = [item for item in load_emoji_index() if item.split == "val"]
    images = torch.stack([torch.from_numpy(np.array(render(item.path, size))) for item in items])
    return ReferenceSet(
        "held-out Twemoji",
        tuple(item.key for item in items),
        tuple(item.caption for item in items),
        images,
        reading=READING,
    )


def image_folder(folder: str | Path, size: tuple[int, int]) -> ReferenceSet:
    """Images of a folder and its sub-folders, cut and resized to `size` = (height, width) as for training.

    Captions are read as for training too; an image needs none.

    Raises:
        ValueError: the folder is missing, holds fewer than two images, or one that cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"reference folder {folder} does not exist; give a folder of images")
    found: dict[str, str] = {}
    for record in listed_pictures(folder):
        if record.problem.startswith(NO_PICTURE):
            continue  # a text beside the images
        if record.problem and not record.problem.startswith(NO_CAPTION):
            raise ValueError(
                f"image {folder / record.name} cannot be used ({record.problem}); correct or remove it"
            )
        found.setdefault(record.file, record.caption)
    if len(found) < 2:
        raise ValueError(f"reference folder {folder} holds {len(found)} images; at least 2 are needed")
    images = torch.stack([_read_cropped(folder / name, size) for name in found])
    keys = tuple(PurePosixPath(name).with_suffix("").as_posix() for name in found)
    return ReferenceSet(folder.name, keys, tuple(found.values()), images, reading=CROPPED)


def reference_rows(reference: ReferenceSet, tokenizer: ImageTokenizer | None) -> dict[str, Tensor]:
    """The images as they are, through the tokenizer, blurred, and patch-shuffled; (M, h, w, 3) uint8 each.

    Empty for images that have sizes of their own.
    """
    if not isinstance(reference.images, Tensor):
        return {}
    rows = {"real": reference.images}
    if tokenizer is not None:
        rows["reconstructed"] = reconstructed(reference.images, tokenizer)
    rows["blurred"] = blurred(reference.images)
    rows["patch_shuffled"] = patch_shuffled(reference.images)
    return rows


def reconstructed(images: Tensor, tokenizer: ImageTokenizer, batch_size: int = 32) -> Tensor:
    """Images (M, h, w, 3) encoded and decoded by the image tokenizer: the best that a trunk could draw."""
    device = (
        next((p.device for p in tokenizer.parameters()), None)
        if isinstance(tokenizer, torch.nn.Module)
        else None
    )
    parts = []
    for batch in images.split(batch_size):
        pixels = batch.permute(0, 3, 1, 2).float().div(255).to(device)
        with torch.no_grad():
            parts.append(to_uint8(tokenizer.decode(tokenizer.encode(pixels))))
    return torch.cat(parts)


def blurred(images: Tensor) -> Tensor:
    """Images (M, h, w, 3) under a Gaussian blur whose deviation is 1/32 of their height, 1 pixel at least."""
    sigma = max(1.0, images.shape[1] / 32)
    size = 2 * round(3 * sigma) + 1
    return F.gaussian_blur(images.permute(0, 3, 1, 2), [size, size], [sigma, sigma]).permute(0, 2, 3, 1)


def patch_shuffled(images: Tensor, grid: int = 4, seed: int = 0) -> Tensor:
    """Images (M, h, w, 3) cut into grid x grid patches that change places, differently in each image."""
    height, width = images.shape[1] // grid, images.shape[2] // grid
    shuffled = images.clone()
    rng = np.random.default_rng(seed)
    for target, image in zip(shuffled, images, strict=True):
        for place, source in enumerate(rng.permutation(grid * grid)):
            (row, col), (from_row, from_col) = divmod(place, grid), divmod(int(source), grid)
            patch = image[from_row * height :, from_col * width :][:height, :width]
            target[row * height :, col * width :][:height, :width] = patch
    return shuffled


def _read_cropped(path: Path, size: tuple[int, int]) -> Tensor:
    picture = Image.fromarray(read_image(path, "remove or replace it").numpy())
    return torch.from_numpy(np.array(cropped(picture, size)))


def coco_prompts(items: Sequence[CocoItem], seed: int = 0) -> list[PromptItem]:
    """The captions as prompts; keys are those of the images."""
    return [PromptItem(item.key, item.caption, seed_of(item.key, seed)) for item in items]


def coco_reference(protocol: CocoProtocol, items: Sequence[CocoItem]) -> ReferenceSet:
    """The images of the captions at their own sizes; the extractor resizes them, as clean-fid does.

    Raises:
        ValueError: an image is not in the folder; an unreadable one raises when it is looked at.
    """
    paths = [protocol.images / item.file_name for item in items]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise ValueError(
            f"{len(missing)} images of {protocol.annotations} are not in {protocol.images}, the first is "
            f"{missing[0].name}; unpack the whole archive there"
        )
    return ReferenceSet(
        protocol.name,
        tuple(item.key for item in items),
        tuple(item.caption for item in items),
        LazyImages(partial(read_image, remedy="unpack it again"), paths),
        protocol.num_images,
        READING,
    )
