"""Captioned pictures as people have them: folders, img2dataset tars, COCO. Parquet has a file of its own.

A source lists its records once; the bytes of a picture are a stretch of a file, so that any order and any
number of processes can read them.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from sjd2_lightning.data.index import KEY
from sjd2_lightning.data.names import check_regular
from sjd2_lightning.data.pictures import MAX_BYTES, cropped, read_picture
from sjd2_lightning.run.files import sha256_of_json


class Record(NamedTuple):
    """A caption and where its picture lies: bytes `start` to `start + num_bytes` of a file of the source.

    A sample that is known to be unusable is a record too, with its `problem`: it is counted and named.
    """

    key: str
    caption: str
    file: str
    start: int
    num_bytes: int
    changed: int = 0  # time of the file's last change, part of what shards depend on
    member: str = ""  # what of the file it is, where that holds more than one
    problem: str = ""

    @property
    def name(self) -> str:
        """What people find it by."""
        return f"{self.file}/{self.member}" if self.member else self.file


Reader = Callable[[str, Record], bytes]


@dataclass(frozen=True)
class FilePictures:
    """Records of a source at one size: a `build.PictureSet`.

    Args:
        root: folder that the records' files are named from.
        records: in the order of the shards; records of one picture are neighbours.
        size: height and width in pixels.
        min_side: smaller pictures are unusable.
        read: bytes of a record's picture.
    """

    root: str
    records: Sequence[Record]
    size: tuple[int, int]
    min_side: int
    read: Reader

    def picture(self, record: Record) -> tuple[str, int, str]:
        """Where the picture lies, or why there is none."""
        return record.file, record.start, record.problem

    def image(self, record: Record) -> np.ndarray:
        """The picture, cropped to size."""
        if record.problem:
            raise ValueError(record.problem)
        return cropped(read_picture(self.read(self.root, record), self.min_side), self.size)

    def facts(self, record: Record) -> dict[str, Any]:
        """Key, caption, and the file the picture came from."""
        return {"key": record.key, "caption": record.caption, "file": record.name}

    @property
    def identity(self) -> str:
        """Hash of all records."""
        return sha256_of_json([list(record) for record in self.records])


def key_of(name: str) -> str:
    """A sample's key from the name of its picture: plain characters, and a hash where some had to go."""
    bare = re.sub(r"\.\w+$", "", name)
    if KEY.fullmatch(bare) and len(bare) <= 64 and bare[0].isalnum():  # keys of prompts begin so
        return bare
    plain = re.sub(r"[^A-Za-z0-9_-]+", "_", bare)[-48:].strip("_-") or "picture"
    return f"{plain}-{hashlib.sha256(bare.encode(errors='surrogateescape')).hexdigest()[:12]}"


class NothingUsableError(ValueError):
    """A source has no usable sample; `records` are the others."""

    def __init__(self, message: str, records: Sequence[Record]) -> None:
        super().__init__(message)
        self.records = records


def checked_records(records: Sequence[Record], root: Path, remedy: str) -> list[Record]:
    """The records, each with a key of its own, case aside.

    Raises:
        NothingUsableError: none of them can be used.
    """
    if all(record.problem for record in records):
        counts = f"0 of {len(records)}: {reasons_of(records)}" if records else "there are no pictures at all"
        raise NothingUsableError(f"{root} has no pictures with captions ({counts}); {remedy}", records)
    uses = Counter[str]()
    unique = []
    for record in records:
        uses[record.key.lower()] += 1
        count = uses[record.key.lower()]
        again = key_of(f"{record.name}_{count} ")
        unique.append(record if count == 1 else record._replace(key=again))
    return unique


def reasons_of(unusable: Sequence[Record]) -> str:
    """The commonest reasons why samples cannot be used, and an example."""
    reasons = Counter(record.problem for record in unusable).most_common(3)
    return "; ".join(f"{count} x {reason}" for reason, count in reasons) + f", e.g. {unusable[0].name}"


def file_record(root: Path, name: str, key: str, caption: str, problem: str = "") -> Record:
    """Record of a picture that is a file; raises ValueError if its name leads out of the folder."""
    if problem:
        return Record(key, "", name, 0, 0, problem=problem)
    path = inside(root, name)
    try:
        check_regular(path)
        stat = path.stat()
    except OSError as error:
        return Record(key, "", name, 0, 0, problem=f"cannot be read ({error.strerror})")
    except ValueError as error:
        return Record(key, "", name, 0, 0, problem=str(error))
    return Record(key, caption, name, 0, stat.st_size, stat.st_mtime_ns)


def inside(root: Path, name: str) -> Path:
    """A file of a folder by a name that others wrote; raises ValueError if it leads out of the folder."""
    path = root / name
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"{name!r} leads out of {root}; only files inside it are read")
    return path


def read_stretch(root: str, record: Record) -> bytes:
    """The bytes of a record's picture; ValueError if they are not there."""
    if record.num_bytes > MAX_BYTES:
        raise ValueError(f"a file of {record.num_bytes} bytes, {MAX_BYTES} are the most")
    try:
        stream = _opened(f"{root}/{record.file}", record.changed)
        # no position to share with a fork
        content = os.pread(stream.fileno(), record.num_bytes, record.start)
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror or error})") from error
    if len(content) < record.num_bytes:
        raise ValueError(f"ends early, after {len(content)} of {record.num_bytes} bytes")
    return content


@lru_cache(maxsize=16)
def _opened(path: str, changed: int) -> BinaryIO:
    return open(path, "rb")  # noqa: PTH123  kept open: a tar holds thousands of pictures


def chosen_records(
    records: Sequence[Record],
    split: str,
    val_share: float,
    seed: int,
    max_images: int | None,
    block: Callable[[Record], Any] | None = None,
) -> list[Record]:
    """The records of one split, mixed picture by picture.

    Which split a picture belongs to depends on the name of its file alone, so that more pictures, another
    order or another seed move none.

    Args:
        records: records of the source.
        split: train or val.
        val_share: share of the pictures that is held out; 0 or 1 puts all into train or val.
        seed: decides the order.
        max_images: keep only so many pictures; None for all.
        block: what is read at once stays together, where reading single pictures costs too much; None mixes
            all.
    """
    groups: dict[tuple[str, int], list[Record]] = {}
    for record in records:
        groups.setdefault((record.file, record.start), []).append(record)
    kept = [group for group in groups.values() if (_share(group[0].key) < val_share) == (split == "val")]
    rng = Random(seed)
    rng.shuffle(kept)
    if block is not None:
        blocks = list({block(group[0]) for group in kept})
        order = {found: place for place, found in enumerate(sorted(blocks))}
        places = rng.sample(range(len(blocks)), len(blocks))
        kept.sort(key=lambda group: places[order[block(group[0])]])
    return [record for group in kept[:max_images] for record in group]


def share_of_fewest(records: Sequence[Record], fewest: int) -> float:
    """The share for `chosen_records` that holds out so many pictures, or a fifth of a small set."""
    first = {(record.file, record.start): record.key for record in reversed(records) if not record.problem}
    shares = sorted(map(_share, first.values()))
    count = min(fewest, max(len(shares) // 5, 1), len(shares))
    return math.nextafter(shares[count - 1], 1) if count else 0.0


def _share(key: str) -> float:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64
