"""The ground of an image, continued from its rim, and the pieces that stand out from it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Floats = NDArray[np.float32]
Box = tuple[int, int, int, int]

_CORE = 36.0  # difference from the ground, of 255, that a piece must reach somewhere


def fitted_ground(image: NDArray[np.uint8]) -> tuple[Floats, float]:
    """The ground (h, w, 3) that continues an image's rim, a plane a channel, and how far the rim is off it.

    Rim pixels that are far off the plane, say of an object that touches the edge, are left out of the second
    and third fit.
    """
    height, width = image.shape[:2]
    rows, columns = np.mgrid[0:height, 0:width].astype(np.float32)
    plane = np.stack([np.ones_like(rows), rows / height, columns / width], -1)
    rim = np.ones((height, width), bool)
    rim[3:-3, 3:-3] = False
    inputs, colours = plane[rim], image[rim].astype(np.float32)
    kept = np.ones(len(inputs), bool)
    for _ in range(3):
        factors = np.linalg.lstsq(inputs[kept], colours[kept], rcond=None)[0]
        off = np.abs(colours - inputs @ factors).max(-1)
        kept = off <= max(8.0, 2.5 * float(np.median(off)))
    return (plane @ factors).astype(np.float32), float(np.median(off))


def distance(image: NDArray[np.uint8], ground: Floats) -> Floats:
    """How far each pixel (h, w) is from the ground, in the channel that differs most.

    The lesser of a pixel's own and of its neighbourhood's: specks of noise fade, edges stay where they are.
    """
    off = image.astype(np.float32) - ground
    around = ndimage.uniform_filter(off, (3, 3, 0))
    return np.minimum(np.abs(off).max(-1), np.abs(around).max(-1))


def pieces(away: Floats, level: float, reach: int) -> list[Floats]:
    """What stands out from the ground: for each piece its distances from the ground, 0 elsewhere.

    What is up to twice `reach` pixels apart counts as one: eyes of a face, rays of a sun. Specks of less than
    an eighth of the side, and what nowhere stands out clearly, are left out.

    Args:
        away: distance from the ground, (h, w).
        level: from which on a pixel belongs to a piece.
        reach: pixels by which parts grow before those that touch are joined.
    """
    side = max(away.shape)
    stands_out = away > level
    joined = ndimage.binary_dilation(stands_out, np.ones((2 * reach + 1, 2 * reach + 1), bool))
    labels, number = ndimage.label(joined, np.ones((3, 3), bool))
    found = []
    for label in range(1, number + 1):
        own = np.where(stands_out & (labels == label), away, np.float32(0))
        left, top, right, bottom = box_of(own)
        if max(right - left, bottom - top) >= side / 8 and (own > _CORE).sum() >= (side / 24) ** 2:
            found.append(own)
    return found


def box_of(away: Floats) -> Box:
    """The smallest box around what is not 0."""
    rows, columns = np.flatnonzero(away.any(1)), np.flatnonzero(away.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
