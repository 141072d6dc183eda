"""data.sources.tars."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sjd2_lightning.data.sources.record import SUFFIXES, Record, caption_in, key_of


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
