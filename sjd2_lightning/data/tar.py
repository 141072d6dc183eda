"""Members of a tar file that may be damaged or hostile.

`tarfile` stops at the first damaged header, follows extension headers and reads a member of any size. Here a
damaged header costs its own member, nothing but regular files of a bounded size is read, and no extension is
followed. Source: ours; headers are parsed by `tarfile`.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

BLOCK = tarfile.BLOCKSIZE


class Member(NamedTuple):
    """A file of a tar: its content, or what is wrong with it."""

    name: str
    data: bytes
    problem: str | None = None


def read_members(stream: BinaryIO, max_bytes: int) -> Iterator[Member]:
    """The members of an uncompressed tar, in order.

    Args:
        stream: at the first header.
        max_bytes: larger members are not read.
    """
    while block := stream.read(BLOCK):
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
        except (tarfile.HeaderError, ValueError):
            continue  # the end mark, or damage: the next header is looked for block by block
        if not info.isreg():
            yield Member(info.name, b"", "is no regular file")
        elif not 0 <= info.size <= max_bytes:
            yield Member(info.name, b"", f"claims {info.size} bytes, {max_bytes} are the most")
        else:
            data = stream.read(info.size + -info.size % BLOCK)
            short = len(data) < info.size
            yield Member(info.name, b"" if short else data[: info.size], "ends early" if short else None)
