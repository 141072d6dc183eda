"""Builds the shards of a data set once, and again when anything they are made from changes.

``python -m sjd2_lightning.data.prepare emoji --out data/emoji --tokenizer weights/tiny/tokenizer``
writes ``<out>/raw/{train,val}`` (PNG) and ``<out>/codes/{train,val}`` (image ids). Source: ours.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any, Literal

import numpy as np
import torch
from rich.progress import track

from sjd2_lightning.data.emoji import (
    ATTRIBUTION,
    EmojiImage,
    jitter,
    load_emoji_index,
    render,
    source_identity,
)
from sjd2_lightning.data.shards import FORMAT_VERSION, INDEX_NAME, ShardIndex, ShardMeta, write_shards
from sjd2_lightning.models.image_tokenizer import ImageTokenizer, load_image_tokenizer

CODE_VERSION = 1  # raise it when the same inputs would give other samples
SOURCE = "emoji"
ENCODE_BATCH = 64

View = tuple[EmojiImage, int]


@dataclass(frozen=True)
class EmojiRecipe:
    """What a folder of emoji shards is made from, apart from the tokenizer.

    Args:
        kind: "raw" or "codes".
        split: "train" or "val".
        views: Variants of a picture: the canonical one and views - 1 jittered ones.
        size: Side of the pictures in pixels.
        samples_per_shard: Samples in every shard but the last.
        max_images: Keep only so many pictures; None for all.
    """

    kind: Literal["raw", "codes"]
    split: Literal["train", "val"]
    views: int
    size: int
    samples_per_shard: int
    max_images: int | None

    def inputs_hash(self, tokenizer_hash: str | None) -> str:
        """Hash of everything that the shards depend on."""
        inputs = [asdict(self), source_identity(), tokenizer_hash, CODE_VERSION, FORMAT_VERSION]
        return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()

    def chosen_views(self) -> list[View]:
        """Pictures and view numbers in shard order: mixed once, since readers mix only within a buffer."""
        items = [item for item in load_emoji_index() if item.split == self.split]
        Random(0).shuffle(items)
        chosen = [(item, view) for item in items[: self.max_images] for view in range(self.views)]
        if self.views > 1:
            Random(1).shuffle(chosen)
        return chosen


def prepare_emoji(
    out_dir: str | Path,
    tokenizer: ImageTokenizer | None = None,
    views: int = 4,
    *,
    size: int = 64,
    samples_per_shard: int = 2048,
    max_images: int | None = None,
    show_progress: bool = True,
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

    Returns:
        The indexes by name: "raw/train", "raw/val", and with a tokenizer "codes/train", "codes/val".

    Raises:
        ValueError: `views` is below 1, or a folder holds another data set or lacks shards of its index.
    """
    if views < 1:
        raise ValueError(f"data.views counts the canonical view, so it must be at least 1; got {views}.")
    recipes = [
        EmojiRecipe("raw", split, 1, size, samples_per_shard, max_images) for split in ("train", "val")
    ]
    if tokenizer is not None:
        recipes.append(EmojiRecipe("codes", "train", views, size, samples_per_shard, max_images))
        recipes.append(EmojiRecipe("codes", "val", 1, size, samples_per_shard, max_images))
    indexes = {}
    for recipe in recipes:
        folder = Path(out_dir) / recipe.kind / recipe.split
        coder = tokenizer if recipe.kind == "codes" else None
        inputs_hash = recipe.inputs_hash(coder.identity if coder else None)
        index = _fresh_index(folder, inputs_hash)  # before the lock: fresh shards may be on a read-only disk
        if index is None:
            with _locked(Path(out_dir)):
                index = _fresh_index(folder, inputs_hash) or _build(folder, recipe, coder, show_progress)
        indexes[f"{recipe.kind}/{recipe.split}"] = index
    return indexes


def _build(
    folder: Path, recipe: EmojiRecipe, tokenizer: ImageTokenizer | None, show_progress: bool
) -> ShardIndex:
    for leftover in folder.parent.glob(f".{folder.name}-*"):
        shutil.rmtree(leftover, ignore_errors=True)  # of a build that was killed; the lock is ours
    tokenizer_hash = tokenizer.identity if tokenizer else None
    inputs_hash = recipe.inputs_hash(tokenizer_hash)
    side = recipe.size // tokenizer.downsample if tokenizer else recipe.size
    meta = ShardMeta(
        recipe.kind,
        recipe.split,
        SOURCE,
        side,
        side,
        ATTRIBUTION,
        inputs_hash,
        tokenizer.num_codes if tokenizer else None,
        tokenizer_hash,
    )
    label = f"preparing {recipe.kind}/{recipe.split}"
    chosen = track(recipe.chosen_views(), label, disable=not show_progress)
    samples: Iterator[dict[str, Any]] = (_draw(item, view, recipe.size) for item, view in chosen)
    if tokenizer is not None:
        samples = _encoded(samples, tokenizer)
    return write_shards(samples, folder, recipe.samples_per_shard, meta)


def _fresh_index(folder: Path, inputs_hash: str) -> ShardIndex | None:
    """The index of the folder if its shards are what they should be; None if they must be built."""
    if not (folder / INDEX_NAME).is_file():
        if folder.exists() and any(folder.iterdir()):
            raise ValueError(
                f"{folder} holds files but no {INDEX_NAME}; choose another folder or empty this one."
            )
        return None
    index = ShardIndex.load(folder)
    if index.meta.source != SOURCE:
        raise ValueError(
            f"{folder} holds shards of {index.meta.source!r}, not of {SOURCE!r}; choose another folder."
        )
    if index.meta.inputs_hash != inputs_hash:
        return None
    index.check_files()
    return index


def _draw(item: EmojiImage, view: int, size: int) -> dict[str, Any]:
    if view == 0:
        key, image = item.key, render(item.path, size)
    else:
        key = f"{item.key}_v{view}"
        seed = hashlib.sha256(key.encode()).digest()[:8]  # of its own: no view depends on what else is chosen
        image = jitter(item.path, np.random.default_rng(int.from_bytes(seed, "big")), size)
    return {
        "key": key,
        "caption": item.caption,
        "concept": item.concept,
        "view": view,
        "size": (size, size),
        "image": image,
    }


def _encoded(samples: Iterable[dict[str, Any]], tokenizer: ImageTokenizer) -> Iterator[dict[str, Any]]:
    samples = iter(samples)
    while chunk := list(islice(samples, ENCODE_BATCH)):
        pixels = torch.from_numpy(np.stack([sample.pop("image") for sample in chunk]))
        codes = tokenizer.encode(pixels.permute(0, 3, 1, 2).float() / 255).cpu().numpy()
        for sample, image_ids in zip(chunk, codes, strict=True):
            yield {**sample, "image_ids": image_ids}


@contextmanager
def _locked(out_dir: Path) -> Iterator[None]:
    """One process builds at a time; others wait and then find fresh shards."""
    out_dir.mkdir(parents=True, exist_ok=True)
    with (out_dir / ".prepare.lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)  # the kernel lets go of it if this process is killed
        yield


def main(arguments: list[str] | None = None) -> None:
    """Command line: prepare a data set and say what is there."""
    parser = argparse.ArgumentParser(prog="python -m sjd2_lightning.data.prepare", description=__doc__)
    parser.add_argument("source", choices=[SOURCE])
    parser.add_argument("--out", default="data/emoji", help="folder for the shards (default: %(default)s)")
    parser.add_argument(
        "--tokenizer", help="folder of the image tokenizer; without it only raw shards are made"
    )
    parser.add_argument(
        "--views", type=int, default=4, help="views of a training picture (default: %(default)s)"
    )
    parser.add_argument("--size", type=int, default=64, help="side in pixels (default: %(default)s)")
    parser.add_argument("--samples-per-shard", type=int, default=2048, help="(default: %(default)s)")
    parser.add_argument("--max-images", type=int, help="only so many pictures of each split")
    options = parser.parse_args(arguments)
    try:
        tokenizer = load_image_tokenizer(options.tokenizer) if options.tokenizer else None
        indexes = prepare_emoji(
            options.out,
            tokenizer,
            options.views,
            size=options.size,
            samples_per_shard=options.samples_per_shard,
            max_images=options.max_images,
        )
    except ValueError as error:
        parser.exit(1, f"{error}\n")
    for name, index in indexes.items():
        print(f"{Path(options.out) / name}: {index.num_samples} samples in {len(index.shards)} shards")


if __name__ == "__main__":
    main()
