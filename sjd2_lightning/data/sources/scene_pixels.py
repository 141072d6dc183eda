"""From the specification of a scene to its pixels: grounds, cut-out pictures, and the picture as a whole.

All arithmetic is on integers, but for Pillow's resampling, which is pinned by Pillow's version.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

from sjd2_lightning.data.sources.nouns import load_objects

UNITS = 128  # places and sizes in a scene are in 128ths of its side
SHADES = 8  # steps from the light to the dark shade of a colour
Colour = tuple[int, int, int]

# lightest and darkest shade; far enough apart that a name can be read back from the pixels
GROUND_COLOURS: dict[str, tuple[Colour, Colour]] = {
    "white": ((255, 255, 255), (238, 238, 238)),
    "grey": ((188, 188, 190), (138, 138, 140)),
    "black": ((52, 52, 54), (14, 14, 16)),
    "red": ((236, 92, 88), (188, 28, 34)),
    "orange": ((255, 178, 98), (238, 128, 28)),
    "yellow": ((255, 242, 142), (250, 216, 62)),
    "green": ((150, 216, 132), (58, 148, 70)),
    "blue": ((138, 192, 246), (44, 104, 200)),
    "purple": ((190, 150, 232), (114, 64, 170)),
    "pink": ((255, 206, 222), (244, 152, 188)),
    "brown": ((176, 126, 86), (114, 72, 42)),
}
# rows and columns in which the shade changes: plain, downwards, upwards, to the right, to the left, aslant
DIRECTIONS = ((0, 0), (1, 0), (-1, 0), (0, 1), (0, -1), (1, 1))

_TOO_CLOSE = 44  # difference of the nearest shade, in the channel that differs most
_MOST_HIDDEN = 0.14  # of a picture's pixels, or of its rim


@dataclass(frozen=True)
class Ground:
    """A plain or graded ground.

    Args:
        name: name of its colour.
        first: shade where it begins, 0 (light) to SHADES (dark).
        last: shade where it ends.
        direction: one of DIRECTIONS.
    """

    name: str
    first: int
    last: int
    direction: tuple[int, int]


@dataclass(frozen=True)
class Placed:
    """An object in its box, in 128ths of the scene's side."""

    noun: str
    left: int
    top: int
    width: int
    height: int

    @property
    def side(self) -> int:
        """Its longer side."""
        return max(self.width, self.height)

    @property
    def centre(self) -> tuple[int, int]:
        """Twice the centre: column and row."""
        return 2 * self.left + self.width, 2 * self.top + self.height


@lru_cache(maxsize=1)
def cut_outs() -> dict[str, Image.Image]:
    """RGBA pictures by noun, cut to what is opaque."""
    found = {}
    for item in load_objects():
        picture = Image.open(item.path).convert("RGBA")
        alpha = picture.getchannel("A").point(lambda value: 255 if value > 8 else 0)
        found[item.noun] = picture.crop(alpha.getbbox())
    return found


def shade(name: str, step: int) -> Colour:
    """A shade of a ground's colour, 0 (light) to SHADES (dark)."""
    light, dark = GROUND_COLOURS[name]
    red, green, blue = ((a * (SHADES - step) + b * step) // SHADES for a, b in zip(light, dark, strict=True))
    return red, green, blue


@lru_cache(maxsize=1)
def readable_grounds() -> dict[str, tuple[str, ...]]:
    """The colours on which an object stands out, by noun: few of its pixels, and little of its rim, hide."""
    shades = {name: np.array([shade(name, s) for s in range(SHADES + 1)]) for name in GROUND_COLOURS}
    found = {}
    for noun, picture in cut_outs().items():
        small = np.asarray(picture.resize((32, 32), Image.Resampling.BOX)).astype(np.int64)
        opaque = np.pad(small[..., 3] > 128, 1)
        inner = opaque[1:-1, 1:-1]
        for axis in (0, 1):
            for step in (-1, 1):
                inner = inner & np.roll(opaque, step, axis)[1:-1, 1:-1]
        rim = opaque[1:-1, 1:-1] & ~inner
        fits = []
        for name, colours in shades.items():
            gap = np.abs(small[:, :, None, :3] - colours).max(-1).min(-1)  # (32, 32)
            hidden = gap < _TOO_CLOSE
            if max(hidden[opaque[1:-1, 1:-1]].mean(), hidden[rim].mean()) <= _MOST_HIDDEN:
                fits.append(name)
        found[noun] = tuple(fits)
    return found


def ground_pixels(ground: Ground, size: int) -> np.ndarray:
    """The ground alone, (size, size, 3) uint8."""
    down, right = ground.direction
    steps = np.arange(size)
    ramp = np.zeros((size, size), np.int64)
    for weight, line in ((down, steps[:, None]), (right, steps[None, :])):
        ramp += {0: 0 * line, 1: line, -1: size - 1 - line}[weight]
    whole = max(1, (abs(down) + abs(right)) * (size - 1))
    first, last = (np.array(shade(ground.name, step), np.int64) for step in (ground.first, ground.last))
    return ((first * (whole - ramp[..., None]) + last * ramp[..., None]) // whole).astype(np.uint8)


def paint(objects: Sequence[Placed], ground: Ground, size: int) -> np.ndarray:
    """The scene, (size, size, 3) uint8."""
    canvas = Image.fromarray(ground_pixels(ground, size)).convert("RGBA")
    for item in objects:
        left, top, width, height = (
            (v * size + UNITS // 2) // UNITS for v in (item.left, item.top, item.width, item.height)
        )
        picture = cut_outs()[item.noun].resize((max(1, width), max(1, height)), Image.Resampling.LANCZOS)
        canvas.alpha_composite(picture, (left, top))
    return np.asarray(canvas.convert("RGB"))
