"""Odd inputs of `sjd2 prepare`, and what it makes of each.

A case writes a source of ten samples unless it says otherwise; pictures are of own colours, 6 x 4 pixels.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from PIL import Image

NUM = 10
APPLE = b"\0\5\x16\7" + b"\0" * 120  # what macOS keeps beside a file
CAPTIONS = tuple(f"square {number}" for number in range(NUM))
NINE = CAPTIONS[1:]


class Case(NamedTuple):
    """An odd source.

    Args:
        write: writes it into a folder.
        kept: captions of the samples that are kept, sorted.
        lost: beginning of each reason in skipped.jsonl, and how often it stands there.
        code: exit code.
        message: part of what a refused command says.
    """

    write: Callable[[Path], object]
    kept: tuple[str, ...] = CAPTIONS
    lost: dict[str, int] = {}  # noqa: RUF012
    code: int = 0
    message: str = ""


def refused(write: Callable[[Path], object], message: str, reason: str = "", count: int = NUM) -> Case:
    """A case of which nothing is kept."""
    return Case(write, (), {reason: count} if reason else {}, 1, message)


def picture(number: int = 0, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4), (20 * number % 256, 90, 160)).save(buffer, kind)
    return buffer.getvalue()
