"""Images inside a page: data URIs of bounded size.

Source: ours.
"""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from PIL import Image

from sjd2_lightning.records import ImageRecord, png_bytes
from sjd2_lightning.report.figures import settled_map

LOSSLESS_PX, MAX_PX = (
    256,
    512,
)  # up to the first side a page holds the file as it is, else WebP up to the second
_QUALITY = 88


def data_uri(data: bytes, kind: str = "png") -> str:
    """Bytes of an image as an address that needs no network."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def embedded_image(path: Path) -> str:
    """A PNG as data URI: small ones unchanged, large ones as WebP of at most 512 pixels a side."""
    with Image.open(path) as image:
        if max(image.size) <= LOSSLESS_PX:
            return data_uri(path.read_bytes())
        small = image.convert("RGB")
    small.thumbnail((MAX_PX, MAX_PX))
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=_QUALITY)
    return data_uri(buffer.getvalue(), "webp")


def heat_map_png(record: ImageRecord) -> bytes:
    """The map of passes of one image, one pixel a code: dark ones were committed first, bright ones last."""
    passes = settled_map(record)
    colours = colormaps["viridis"](passes / max(record.nfe - 1, 1))[..., :3]
    return png_bytes((colours * 255).round().astype(np.uint8))
