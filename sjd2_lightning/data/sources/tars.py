"""Pictures in tars, as img2dataset and WebDataset write them: k.jpg, k.txt, k.json."""

from __future__ import annotations

import bz2
import gzip
import lzma
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from sjd2_lightning.data.names import Part, captioned, check_text, files_below, sample_name, shown
from sjd2_lightning.data.sources.record import Record, checked_records, key_of

_PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst")
_MAGIC: dict[bytes, Callable[..., Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}
_TEXTS = ("txt", "json")


def tar_parts(path: Path, lost: list[tuple[int, str]], packed: bool = False) -> Iterator[Part]:
    """The files of a tar, in order.

    A damaged tar, or several written behind each other, is read on from the next header that is sound.

    Args:
        path: the tar.
        lost: gets the place of each stretch that cannot be read, and why.
        packed: whether a compressed tar is read too; pictures in one are no stretches of its file.

    Raises:
        ValueError: it is compressed, or nothing in it can be read.
    """
    try:
        with path.open("rb") as stream:
            start = stream.read(6)
        opener = next((opener for magic, opener in _MAGIC.items() if start.startswith(magic)), None)
        if opener and not packed:
            raise ValueError("cannot be read as a tar (it is compressed); give an uncompressed one")
        with opener(path, "rb") if opener else path.open("rb") as stream:
            yield from _members(stream, lost)
    except (OSError, EOFError, zlib.error, lzma.LZMAError, tarfile.TarError) as error:
        raise ValueError(f"cannot be read as a tar ({error})") from error


def _members(stream: BinaryIO, lost: list[tuple[int, str]]) -> Iterator[Part]:
    position: int | None = 0
    any_read = False
    while position is not None:
        stream.seek(position)
        tar, is_broken = None, False
        try:
            tar = tarfile.TarFile(fileobj=stream, mode="r")
            for member in tar:
                any_read = True
                if not member.isdir():
                    yield _part(stream, member)
        except tarfile.TarError:
            is_broken = True
        end = tar.offset if tar else position
        start = max(end, position + tarfile.BLOCKSIZE) if is_broken else end
        position, problem = _next_header(stream, start, is_broken)
        if problem:
            lost.append((end, problem))
        if not any_read and position is None and lost:
            raise tarfile.ReadError("an empty file" if not stream.seek(0, 2) else "no tar")


def _next_header(stream: BinaryIO, place: int, is_broken: bool) -> tuple[int | None, str]:
    """The next sound header from a place on, and what is wrong between."""
    size = stream.seek(0, 2)
    if place + tarfile.BLOCKSIZE > size:
        return None, "ends early; what followed is lost"
    damaged = "damaged; what lay here is lost"
    problem = damaged if is_broken else ""
    stream.seek(place)
    while len(block := stream.read(tarfile.BLOCKSIZE)) == tarfile.BLOCKSIZE:
        if block.strip(b"\0"):
            try:
                tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
                return place, problem
            except tarfile.HeaderError:
                problem = damaged
        place += tarfile.BLOCKSIZE
    return None, problem


def _part(stream: BinaryIO, member: tarfile.TarInfo) -> Part:
    start, size = member.offset_data, member.size
    if not member.isreg() or member.issparse():
        return Part(member.name, _refused("no regular file"), start, 0, "no regular file")
    named = sample_name(member.name)
    if named is None or named[1].lower().rpartition(".")[2] not in _TEXTS:
        return Part(member.name, _refused("no text"), start, size)
    try:
        check_text(size)
        stream.seek(start)
        content = stream.read(size)
    except ValueError as error:
        return Part(member.name, _refused(str(error)), start, size)
    if len(content) < size:
        return Part(member.name, _refused("ends early"), start, size)
    return Part(member.name, lambda: content, start, size)


def _refused(reason: str) -> Callable[[], bytes]:
    def read() -> bytes:
        raise ValueError(reason)

    return read


def tar_records(root: Path, but: Path | None = None) -> list[Record]:
    """Pictures in the tars of a folder, or in one, with their captions: the .txt, else the .json's `caption`.

    Args:
        root: the folder, its sub-folders included, or a tar.
        but: folder whose files are left out.

    Raises:
        ValueError: there are no tars, or none holds a picture with a caption.
    """
    names = list(files_below(root, but)) if root.is_dir() else [root.name] if root.is_file() else []
    tars = [name for name in names if name.lower().endswith((".tar", *_PACKED))]
    if not tars:
        endings = Counter("".join(Path(name).suffixes[-2:]) or Path(name).name for name in names)
        found = f"; there are {shown([f'{count} x {name}' for name, count in endings.most_common()])}"
        raise ValueError(
            f"{root} has no .tar files{found if names else ''}; give --input a folder of them, or one"
        )
    folder = root if root.is_dir() else root.parent
    records = [record for name in tars for record in _records_of(folder, name)]
    return checked_records(
        records, root, "a sample is <name>.jpg with <name>.txt, or with a `caption` in <name>.json"
    )


def _records_of(folder: Path, name: str) -> list[Record]:
    changed, lost, records = (folder / name).stat().st_mtime_ns, list[tuple[int, str]](), []
    try:
        for part, caption, problem in captioned(tar_parts(folder / name, lost), fields=True):
            sample, suffix = sample_name(part.name) or ("", "")
            middle = suffix.rpartition(".")[0]
            key = key_of(f"{name}/{sample}_{middle}" if middle else f"{name}/{sample}")
            where = (part.start, part.num_bytes, changed, part.name)
            records.append(Record(key, caption, name, *where, problem))
    except ValueError as error:
        return [Record(key_of(f"{name}/file "), "", name, 0, 0, changed, problem=str(error))]
    for place, problem in lost:
        member = f"byte {place}"
        records.append(Record(key_of(f"{name}/{member} "), "", name, place, 0, changed, member, problem))
    return records
