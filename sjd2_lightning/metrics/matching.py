"""Which of many known pictures a cut-out shows.

Normalised correlation on a coarse grid, the mean of two: of the whole less its mean colour, and of the
detail, each cell less its surroundings. The first alone would take a blob of the right colour for a picture.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from sjd2_lightning.metrics.segmentation import Box, Floats

SIDE = 16  # cells of the grid along each side
_AROUND = 5  # cells whose mean counts as the surroundings of one
_LEAST_SCORE = 0.55  # below it, a cut-out shows no known picture
_ASPECT = 0.3  # deviation of the logarithm of height / width that lowers a score to 0.6 of itself


class KnownPictures:
    """Named pictures, ready to be compared with cut-outs.

    Args:
        pictures: RGBA pictures by name, (h, w, 4) uint8, cut to what is opaque.

    Raises:
        ValueError: a picture is not of that form, or is one colour from edge to edge.
    """

    def __init__(self, pictures: Mapping[str, NDArray[np.uint8]]) -> None:
        for name, picture in pictures.items():
            if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[-1] != 4 or not picture.size:
                raise ValueError(f"picture {name!r} has shape {picture.shape}, it must be uint8 (h, w, 4)")
        self.names = tuple(pictures)
        self._aspects = np.array([np.log(p.shape[0] / p.shape[1]) for p in pictures.values()])
        grids = np.stack([_on_grid(picture) for picture in pictures.values()])
        self._looks = [_Look(look) for look in _looks(grids)]
        for name, plain in zip(self.names, self._looks[1].plain, strict=True):
            if plain:
                raise ValueError(
                    f"picture {name!r} is one colour from edge to edge: nothing tells it from others"
                )

    def match(self, image: NDArray[np.uint8], ground: Floats, box: Box) -> tuple[str | None, float]:
        """The picture that fits best into a box of an image, None if none fits well, and its score."""
        left, top, right, bottom = box
        behind = ground[top:bottom, left:right].mean((0, 1))
        cells = Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BOX, box)
        seen = _looks((np.asarray(cells, np.float32) - behind)[None])
        alike = (
            sum(known.correlation(look[0], behind) for known, look in zip(self._looks, seen, strict=True)) / 2
        )
        stretch = (np.log((bottom - top) / (right - left)) - self._aspects) / _ASPECT
        scores = alike * np.exp(-(stretch**2) / 2)
        best = int(scores.argmax())
        score = float(scores[best])
        return (self.names[best] if score >= _LEAST_SCORE else None), score


class _Look:
    """One way to look at known pictures: as a whole, or at their detail.

    A picture on a ground of colour g, less the ground, is colours - opacity * g, and both ways to look are
    linear. So the sums that a correlation needs are taken once, and each ground costs a product of matrices.

    Args:
        grids: colours times opacity, and opacity, (N, cells, 4).
    """

    def __init__(self, grids: Floats) -> None:
        colours, opacity = grids[..., :3], grids[..., 3]
        self._colours = np.ascontiguousarray(colours.reshape(len(grids), -1))
        self._opacity = np.ascontiguousarray(opacity)
        self._squares = (colours**2).sum((1, 2))
        self._mixed = np.einsum("nij,ni->nj", colours, opacity)
        self._opaque = (opacity**2).sum(1)
        self.plain = np.abs(grids).max((1, 2)) < 1e-3

    def correlation(self, seen: Floats, behind: Floats) -> Floats:
        """Of each picture on a ground of one colour with what is seen, (cells, 3): (N,)."""
        same = self._colours @ seen.reshape(-1) - self._opacity @ (seen @ behind)
        squares = self._squares - 2 * self._mixed @ behind + self._opaque * (behind @ behind)
        return same / np.sqrt(np.maximum(squares * (seen**2).sum(), 1e-6))


def _looks(grids: Floats) -> tuple[Floats, Floats]:
    """Whole and detail, (N, cells, channels) each, of grids (N, side, side, channels)."""
    detail = grids - ndimage.uniform_filter(grids, (0, _AROUND, _AROUND, 0), mode="nearest")
    whole = grids - grids.mean((1, 2), keepdims=True)
    return whole.reshape(len(grids), -1, grids.shape[-1]), detail.reshape(len(grids), -1, grids.shape[-1])


def _on_grid(picture: NDArray[np.uint8]) -> Floats:
    """Colours times opacity, and opacity 0 to 1, (SIDE, SIDE, 4)."""
    opacity = picture[..., 3:].astype(np.float32) / 255
    planes = np.concatenate([picture[..., :3] * opacity, opacity], -1)
    shrunk = [Image.fromarray(planes[..., i]).resize((SIDE, SIDE), Image.Resampling.BOX) for i in range(4)]
    return np.stack([np.asarray(plane) for plane in shrunk], -1)
