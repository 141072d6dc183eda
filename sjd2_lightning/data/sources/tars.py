"""Pictures in tars, as img2dataset and WebDataset write them: k.jpg, k.txt, k.json."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sjd2_lightning.data.sources.record import SUFFIXES, Record, caption_in, key_of

_MAX_TEXT = 2**20  # bytes of a caption's file


def tar_samples(path: Path, mode: str = "r:") -> dict[str, dict[str, Any]]:
    """The samples of a tar by name: what comes before the first dot of a file's name, its folder in front.

    Args:
        path: the tar.
        mode: mode of `tarfile.open`; "r:" takes uncompressed ones, whose pictures are stretches of the file.

    Returns:
        By sample: `txt` and `json` as bytes, `picture` as (start, number of bytes) in the file.

    Raises:
        ValueError: it cannot be read.
    """
    found: dict[str, dict[str, Any]] = {}
    try:
        with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
            for member in tar:
                folder, _, name = member.name.rpartition("/")
                stem, _, suffix = name.partition(".")
                fields = found.setdefault(f"{folder}/{stem}" if folder else stem, {})
                if f".{suffix.lower()}" in SUFFIXES and member.isreg():
                    fields["picture"] = (member.offset_data, member.size)
                elif suffix in ("txt", "json") and member.isreg() and member.size <= _MAX_TEXT:
                    fields[suffix] = tar.extractfile(member).read()
    except (OSError, tarfile.TarError) as error:
        raise ValueError(f"{path} cannot be read as a tar ({error}); give an uncompressed one") from error
    return found


def tar_records(root: Path) -> list[Record]:
    """Pictures in the tars of a folder with their captions: the .txt, else the `caption` of the .json.

    Raises:
        ValueError: there are no tars, one cannot be read, or none holds a picture with a caption.
    """
    paths = sorted(root.glob("*.tar")) if root.is_dir() else [root]
    if not paths or not paths[0].is_file():
        raise ValueError(f"{root} has no .tar files; give --input a folder of them, or one")
    folder = root if root.is_dir() else root.parent
    records = []
    for path in paths:
        name, changed = path.relative_to(folder).as_posix(), path.stat().st_mtime_ns
        for stem, fields in tar_samples(path).items():
            caption = _caption(fields)
            if "picture" in fields and caption:
                start, num_bytes = fields["picture"]
                records.append(Record(key_of(f"{name}/{stem}"), caption, name, start, num_bytes, changed))
    if not records:
        raise ValueError(f"{root}: no tar holds a picture with a caption (.jpg with .txt or .json)")
    return records


def _caption(fields: Mapping[str, Any]) -> str | None:
    caption = " ".join(fields.get("txt", b"").decode(errors="replace").split())
    if caption or "json" not in fields:
        return caption or None
    try:
        facts = json.loads(fields["json"])
    except (ValueError, RecursionError):
        return None
    return caption_in(facts) if isinstance(facts, dict) else None
