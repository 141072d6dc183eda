"""Pictures of any size and origin: read in one way, brought to one size, written without loss."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError
from torch import Tensor

# What is read, with the suffixes it goes by: nothing that runs a program (EPS) or holds a document.
_READ = {
    "PNG": (".png", ".apng"),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".pjpeg", ".pjp"),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "GIF": (".gif",),
}
FORMATS = tuple(_READ)
SUFFIXES = tuple(suffix for suffixes in _READ.values() for suffix in suffixes)
# Suffixes of pictures that are not read: such a file is a lost sample, other files are none.
UNREAD: tuple[str, ...] = (".avif", ".heic", ".heif", ".jxl", ".jp2", ".j2k", ".tif", ".tiff", ".svg", ".eps")
UNREAD += (".ico", ".icns", ".psd", ".tga", ".ppm", ".pgm", ".pbm", ".pnm", ".pcx", ".exr", ".hdr", ".dds")
UNREAD += (".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf", ".raw", ".qoi", ".dib")
MAX_BYTES = 2**26  # of a picture's file
MAX_PIXELS = 10**8
# How every picture is read; named by the protocols of metrics and recorded in the index of shards.
READING = "turned as its EXIF says; transparency on white; 16-bit grey by 1/257; first frame; RGB"
CROPPED = f"{READING}; the largest centred part of the target's shape, resized by Lanczos"


def read_picture(
    content: bytes, min_side: int = 1, formats: tuple[str, ...] = FORMATS, max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """A picture in RGB from the bytes of its file: the one reading of pictures, see `READING`.

    Args:
        content: bytes of a file in one of the formats.
        min_side: least side in pixels; smaller pictures are refused.
        formats: names of the formats that are read.
        max_pixels: most pixels; larger pictures are refused before they are unpacked.

    Raises:
        ValueError: the picture is too large, too small, damaged, or of another format.
    """
    if not content:
        raise ValueError("an empty file, no picture")
    if len(content) > MAX_BYTES:
        raise ValueError(f"a file of {len(content)} bytes, {MAX_BYTES} are the most")
    named = f"no picture in one of {', '.join(formats)}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the bound below is ours
            with Image.open(io.BytesIO(content), formats=formats) as picture:
                size = picture.size
                if size[0] * size[1] <= max_pixels and min(size) >= min_side:
                    _scale_key(picture)
                    return _on_white(ImageOps.exif_transpose(picture))
    except UnidentifiedImageError:
        raise ValueError(f"format not read: {named}") from None
    except Image.DecompressionBombError:
        raise ValueError(f"too many pixels, {max_pixels} are the most") from None
    except Exception as error:  # decoders raise all sorts of errors at damaged bytes
        raise ValueError(f"{named} ({error})") from None
    if min(size) < min_side:
        raise ValueError(f"{size[0]}x{size[1]} pixels, a side has at least {min_side}")
    raise ValueError(f"{size[0]}x{size[1]} pixels, {max_pixels} are the most")


def _scale_key(picture: ImageFile.ImageFile) -> None:
    """The one transparent colour of a PNG, brought to the 8 bits that its pixels are unpacked to."""
    key, depth = picture.info.get("transparency"), picture.tile[0][3] if picture.tile else ""
    if isinstance(key, int) and depth in ("L;2", "L;4"):
        picture.info["transparency"] = key * (85 if depth == "L;2" else 17)
    elif isinstance(key, tuple) and depth == "RGB;16B":
        picture.info["transparency"] = tuple(value >> 8 for value in key)


def _on_white(picture: Image.Image) -> Image.Image:
    """The picture in RGB, with white where it is transparent."""
    if picture.mode.startswith("I"):
        values = np.asarray(picture).astype(np.int64)
        grey = np.rint(values / 257)
        grey[values == picture.info.get("transparency", -1)] = 255
        return Image.fromarray(grey.clip(0, 255).astype(np.uint8)).convert("RGB")
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    picture = picture.convert("RGBA")
    canvas = Image.new("RGBA", picture.size, "white")
    canvas.alpha_composite(picture)
    return canvas.convert("RGB")


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
        return torch.from_numpy(np.array(read_picture(path.read_bytes())))
    except (OSError, ValueError) as error:
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
