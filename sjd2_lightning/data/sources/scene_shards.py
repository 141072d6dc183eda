"""The shards of the scenes: training scenes, and held-out ones of every category but the held-out names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL

from sjd2_lightning.data.ensure import Coder, Wanted, ensure_shards
from sjd2_lightning.data.index import ShardIndex
from sjd2_lightning.data.sources.emoji import ATTRIBUTION, source_identity
from sjd2_lightning.data.sources.scene_pixels import UNITS
from sjd2_lightning.data.sources.scenes import (
    ALL,
    CATEGORY_SHARES,
    Scene,
    Variety,
    held_out_scene,
    training_scene,
)
from sjd2_lightning.models.image_tokenizer import ImageTokenizer

SOURCE = "scenes"
TRANSFORM = "one to four pictures on a plain or graded ground, resized by Lanczos"
SCENES_VERSION = 2  # raise it when the same seed and index give another scene
HELD_OUT_PER_CATEGORY = 128  # in the validation shards


def held_out_for(max_images: int | None) -> int:
    """Held-out scenes of each category where a split may have so many pictures; one at least."""
    if max_images is None:
        return HELD_OUT_PER_CATEGORY
    return min(max(max_images // len(CATEGORY_SHARES), 1), HELD_OUT_PER_CATEGORY)


@dataclass(frozen=True)
class SceneSet:
    """Scenes of one split in shard order: a `build.PictureSet`.

    Args:
        split: train or val.
        seed: seed of the scenes.
        num_scenes: how many there are; of the val split, so many of each category.
        size: side in pixels.
        variety: how much scenes differ.
    """

    split: str
    seed: int
    num_scenes: int
    size: int
    variety: Variety = ALL

    @property
    def records(self) -> Sequence[int]:
        """Numbers of the scenes; what a number shows is worked out when it is asked for."""
        return range(self.num_scenes * (len(CATEGORY_SHARES) if self.split == "val" else 1))

    def scene(self, record: int) -> Scene:
        """The scene of a number; held-out scenes take turns by category."""
        if self.split == "train":
            return training_scene(self.seed, record, self.variety)
        categories = tuple(CATEGORY_SHARES)
        category, index = categories[record % len(categories)], record // len(categories)
        return held_out_scene(category, self.seed, index, self.variety)

    def picture(self, record: int) -> int:
        """Every scene is a picture of its own."""
        return record

    def image(self, record: int) -> np.ndarray:
        """The scene, (size, size, 3) uint8."""
        return self.scene(record).image(self.size)

    def facts(self, record: int) -> dict[str, Any]:
        """Key, caption, category and what the caption claims."""
        return self.scene(record).facts()


def prepare_scenes(
    out_dir: str | Path,
    tokenizer: ImageTokenizer | Coder | None = None,
    num_scenes: int = 20_000,
    *,
    size: int = UNITS,
    seed: int = 0,
    variety: Variety = ALL,
    held_out_per_category: int = HELD_OUT_PER_CATEGORY,
    samples_per_shard: int = 2048,
    show_progress: bool = True,
    num_workers: int = 0,
) -> dict[str, ShardIndex]:
    """Make sure that the shards of the scenes are there and fresh.

    Args:
        out_dir: folder that gets `codes`, or `raw` without a tokenizer.
        tokenizer: turns pictures into codes; None prepares raw shards.
        num_scenes: scenes of the training split.
        size: side of the pictures in pixels.
        seed: seed of the scenes.
        variety: how much scenes differ.
        held_out_per_category: scenes of each category of the val split.
        samples_per_shard: samples in every shard but the last of its folder.
        show_progress: show a progress bar for every folder that is built.
        num_workers: processes that paint and encode; 0 does it in this process.

    Returns:
        The indexes by name: "codes/train" and "codes/val", or "raw/train" and "raw/val".

    Raises:
        ValueError: a number is below 1, or a folder holds another data set or lacks shards of its index.
    """
    for name, value in (("num_scenes", num_scenes), ("held_out_per_category", held_out_per_category)):
        if value < 1:
            raise ValueError(f"data.{name} is {value}, the least is 1")
    coder = Coder(tokenizer) if isinstance(tokenizer, ImageTokenizer) else tokenizer
    indexes = {}
    for split, number in (("train", num_scenes), ("val", held_out_per_category)):
        pictures = SceneSet(split, seed, number, size, variety)
        # Pillow resamples: another release may round a pixel otherwise
        inputs = [split, seed, number, size, SCENES_VERSION, source_identity(), f"pillow {PIL.__version__}"]
        if variety != ALL:
            inputs.append(asdict(variety))
        wanted = Wanted(
            Path(out_dir),
            split,
            SOURCE,
            ATTRIBUTION,
            TRANSFORM,
            (size, size),
            inputs,
            lambda pictures=pictures: pictures,  # type: ignore[misc]
            coder,
            samples_per_shard,
        )
        indexes[f"{wanted.kind}/{split}"] = ensure_shards(wanted, show_progress, num_workers=num_workers)
    return indexes
