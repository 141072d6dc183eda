"""run.files."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

TEMPORARY = ".writing"  # ends the names of files that are not whole yet
# What `write_atomic` leaves when the process is killed before it replaces the file.
_LEFTOVER = re.compile(r"\..+\.(png|jsonl?|md|html|csv|yaml)\.[a-z0-9_]{8}(\.writing)?")


def fingerprint(value: Any) -> str:
    """sha256 of a JSON value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write_atomic(path: Path, content: str | bytes) -> None:
    """Writes a file that is either absent, old or whole: temporary in the same folder, fsync, replace."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode() if isinstance(content, str) else content
    handle, name = tempfile.mkstemp(TEMPORARY, f".{path.name}.", path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)  # mkstemp gives 0600, which a web server or a colleague cannot read
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def remove_leftovers(folder: str | Path) -> None:
    """Removes the temporary files that a killed run left in its folder; no process may be writing there."""
    for place in (Path(folder), *Path(folder).glob("images/*"), Path(folder) / "figures"):
        for path in place.iterdir() if place.is_dir() else ():
            if _LEFTOVER.fullmatch(path.name):
                path.unlink()


def remove_unfinished(folder: Path, name: str = "") -> None:
    """Removes what a run that was killed while it wrote left below a folder: of one checkpoint, or all."""
    for leftover in folder.glob(f".{name}.*{TEMPORARY}") if name else folder.rglob(f".*{TEMPORARY}"):
        remove_checkpoint(leftover)


def remove_checkpoint(path: Path) -> None:
    """Removes a file, or the folder of a sharded checkpoint; it is no error if another did so before."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def fsync_below(folder: Path) -> None:
    """Forces the files of a folder, and their names, to the disk."""
    for path in [*folder.rglob("*"), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def sync_folder(folder: Path) -> None:
    """Makes the new name itself survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
