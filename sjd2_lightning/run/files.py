"""Files that are absent, old or whole, whenever a run is killed; their text, and hashes that name them."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TEMPORARY = ".writing"  # ends the names of files and folders that are not whole yet
_LEFTOVER = re.compile(r"\..+\.(png|jsonl?|md|html|csv|yaml)\.[a-z0-9_]{8}(\.writing)?")


def sha256_of_json(value: Any) -> str:
    """Hex sha256 of a JSON value, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def sha256_of_file(path: Path) -> str:
    """Hex sha256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def text_of(content: bytes) -> str:
    """The text of a file: strict UTF-8, without the byte-order mark that Windows puts in front.

    Raises:
        ValueError: it is in another encoding.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        found = f"byte 0x{content[error.start]:02x} at place {error.start}"
        raise ValueError(f"not UTF-8 ({found}); save it as UTF-8") from None
    # letters of UTF-16 without a mark are valid UTF-8 with control characters between them
    if 4 * sum(char < " " and not char.isspace() for char in text) > len(text):
        raise ValueError("not UTF-8 (every fourth character is a control character); save it as UTF-8")
    return text


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside `path`; what is written there takes its place at the end, in one step.

    An error, or the end of the process, leaves what stood at `path`. The content is on the disk before the
    name is, and the name before the function returns: a power cut leaves the old file or the new one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(TEMPORARY, f".{path.name}.", path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)  # mkstemp gives 0600, which a web server or a colleague cannot read
        fsync(temporary)
        temporary.replace(path)
        fsync(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file, whole or not at all, see `whole_file`."""
    with whole_file(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def fsync(path: Path) -> None:
    """Forces a file's content, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fsync_below(folder: Path) -> None:
    """Forces the files of a folder, and their names, to the disk."""
    for path in [*folder.rglob("*"), folder]:
        fsync(path)


def remove(path: Path) -> None:
    """Removes a file or a folder; it is no error if another did so before."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def remove_leftovers(folder: str | Path) -> None:
    """Removes the temporary files that a killed run left in its folder; no process may be writing there."""
    for place in (Path(folder), *Path(folder).glob("images/*"), Path(folder) / "figures"):
        for path in place.iterdir() if place.is_dir() else ():
            if _LEFTOVER.fullmatch(path.name):
                path.unlink()


def remove_unfinished(folder: Path, name: str = "") -> None:
    """Removes what a run that was killed while it wrote left below a folder: of one checkpoint, or all."""
    for leftover in folder.glob(f".{name}.*{TEMPORARY}") if name else folder.rglob(f".*{TEMPORARY}"):
        remove(leftover)
