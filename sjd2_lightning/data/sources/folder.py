"""Pictures in a folder, with captions beside them or in a metadata file (Hugging Face's `imagefolder`)."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sjd2_lightning.data.sources.record import SUFFIXES, Record, caption_in, file_record, key_of

METADATA = ("metadata.jsonl", "metadata.csv")


def folder_records(root: Path) -> list[Record]:
    """Pictures of a folder and its sub-folders.

    Captions come from ``metadata.jsonl`` or ``metadata.csv`` in the folder (`file_name` and one of `caption`,
    `text`, `prompt`), else from the ``.txt`` beside each picture; a picture without one is left out.

    Raises:
        ValueError: there are no pictures with captions, or metadata that cannot be read or name a file
            outside the folder.
    """
    if not root.is_dir():
        raise ValueError(f"{root} is no folder; give --input a folder of pictures")
    metadata = [root / name for name in METADATA if (root / name).is_file()]
    captions = _metadata_captions(metadata[0]) if metadata else _captions_beside(root)
    keys = Counter[str]()
    records = []
    for name, caption in captions:
        key = key_of(name)
        keys[key] += 1
        if caption:  # a.jpg and a.png are two pictures
            unique = key if keys[key] == 1 else key_of(f"{name}_{keys[key]} ")
            records.append(file_record(root, name, unique, caption))
    if not records:
        raise ValueError(
            f"{root} has no pictures with captions: put <name>.txt beside <name>.jpg, or a metadata.jsonl "
            "with file_name and caption into the folder"
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
                raise ValueError(f"{path}: a row has no file_name; it names the picture within the folder")
            yield row["file_name"], caption_in(row) or ""


def _json_lines(stream: Any, path: Path) -> Iterator[Any]:
    for number, line in enumerate(stream, 1):
        if line.strip():
            try:
                yield json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}: line {number} is no JSON ({error}); correct it") from error
