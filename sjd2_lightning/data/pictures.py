"""Pictures of any size and origin, brought to one size.

Source: ours.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageOps

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
        content: of a file in one of `FORMATS`.
        min_side: smaller pictures are refused.

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
