"""The rule by which pictures are brought to size."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from sjd2_lightning.data.pictures import MAX_BYTES, cropped, read_picture


def encoded(picture: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def thirds(width: int, height: int) -> Image.Image:
    """Red, green, blue from left to right."""
    pixels = np.zeros((height, width, 3), np.uint8)
    for place in range(3):
        pixels[:, place * width // 3 : (place + 1) * width // 3, place] = 255
    return Image.fromarray(pixels)


def test_a_wide_picture_loses_its_sides() -> None:
    square = cropped(thirds(90, 30), (16, 16))
    assert square.shape == (16, 16, 3)
    assert (square[:, 4:-4] == (0, 255, 0)).all()
    assert (square[..., 1] > square[..., 0]).all(), "the sides bleed in by a filter's width alone"


def test_a_picture_of_the_right_shape_is_only_resized() -> None:
    picture = thirds(96, 64)
    wanted = np.asarray(picture.resize((24, 16), Image.Resampling.LANCZOS))
    np.testing.assert_array_equal(cropped(picture, (16, 24)), wanted)
    same = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    np.testing.assert_array_equal(cropped(Image.fromarray(same), (16, 24)), same)


def test_small_pictures_grow() -> None:
    assert cropped(Image.new("RGB", (1, 3), "red"), (16, 16)).tolist() == [[[255, 0, 0]] * 16] * 16


def test_exif_turns_and_transparency_is_white() -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    picture = read_picture(encoded(Image.new("RGB", (4, 2)), "JPEG", exif=turned))
    assert (picture.size, picture.mode) == ((2, 4), "RGB")
    for mode, color in (("RGBA", (0, 0, 0, 0)), ("LA", (0, 0))):
        clear = read_picture(encoded(Image.new(mode, (2, 2), color)))
        assert np.asarray(clear).min() == 255
    palette = Image.new("P", (2, 2), 0)
    assert np.asarray(read_picture(encoded(palette, transparency=0))).min() == 255


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "I;16", "F"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    kind = {"CMYK": "JPEG", "F": "TIFF"}.get(mode, "PNG")
    content = encoded(Image.new(mode, (3, 2)), kind)
    if kind == "TIFF":
        with pytest.raises(ValueError, match="no picture in one of"):
            read_picture(content)
    else:
        assert read_picture(content).mode == "RGB"


def bomb() -> bytes:
    """A PNG of some hundred bytes that claims to be 100000 pixels wide and high."""
    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    chunks = b""
    for name, data in ((b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 1000)), (b"IEND", b"")):
        chunks += struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    return b"\x89PNG\r\n\x1a\n" + chunks


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "no picture"),
        (b"GIF89a", "no picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no picture in one of PNG, JPEG"),
        (encoded(thirds(30, 30))[:60], "no picture|truncated"),
        (encoded(thirds(90, 90), "JPEG")[:300], "no picture|truncated"),
        (bomb(), "pixels, 100000000 are the most|decompression bomb"),
        (bytes(MAX_BYTES + 1), "a file of"),
        (encoded(thirds(30, 7)), "30x7 pixels, a side has at least 8"),
    ],
)
def test_what_cannot_be_used_is_named(content: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        read_picture(content, min_side=8)
