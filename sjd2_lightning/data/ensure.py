"""Shards that are there and fresh: found, or built once by one process.

Source: ours.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sjd2_lightning.data.build import BATCH_PIXELS, Build, PictureSet
from sjd2_lightning.data.index import FORMAT_VERSION, INDEX_NAME, ShardIndex, ShardMeta
from sjd2_lightning.data.workers import build_folder
from sjd2_lightning.models.image_tokenizer import ImageTokenizer
from sjd2_lightning.run.files import sha256_of_json

CODE_VERSION = 2  # raise it when the same inputs would give other samples


@dataclass(frozen=True)
class Coder:
    """What makes codes of pictures.

    Args:
        tokenizer: The image tokenizer.
        name: Where it was read from, for people.
        device: cpu, or cuda.
        batch: Pictures that are encoded at once; None: as many as suits their size.
    """

    tokenizer: ImageTokenizer
    name: str | None = None
    device: str = "cpu"
    batch: int | None = None


@dataclass(frozen=True)
class Wanted:
    """A folder of shards that should be there.

    Args:
        out_dir: The shards are in ``<out_dir>/<codes or raw>/<split>``.
        split: train or val.
        source: Name of the data set.
        attribution: Licence line of the pictures.
        transform: How pictures are brought to size.
        size: Height and width in pixels.
        inputs: Plain values that say what the shards are made from, apart from the tokenizer.
        pictures: Gives the pictures; asked only if the shards must be built.
        coder: Makes codes; None wants raw shards.
        samples_per_shard: Records of every shard but the last.
    """

    out_dir: Path
    split: str
    source: str
    attribution: str
    transform: str
    size: tuple[int, int]
    inputs: Any
    pictures: Callable[[], PictureSet]
    coder: Coder | None
    samples_per_shard: int

    @property
    def kind(self) -> str:
        """codes or raw."""
        return "raw" if self.coder is None else "codes"

    def meta(self) -> ShardMeta:
        """What the shards' index will say; raises ValueError for a size the tokenizer does not divide."""
        tokenizer = self.coder.tokenizer if self.coder else None
        step = tokenizer.downsample if tokenizer else 1
        height, width = self.size
        if height % step or width % step:
            raise ValueError(f"image size {height}x{width}: must be multiples of {step} for this tokenizer.")
        identity = tokenizer.identity if tokenizer else None
        inputs = [self.inputs, self.split, self.source, self.transform, list(self.size)]
        inputs += [self.samples_per_shard, identity, CODE_VERSION, FORMAT_VERSION]
        return ShardMeta(
            self.kind,
            self.split,
            self.source,
            height // step,
            width // step,
            self.attribution,
            sha256_of_json(inputs),
            tokenizer.num_codes if tokenizer else None,
            identity,
            self.coder.name if self.coder else None,
            self.transform,
            self.size,
        )


def ensure_shards(wanted: Wanted, show_progress: bool = True, **options: Any) -> ShardIndex:
    """The index of the wanted shards, built if they are missing or stale.

    Args:
        wanted: The shards.
        show_progress: Show a progress bar.
        options: Of `build_folder`.

    Raises:
        ValueError: The folder holds another data set or lacks shards of its index; or of `build_folder`.
    """
    meta, folder = wanted.meta(), wanted.out_dir / wanted.kind / wanted.split
    index = _fresh_index(folder, meta)  # before the lock: fresh shards may be on a read-only disk
    if index is not None:
        return index
    coder = wanted.coder
    with _locked(wanted.out_dir):
        if index := _fresh_index(folder, meta):
            return index
        folder.parent.mkdir(parents=True, exist_ok=True)
        batch = coder.batch if coder else None
        if batch is None:
            factor = 16 if coder and coder.device == "cuda" else 1
            batch = max(1, factor * BATCH_PIXELS // (wanted.size[0] * wanted.size[1]))
        build = Build(
            folder,
            meta,
            wanted.pictures(),
            coder.tokenizer if coder else None,
            wanted.samples_per_shard,
            batch,
        )
        device = coder.device if coder else "cpu"
        return build_folder(build, device=device, show_progress=show_progress, **options)


def _fresh_index(folder: Path, meta: ShardMeta) -> ShardIndex | None:
    """The index of the folder if its shards are what they should be; None if they must be built."""
    if not (folder / INDEX_NAME).is_file():
        if folder.exists() and any(folder.iterdir()):
            raise ValueError(
                f"{folder} holds files but no {INDEX_NAME}; choose another folder or empty this one."
            )
        return None
    try:
        index = ShardIndex.load(folder)
    except ValueError:
        if _source_of_older_format(folder) == meta.source:
            return None
        raise
    if index.meta.source != meta.source:
        raise ValueError(
            f"{folder} holds shards of {index.meta.source!r}, not of {meta.source!r}; choose another folder."
        )
    if index.meta.inputs_hash != meta.inputs_hash:
        return None
    index.check_files()
    return index


def _source_of_older_format(folder: Path) -> str | None:
    try:
        content = json.loads((folder / INDEX_NAME).read_text(encoding="utf-8"))
        return str(content["source"]) if content["format_version"] < FORMAT_VERSION else None
    except (ValueError, KeyError, TypeError):
        return None


@contextmanager
def _locked(out_dir: Path) -> Iterator[None]:
    """One process builds at a time; others wait and then find fresh shards."""
    out_dir.mkdir(parents=True, exist_ok=True)
    with (out_dir / ".prepare.lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)  # the kernel lets go of it when this process and its forks end
        yield
