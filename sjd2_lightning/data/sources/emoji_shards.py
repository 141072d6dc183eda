"""The shards of the emoji data, and their views.

Source: ours.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from sjd2_lightning.data.ensure import Coder, Wanted, ensure_shards
from sjd2_lightning.data.index import ShardIndex
from sjd2_lightning.data.sources.emoji import (
    ATTRIBUTION,
    EmojiImage,
    jitter,
    load_emoji_index,
    render,
    source_identity,
)
from sjd2_lightning.models.image_tokenizer import ImageTokenizer

SOURCE = "emoji"
TRANSFORM = "alpha on white, resized by Lanczos; views above 0 are slightly smaller and shifted on white"

View = tuple[EmojiImage, int]


@dataclass(frozen=True)
class EmojiViews:
    """Pictures of one split in shard order: a `building.PictureSet`.

    Args:
        split: train or val.
        views: Variants of a picture: the canonical one and views - 1 jittered ones.
        size: Side of the pictures in pixels.
        max_images: Keep only so many pictures; None for all.
    """

    split: str
    views: int
    size: int
    max_images: int | None
    records: list[View] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        items = [item for item in load_emoji_index() if item.split == self.split]
        Random(0).shuffle(items)  # once: readers mix only within a buffer
        chosen = [(item, view) for item in items[: self.max_images] for view in range(self.views)]
        if self.views > 1:
            Random(1).shuffle(chosen)
        object.__setattr__(self, "records", chosen)

    def picture(self, record: View) -> str:
        """Every view is a picture of its own."""
        return _key(record)

    def image(self, record: View) -> np.ndarray:
        """The view, (size, size, 3) uint8."""
        item, view = record
        if view == 0:
            return render(item.path, self.size)
        # a seed of its own: no view depends on what else is chosen
        seed = hashlib.sha256(_key(record).encode()).digest()[:8]
        return jitter(item.path, np.random.default_rng(int.from_bytes(seed, "big")), self.size)

    def facts(self, record: View) -> dict[str, Any]:
        """Key, caption, concept and number of the view."""
        item, view = record
        return {"key": _key(record), "caption": item.caption, "concept": item.concept, "view": view}


def _key(record: View) -> str:
    item, view = record
    return f"{item.key}_v{view}" if view else item.key


def prepare_emoji(
    out_dir: str | Path,
    tokenizer: ImageTokenizer | Coder | None = None,
    views: int = 4,
    *,
    size: int = 64,
    samples_per_shard: int = 2048,
    max_images: int | None = None,
    show_progress: bool = True,
    num_workers: int = 0,
) -> dict[str, ShardIndex]:
    """Make sure that the shards of the emoji data are there and fresh (ours).

    Args:
        out_dir: Folder that gets ``raw`` and, with a tokenizer, ``codes``.
        tokenizer: Turns pictures into codes; None prepares raw shards only.
        views: Views of a training picture in the code shards; raw and validation shards have the
            canonical view only.
        size: Side of the pictures in pixels.
        samples_per_shard: Samples in every shard but the last of its folder.
        max_images: Keep only so many pictures of each split; None for all.
        show_progress: Show a progress bar for every folder that is built.
        num_workers: Processes that read and encode; 0 does it in this process.

    Returns:
        The indexes by name: "raw/train", "raw/val", and with a tokenizer "codes/train", "codes/val".

    Raises:
        ValueError: `views` is below 1, or a folder holds another data set or lacks shards of its index.
    """
    if views < 1:
        raise ValueError(f"data.views counts the canonical view, so it must be at least 1; got {views}.")
    coder = Coder(tokenizer) if isinstance(tokenizer, ImageTokenizer) else tokenizer
    recipes: list[tuple[Coder | None, str, int]] = [(None, "train", 1), (None, "val", 1)]
    if coder is not None:
        recipes += [(coder, "train", views), (coder, "val", 1)]
    indexes = {}
    for made_by, split, num_views in recipes:
        recipe = {"split": split, "views": num_views, "size": size, "max_images": max_images}
        wanted = Wanted(
            Path(out_dir),
            split,
            SOURCE,
            ATTRIBUTION,
            TRANSFORM,
            (size, size),
            [recipe, source_identity()],
            lambda recipe=recipe: EmojiViews(**recipe),  # type: ignore[misc]
            made_by,
            samples_per_shard,
        )
        indexes[f"{wanted.kind}/{split}"] = ensure_shards(wanted, show_progress, num_workers=num_workers)
    return indexes
