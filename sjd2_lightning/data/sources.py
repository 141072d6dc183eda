"""Captioned pictures as people have them: folders, img2dataset tars, COCO. Parquet has a file of its own.

A source lists its records once; the bytes of a picture are a stretch of a file, so that any order and any
number of processes can read them. Source: ours.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from sjd2_lightning.data.pictures import MAX_BYTES, cropped, read_picture
from sjd2_lightning.data.shards import KEY, hash_of

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
CAPTION_FIELDS = ("caption", "text", "prompt", "txt")
METADATA = ("metadata.jsonl", "metadata.csv")


class Record(NamedTuple):
    """A caption and where its picture lies: bytes `start` to `start + num_bytes` of a file of the source."""

    key: str
    caption: str
    file: str
    start: int
    num_bytes: int
    changed: int = 0  # time of the file's last change, part of what shards depend on


Reader = Callable[[str, Record], bytes]


@dataclass(frozen=True)
class FilePictures:
    """Records of a source at one size: a `building.PictureSet`.

    Args:
        root: Folder that the records' files are named from.
        records: In the order of the shards; records of one picture are neighbours.
        size: Height and width in pixels.
        min_side: Smaller pictures are unusable.
        read: Bytes of a record's picture.
    """

    root: str
    records: Sequence[Record]
    size: tuple[int, int]
    min_side: int
    read: Reader

    def picture(self, record: Record) -> tuple[str, int]:
        """Where the picture lies."""
        return record.file, record.start

    def image(self, record: Record) -> np.ndarray:
        """The picture, cropped to size."""
        return cropped(read_picture(self.read(self.root, record), self.min_side), self.size)

    def facts(self, record: Record) -> dict[str, Any]:
        """Key, caption, and the file the picture came from."""
        return {"key": record.key, "caption": record.caption, "file": record.file}

    @property
    def identity(self) -> str:
        """Hash of all records."""
        return hash_of([list(record) for record in self.records])


def key_of(name: str) -> str:
    """A sample's key from the name of its picture: plain characters, and a hash where some had to go."""
    bare = re.sub(r"\.\w+$", "", name)
    if KEY.fullmatch(bare) and len(bare) <= 64:
        return bare
    plain = re.sub(r"[^A-Za-z0-9_-]+", "_", bare)[-48:].strip("_")
    return f"{plain}-{hashlib.sha256(bare.encode()).hexdigest()[:12]}"


def folder_records(root: Path) -> list[Record]:
    """Pictures of a folder and its sub-folders.

    Captions come from ``metadata.jsonl`` or ``metadata.csv`` in the folder (`file_name` and one of `caption`,
    `text`, `prompt`), else from the ``.txt`` beside each picture; a picture without one is left out.

    Raises:
        ValueError: there are no pictures with captions, or metadata that cannot be read or name a file
            outside the folder.
    """
    if not root.is_dir():
        raise ValueError(f"{root} is no folder; give --input a folder of pictures.")
    metadata = [root / name for name in METADATA if (root / name).is_file()]
    captions = _metadata_captions(metadata[0]) if metadata else _captions_beside(root)
    keys = Counter[str]()
    records = []
    for name, caption in captions:
        key = key_of(name)
        keys[key] += 1
        if caption:  # a.jpg and a.png are two pictures
            unique = key if keys[key] == 1 else key_of(f"{name}_{keys[key]} ")
            records.append(_file_record(root, name, unique, caption))
    if not records:
        raise ValueError(
            f"{root} has no pictures with captions: put <name>.txt beside <name>.jpg, or a metadata.jsonl "
            "with file_name and caption into the folder."
        )
    return records


def _captions_beside(root: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(root.rglob("*")):
        text = path.with_suffix(".txt")
        if path.suffix.lower() in SUFFIXES and text.is_file():
            caption = text.read_text(encoding="utf-8", errors="replace").strip()
            yield path.relative_to(root).as_posix(), caption


def _metadata_captions(path: Path) -> Iterator[tuple[str, str]]:
    with path.open(encoding="utf-8", newline="") as stream:
        rows: Any = csv.DictReader(stream) if path.suffix == ".csv" else _json_lines(stream, path)
        for row in rows:
            if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
                raise ValueError(f"{path}: a row has no file_name; it names the picture within the folder.")
            yield row["file_name"], caption_in(row) or ""


def _json_lines(stream: Any, path: Path) -> Iterator[Any]:
    for number, line in enumerate(stream, 1):
        if line.strip():
            try:
                yield json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}: line {number} is no JSON ({error}); correct it.") from error


def caption_in(fields: Mapping[str, Any], names: Sequence[str] = CAPTION_FIELDS) -> str | None:
    """The first caption among some fields."""
    found = (fields.get(name) for name in names)
    return next((text.strip() for text in found if isinstance(text, str) and text.strip()), None)


def _file_record(root: Path, name: str, key: str, caption: str) -> Record:
    path = inside(root, name)
    try:
        stat = path.stat()
    except OSError:
        return Record(key, caption, name, 0, 0)  # reading it will say what is wrong
    return Record(key, caption, name, 0, stat.st_size, stat.st_mtime_ns)


def inside(root: Path, name: str) -> Path:
    """A file of a folder by a name that others wrote; raises ValueError if it leads out of the folder."""
    path = root / name
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"{name!r} leads out of {root}; only files inside it are read.")
    return path


def coco_records(root: Path, annotations: Path, captions_per_image: int | None = 1) -> list[Record]:
    """Pictures of COCO with their captions.

    Args:
        root: folder of the pictures, e.g. ``train2017``.
        annotations: e.g. ``annotations/captions_train2017.json``.
        captions_per_image: the first so many captions of a picture, a sample each; None for all.

    Raises:
        ValueError: the annotations cannot be read.
    """
    try:
        content = json.loads(annotations.read_text(encoding="utf-8"))
        names = {image["id"]: str(image["file_name"]) for image in content["images"]}
        captions: dict[int, list[str]] = {number: [] for number in names}
        for entry in sorted(content["annotations"], key=lambda entry: entry["id"]):
            captions[entry["image_id"]].append(" ".join(str(entry["caption"]).split()))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{annotations} are no COCO captions ({error!r}); give --annotations captions_*.json."
        ) from error
    records = []
    for number in sorted(names):
        for place, caption in enumerate(list(filter(None, captions[number]))[:captions_per_image]):
            key = key_of(names[number]) + (f"_c{place}" if place else "")
            records.append(_file_record(root, names[number], key, caption))
    return records


def tar_records(root: Path) -> list[Record]:
    """Pictures in the tars of a folder, as img2dataset and WebDataset write them: k.jpg, k.txt, k.json.

    The caption is the .txt, else the `caption` of the .json.

    Raises:
        ValueError: there are no tars, one cannot be read, or none holds a picture with a caption.
    """
    paths = sorted(root.glob("*.tar")) if root.is_dir() else [root]
    if not paths or not paths[0].is_file():
        raise ValueError(f"{root} has no .tar files; give --input a folder of them, or one.")
    folder = root if root.is_dir() else root.parent
    records = [record for path in paths for record in _records_of_tar(path, folder)]
    if not records:
        raise ValueError(f"{root}: no tar holds a picture with a caption (.jpg with .txt or .json).")
    return records


def _records_of_tar(path: Path, folder: Path) -> Iterator[Record]:
    name, changed = path.relative_to(folder).as_posix(), path.stat().st_mtime_ns
    found: dict[str, dict[str, Any]] = {}
    try:
        with tarfile.open(path, "r:") as tar:  # uncompressed: a picture is a stretch of the file
            for member in tar:
                stem, _, suffix = member.name.partition(".")
                fields = found.setdefault(stem, {})
                if f".{suffix.lower()}" in SUFFIXES and member.isreg():
                    fields["picture"] = (member.offset_data, member.size)
                elif suffix in ("txt", "json") and member.isreg() and member.size <= 2**20:
                    fields[suffix] = tar.extractfile(member).read()  # type: ignore[union-attr]
    except (OSError, tarfile.TarError) as error:
        raise ValueError(f"{path} cannot be read as an uncompressed tar ({error}).") from error
    for stem, fields in found.items():
        caption = _tar_caption(fields)
        if "picture" in fields and caption:
            start, num_bytes = fields["picture"]
            yield Record(key_of(f"{name}/{stem}"), caption, name, start, num_bytes, changed)


def _tar_caption(fields: Mapping[str, Any]) -> str | None:
    caption = " ".join(fields.get("txt", b"").decode(errors="replace").split())
    if caption or "json" not in fields:
        return caption or None
    try:
        facts = json.loads(fields["json"])
    except (ValueError, RecursionError):
        return None
    return caption_in(facts) if isinstance(facts, dict) else None


def read_stretch(root: str, record: Record) -> bytes:
    """The bytes of a record's picture; ValueError if they are not there."""
    if record.num_bytes > MAX_BYTES:
        raise ValueError(f"a file of {record.num_bytes} bytes, {MAX_BYTES} are the most")
    try:
        stream = _opened(f"{root}/{record.file}", record.changed)
        return os.pread(stream.fileno(), record.num_bytes, record.start)  # no position to share with a fork
    except OSError as error:
        raise ValueError(f"{record.file} cannot be read ({error.strerror or error})") from error


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
        records: of the source.
        split: train or val.
        val_share: share of the pictures that is held out; 0 or 1 puts all into train or val.
        seed: of the order.
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


def _share(key: str) -> float:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64
