"""Published measuring protocols over COCO: which prompts, which real images, from a folder on this machine.

Source: ours, after what the field does. "FID-30k" is COCO 2014 val and the figures of the SJD family are COCO
2017 val, so each protocol has its own name, and figures of different names are not comparable.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sjd2_lightning.prompts import PromptItem, seed_of
from sjd2_lightning.records import LazyImages
from sjd2_lightning.references import ReferenceSet


@dataclass(frozen=True)
class CocoProtocol:
    """Captions and images of COCO, as its archives unpack.

    Attributes:
        name: of the protocol; goes into every report.
        annotations: a captions_*.json.
        images: the folder of the JPEGs that it names.
        num_images: captions to draw, each of another image.
    """

    name: str
    annotations: Path
    images: Path
    num_images: int


@dataclass(frozen=True)
class CocoItem:
    """One image with the caption that stands for it."""

    image_id: int
    file_name: str
    caption: str

    @property
    def key(self) -> str:
        return f"coco-{self.image_id:012d}"


def coco_items(protocol: CocoProtocol) -> list[CocoItem]:
    """The images of a protocol with one caption each, in the order of their ids.

    The caption of an image is the one with the lowest annotation id. Where the file holds more images than
    the protocol wants, those are taken whose id has the smallest sha256: a fixed draw that no seed changes.

    Raises:
        ValueError: the file is missing, is no COCO captions file, or holds too few captioned images.
    """
    images, captions = _read(protocol.annotations)
    chosen = sorted(images.keys() & captions.keys())
    if len(chosen) < protocol.num_images:
        raise ValueError(
            f"{protocol.annotations} has captions of {len(chosen)} images and {protocol.name} needs "
            f"{protocol.num_images}; use the whole file, or set metrics.protocol.num_images and another name"
        )
    if len(chosen) > protocol.num_images:
        chosen = sorted(sorted(chosen, key=_draw)[: protocol.num_images])
    return [CocoItem(image_id, images[image_id], captions[image_id]) for image_id in chosen]


def coco_prompts(items: Sequence[CocoItem], seed: int = 0) -> list[PromptItem]:
    """The captions as prompts; keys are those of the images."""
    return [PromptItem(item.key, item.caption, seed_of(item.key, seed)) for item in items]


def coco_reference(protocol: CocoProtocol, items: Sequence[CocoItem]) -> ReferenceSet:
    """The images of the captions at their own sizes; the extractor resizes them, as clean-fid does.

    Raises:
        ValueError: an image is not in the folder. One that cannot be read is an error when it is looked at.
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
        LazyImages(_read_rgb, paths),
        protocol.num_images,
    )


def _read(path: Path) -> tuple[dict[int, str], dict[int, str]]:
    """File names and captions by image id."""
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
        images = {int(entry["id"]): str(entry["file_name"]) for entry in content["images"]}
        captions: dict[int, tuple[int, str]] = {}
        for entry in content["annotations"]:
            found = (int(entry["id"]), " ".join(str(entry["caption"]).split()))
            image_id = int(entry["image_id"])
            captions[image_id] = min(found, captions.get(image_id, found))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} cannot be read as COCO captions ({type(error).__name__}: {error}); "
            "give captions_val2017.json or its like, from COCO's archive of annotations"
        ) from error
    unsafe = [name for name in images.values() if Path(name).name != name]
    if unsafe:
        raise ValueError(f"{path} names the file {unsafe[0]!r}; names of COCO hold no folders")
    return images, {image_id: text for image_id, (_, text) in captions.items() if text}


def _draw(image_id: int) -> str:
    return hashlib.sha256(f"coco:{image_id}".encode()).hexdigest()


def _read_rgb(path: Path) -> Tensor:
    try:
        with Image.open(path) as image:
            return torch.from_numpy(np.array(image.convert("RGB")))
    except OSError as error:
        raise ValueError(f"reference image {path} cannot be read: {error}; unpack it again") from error
