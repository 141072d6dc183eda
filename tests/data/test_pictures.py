"""The rule by which pictures are brought to size."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from sjd2_lightning.data.pictures import FORMATS, MAX_BYTES, SUFFIXES, UNREAD, cropped, read_picture


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


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(depth: int, colour: int, row: bytes, width: int, key: bytes = b"", palette: bytes = b"") -> bytes:
    """A PNG of one row, as the format's text describes it: Pillow writes few of the kinds that it reads."""
    header = struct.pack(">IIBBBBB", width, 1, depth, colour, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"PLTE", palette), (b"tRNS", key), (b"IDAT", zlib.compress(b"\0" + row))]
    filled = [chunk(name, data) for name, data in chunks if data]
    return b"\x89PNG\r\n\x1a\n" + b"".join(filled) + chunk(b"IEND", b"")


W, B = [255] * 3, [0] * 3
# name: picture, and its pixels in RGB on white
KINDS = {
    "1 bit": (png(1, 0, b"\x80", 2), [W, B]),
    "1 bit, black is clear": (png(1, 0, b"\x80", 2, b"\0\0"), [W, W]),
    "2 bits": (png(2, 0, b"\x1b", 4), [B, [85] * 3, [170] * 3, W]),
    "2 bits, one is clear": (png(2, 0, b"\x1b", 4, b"\0\1"), [B, W, [170] * 3, W]),
    "4 bits, one is clear": (png(4, 0, b"\x35", 2, b"\0\3"), [W, [85] * 3]),
    "8 bits, one is clear": (png(8, 0, b"\x03\x05", 2, b"\0\3"), [W, [5] * 3]),
    "16 bits": (png(16, 0, struct.pack(">5H", 0, 128, 257, 32768, 65535), 5), [B, B, [1] * 3, [128] * 3, W]),
    "16 bits, one is clear": (
        png(16, 0, struct.pack(">2H", 1000, 1001), 2, struct.pack(">H", 1000)),
        [W, [4] * 3],
    ),
    "grey with alpha": (png(8, 4, bytes([10, 0, 10, 255, 100, 51]), 3), [W, [10] * 3, [224] * 3]),
    "16 bits with alpha": (png(16, 4, struct.pack(">4H", 2570, 0, 2570, 65535), 2), [W, [10] * 3]),
    "colours, one is clear": (
        png(8, 2, bytes([1, 2, 3, 4, 5, 6]), 2, struct.pack(">3H", 1, 2, 3)),
        [W, [4, 5, 6]],
    ),
    "16-bit colours": (
        png(16, 2, struct.pack(">6H", 65535, 0, 0, 0, 0, 25700), 2),
        [[255, 0, 0], [0, 0, 100]],
    ),
    "16-bit colours, one is clear": (
        png(16, 2, struct.pack(">6H", 25700, 0, 0, 65535, 0, 0), 2, struct.pack(">3H", 25700, 0, 0)),
        [W, [255, 0, 0]],
    ),
    "palette, half clear": (
        png(2, 3, b"\x18", 3, b"\x00\x33", bytes([1, 2, 3, 100, 100, 100, 7, 8, 9])),
        [W, [224] * 3, [7, 8, 9]],
    ),
    "colours with alpha": (png(8, 6, bytes([9, 9, 9, 0, 9, 9, 9, 255]), 2), [W, [9] * 3]),
}


@pytest.mark.parametrize("name", KINDS)
def test_kinds_of_png(name: str, recwarn: pytest.WarningsRecorder) -> None:
    content, pixels = KINDS[name]
    picture = read_picture(content)
    assert np.asarray(picture).tolist() == [pixels]
    assert not recwarn.list


@pytest.mark.parametrize("name", ["16 bits, one is clear", "2 bits, one is clear", "palette, half clear"])
def test_exif_turns_every_kind(name: str) -> None:
    content, pixels = KINDS[name]
    turned = Image.Exif()
    turned[0x0112] = 3  # by half a turn
    exif = chunk(b"eXIf", turned.tobytes().removeprefix(b"Exif\0\0"))
    place = content.index(b"IDAT") - 4
    picture = read_picture(content[:place] + exif + content[place:])
    assert np.asarray(picture).tolist() == [pixels[::-1]]


def test_a_16_bit_ramp_keeps_its_greys() -> None:
    ramp = np.tile(np.linspace(0, 65535, 256).round().astype(np.uint16), (2, 1))
    assert np.asarray(read_picture(encoded(Image.fromarray(ramp))))[0, :, 0].tolist() == list(range(256))


def test_other_formats_keep_their_colours() -> None:
    red = Image.new("RGB", (16, 16), (200, 30, 40))
    for kind, options in (("JPEG", {}), ("WEBP", {"lossless": True}), ("BMP", {}), ("GIF", {})):
        assert np.abs(np.asarray(read_picture(encoded(red, kind, **options))) - (200.0, 30, 40)).max() <= 2, (
            kind
        )
    cmyk = np.asarray(read_picture(encoded(red.convert("CMYK"), "JPEG")))
    assert np.abs(cmyk - (200.0, 30, 40)).max() <= 4
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "lime")]
    for kind in ("GIF", "WEBP", "PNG"):
        moving = read_picture(encoded(frames[0], kind, save_all=True, append_images=frames[1:]))
        assert np.asarray(moving)[0, 0].tolist() == pytest.approx([255, 0, 0], abs=2), kind


def test_suffixes_are_those_of_the_formats() -> None:
    known = Image.registered_extensions()
    assert {suffix for suffix, kind in known.items() if kind in FORMATS} <= set(SUFFIXES)
    assert {known[suffix] for suffix in SUFFIXES if suffix in known} == set(FORMATS)
    assert not set(SUFFIXES) & set(UNREAD)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "I;16", "F"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    kind = {"CMYK": "JPEG", "F": "TIFF"}.get(mode, "PNG")
    content = encoded(Image.new(mode, (3, 2)), kind)
    if kind == "TIFF":
        with pytest.raises(ValueError, match="no picture in one of"):
            read_picture(content)
    else:
        assert read_picture(content).mode == "RGB"


def bomb(height: int = 100_000) -> bytes:
    """A PNG of some hundred bytes that claims to be 100000 pixels wide."""
    header = struct.pack(">IIBBBBB", 100_000, height, 8, 2, 0, 0, 0)
    rows = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + rows


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "no picture"),
        (b"GIF89a", "no picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no picture in one of PNG, JPEG"),
        (encoded(thirds(30, 30))[:60], "no picture|truncated"),
        (encoded(thirds(90, 90), "JPEG")[:300], "no picture|truncated"),
        (bomb(), "too many pixels, 100000000 are the most"),
        (bomb(1001), "100000x1001 pixels, 100000000 are the most"),
        (b"<!DOCTYPE html><p>403 Forbidden", "format not read: no picture in one of PNG"),
        (bytes(MAX_BYTES + 1), "a file of"),
        (encoded(thirds(30, 7)), "30x7 pixels, a side has at least 8"),
    ],
)
def test_what_cannot_be_used_is_named(content: bytes, reason: str, recwarn: pytest.WarningsRecorder) -> None:
    with pytest.raises(ValueError, match=reason) as refused:
        read_picture(content, min_side=8)
    assert "object at 0x" not in str(refused.value)
    assert not recwarn.list
