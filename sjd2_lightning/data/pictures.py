"""Pictures of any size and origin: read in one way, brought to one size, written without loss."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")  # nothing that runs a program (EPS) or holds a document
MAX_BYTES = 2**26  # of a picture's file
MAX_PIXELS = 10**8
# recorded in the index: what it says is what was done
CROPPED = (
    "turned as its EXIF says; transparency on white; RGB; the largest centred part of the target's shape, "
    "resized by Lanczos"
)


def on_white(picture: Image.Image) -> Image.Image:
    """The picture in RGB, with white where it is transparent."""
    if picture.mode not in ("RGBA", "LA", "PA") and "transparency" not in picture.info:
        return picture.convert("RGB")
    picture = picture.convert("RGBA")
    canvas = Image.new("RGBA", picture.size, "white")
    canvas.alpha_composite(picture)
    return canvas.convert("RGB")


def read_picture(content: bytes, min_side: int = 1) -> Image.Image:
    """A picture in RGB from the bytes of its file.

    Args:
        content: bytes of a file in one of `FORMATS`.
        min_side: least side in pixels; smaller pictures are refused.

    Raises:
        ValueError: the picture is too large, too small, damaged, or of another format.
    """
    if len(content) > MAX_BYTES:
        raise ValueError(f"a file of {len(content)} bytes, {MAX_BYTES} are the most")
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as picture:
            if picture.width * picture.height > MAX_PIXELS:  # before its pixels are unpacked
                raise ValueError(f"{picture.width}x{picture.height} pixels, {MAX_PIXELS} are the most")
            if min(picture.size) < min_side:
                raise ValueError(f"{picture.width}x{picture.height} pixels, a side has at least {min_side}")
            return on_white(ImageOps.exif_transpose(picture))
    except ValueError:
        raise
    except Exception as error:  # decoders raise all sorts of errors at damaged bytes
        raise ValueError(f"no picture in one of {', '.join(FORMATS)} ({error})") from error


def cropped(picture: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """The largest centred part of a target's shape, resized by Lanczos to (height, width, 3) uint8."""
    height, width = size
    scale = min(picture.width / width, picture.height / height)
    left, top = (picture.width - scale * width) / 2, (picture.height - scale * height) / 2
    box = (left, top, left + scale * width, top + scale * height)
    box = (*box[:2], min(box[2], picture.width), min(box[3], picture.height))
    return np.asarray(picture.resize((width, height), Image.Resampling.LANCZOS, box=box))


def png_bytes(pixels: Tensor | np.ndarray) -> bytes:
    """A uint8 image (h, w, 3) as PNG; lossless, so metrics of the file are metrics of the image."""
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(pixels)).save(buffer, "PNG")
    return buffer.getvalue()


def read_image(path: Path, remedy: str = "remove it and run again") -> Tensor:
    """A picture's file as uint8 (h, w, 3), at its own size.

    Args:
        path: the file.
        remedy: what a reader of the error should do.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        with Image.open(path) as image:
            return torch.from_numpy(np.array(image.convert("RGB")))
    except OSError as error:
        raise ValueError(f"image {path} cannot be read ({error}); {remedy}") from error


class LazyImages(Sequence[Tensor]):
    """Images, uint8 (h, w, 3) each, read when they are looked at: a set may be larger than the memory.

    Args:
        read: gives the image of an item.
        items: what the images are read from.
    """

    def __init__(self, read: Callable[[Any], Tensor], items: Sequence[Any]) -> None:
        self._read = read
        self._items = items

    def __len__(self) -> int:
        return len(self._items)

    @overload
    def __getitem__(self, place: int) -> Tensor: ...

    @overload
    def __getitem__(self, place: slice) -> list[Tensor]: ...

    def __getitem__(self, place: int | slice) -> Tensor | list[Tensor]:
        if isinstance(place, slice):
            return [self._read(item) for item in self._items[place]]
        return self._read(self._items[place])

    def select(self, places: Sequence[int]) -> LazyImages:
        """The images at some places, still unread."""
        return LazyImages(self._read, [self._items[place] for place in places])
