"""Whether an image shows what its prompt asks for: objects, their number, place and size, and the ground.

In the manner of GenEval (Ghosh et al. 2023), for scenes of known pictures on plain or graded grounds, where
no detector is needed: what stands out from the ground is cut out and compared with every known picture.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sjd2_lightning.metrics.bootstrap import MetricResult, mean_result, paired_difference
from sjd2_lightning.metrics.matching import SIDE, KnownPictures
from sjd2_lightning.metrics.segmentation import Box, Floats, box_of, distance, fitted_ground, pieces

Colour = tuple[int, int, int]

NAMES = "names"  # the category that the overall score leaves out
_LARGE, _SMALL = 0.46, 0.38  # share of the image's side from which on, and up to which, an object is so
# ever finer ways to cut out pieces: the difference from the ground, of 255, from which on pixels belong to a
# piece, and the share of the side by which its parts grow before they are joined
_CUTS = ((22.0, 1 / 32), (22.0, 1 / 64), (44.0, 1 / 64), (66.0, 1 / 64))
_SURE = 0.9  # score from which on nobody looks for parts


@dataclass(frozen=True)
class Asked:
    """What a prompt asks for.

    Args:
        category: what the prompt is about; results are reported by it.
        objects: how many of each name, and nothing else.
        relation: first name, "left of", "right of", "above" or "below", second name.
        sizes: "large" or "small" by name.
        ground: name of its colour.
    """

    category: str
    objects: Mapping[str, int]
    relation: tuple[str, str, str] | None = None
    sizes: Mapping[str, str] = field(default_factory=dict)
    ground: str | None = None

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Asked:
        """From plain values, as JSON holds them."""
        first_second = plain.get("relation")
        return cls(
            plain["category"],
            dict(plain["objects"]),
            tuple(first_second) if first_second else None,
            dict(plain.get("sizes") or {}),
            plain.get("ground"),
        )


@dataclass(frozen=True)
class Found:
    """One object in an image.

    Args:
        name: name of the known picture that fits best; None if none fits well.
        score: how well, 0 to 1.
        box: left, top, right, bottom in pixels.
    """

    name: str | None
    score: float
    box: Box

    @property
    def centre(self) -> tuple[float, float]:
        """Column and row."""
        left, top, right, bottom = self.box
        return (left + right) / 2, (top + bottom) / 2

    @property
    def side(self) -> int:
        """The longer side in pixels."""
        left, top, right, bottom = self.box
        return max(right - left, bottom - top)


@dataclass(frozen=True)
class Verdict:
    """What is right about one image.

    Args:
        asked: what was asked for.
        found: the objects, from left to right.
        ground: the name of the ground's colour.
        wrong: what is wrong, in words; empty if the image shows what was asked for.
    """

    asked: Asked
    found: tuple[Found, ...]
    ground: str
    wrong: tuple[str, ...]

    @property
    def right(self) -> bool:
        """Whether the image shows everything that was asked for, and no other object."""
        return not self.wrong

    @property
    def sentence(self) -> str:
        """What is wrong, or that nothing is."""
        return "; ".join(self.wrong) or "shows what was asked for"


class Judge:
    """Compares images with what was asked for.

    Args:
        pictures: RGBA pictures by name, (h, w, 4) uint8, cut to what is opaque.
        grounds: lightest and darkest shade of the grounds' colours by name.
        size: side of the images in pixels.

    Raises:
        ValueError: a picture is not of that form, or is one colour from edge to edge.
    """

    def __init__(
        self,
        pictures: Mapping[str, NDArray[np.uint8]],
        grounds: Mapping[str, tuple[Colour, Colour]],
        size: int = 128,
    ) -> None:
        self.known = KnownPictures(pictures)
        self.size = size
        self._grounds = dict(grounds)

    def __call__(self, images: Tensor | NDArray[np.uint8], asked: Sequence[Asked]) -> list[Verdict]:
        """Judge uint8 images (N, size, size, 3) by what was asked for, row by row.

        Raises:
            ValueError: there is no image, one has another size or type, the numbers differ, or a name or a
                colour is not known.
        """
        pixels = images.cpu().numpy() if isinstance(images, Tensor) else np.asarray(images)
        self._check(pixels, asked)
        return [self._verdict(image, wanted) for image, wanted in zip(pixels, asked, strict=True)]

    def _check(self, pixels: NDArray[Any], asked: Sequence[Asked]) -> None:
        if pixels.size == 0:
            raise ValueError("there is no image to judge: the batch or the image is empty")
        if pixels.dtype != np.uint8 or pixels.shape[1:] != (self.size, self.size, 3):
            raise ValueError(
                f"images have dtype {pixels.dtype} and shape {pixels.shape}; this judge needs uint8 "
                f"(N, {self.size}, {self.size}, 3)"
            )
        if len(pixels) != len(asked):
            raise ValueError(f"{len(pixels)} images against {len(asked)} prompts; pair them by key")
        known = set(self.known.names)
        for number, wanted in enumerate(asked):
            mentioned = {*wanted.objects, *wanted.sizes, *(wanted.relation or ())[::2]}
            if unknown := sorted(mentioned - known):
                raise ValueError(f"prompt {number} asks for {unknown[0]!r}, of which there is no picture")
            if wanted.ground is not None and wanted.ground not in self._grounds:
                raise ValueError(f"prompt {number} asks for a ground of unknown colour {wanted.ground!r}")

    def see(self, image: NDArray[np.uint8]) -> tuple[tuple[Found, ...], str]:
        """The objects in an image (size, size, 3), from left to right, and the colour of its ground."""
        # 1. the ground, from the rim
        ground, noise = fitted_ground(image)
        # 2. what stands out from it, as pieces
        # 3. which known picture each piece, or each part of it that stands out further, is
        away = distance(image, ground)
        cuts = [(max(level, 2.0 * noise), max(1, round(self.size * share))) for level, share in _CUTS]
        found = [
            item
            for piece in pieces(away, *cuts[0])
            for item in self._explained(image, ground, piece, cuts[1:])
        ]
        return tuple(sorted(found, key=lambda item: item.box)), self._ground_name(ground)

    def _explained(
        self, image: NDArray[np.uint8], ground: Floats, away: Floats, cuts: Sequence[tuple[float, int]]
    ) -> list[Found]:
        """The objects of a piece: itself, or its parts at the next cut if all of them fit better."""
        whole = self._trimmed(image, ground, self.match(image, ground, box_of(away)))
        if not cuts or whole.score > _SURE:
            return [whole]
        parts = [
            item
            for piece in pieces(away, *cuts[0])
            for item in self._explained(image, ground, piece, cuts[1:])
        ]
        return parts if parts and min(part.score for part in parts) > whole.score else [whole]

    def _trimmed(self, image: NDArray[np.uint8], ground: Floats, found: Found) -> Found:
        """The object without a fringe: sides of its box move inwards while the score rises, twice at most."""
        step = round(self.size / 32)
        for side, sign in ((0, 1), (1, 1), (2, -1), (3, -1)):
            for _ in range(2):
                box = [*found.box]
                box[side] += sign * step
                if found.score > _SURE or min(box[2] - box[0], box[3] - box[1]) < 2 * step:
                    break
                better = self.match(image, ground, (box[0], box[1], box[2], box[3]))
                if better.score <= found.score:
                    break
                found = better
        return found

    def match(self, image: NDArray[np.uint8], ground: Floats, box: Box) -> Found:
        """What is in a box of an image on a ground."""
        return Found(*self.known.match(image, ground, box), box)

    def _ground_name(self, ground: Floats) -> str:
        colour = ground.mean((0, 1))
        gaps = {name: _gap(colour, *map(np.array, ends)) for name, ends in self._grounds.items()}
        return min(gaps, key=lambda name: gaps[name])

    def _verdict(self, image: NDArray[np.uint8], asked: Asked) -> Verdict:
        found, ground = self.see(image)
        wrong = [*_wrong_objects(found, asked), *_wrong_sizes(found, asked, self.size)]
        wrong += _wrong_relation(found, asked)
        if asked.ground not in (None, ground):
            wrong.append(f"the ground is {ground}, not {asked.ground}")
        return Verdict(asked, found, ground, tuple(wrong))


def summary(verdicts: Sequence[Verdict], num_resamples: int = 2000, seed: int = 0) -> dict[str, MetricResult]:
    """Share of right images by category, and overall over all categories but names, with intervals.

    Raises:
        ValueError: there is no verdict.
    """
    if not verdicts:
        raise ValueError("there is no verdict to sum up")
    return {
        name: mean_result(f"judge_{name}", rights, _PROTOCOL, num_resamples, seed)
        for name, rights in _by_category(verdicts).items()
    }


def difference(
    first: Sequence[Verdict], second: Sequence[Verdict], num_resamples: int = 2000, seed: int = 0
) -> dict[str, MetricResult]:
    """Summary of first less that of second over the same prompts, with paired intervals.

    Raises:
        ValueError: the verdicts are not of the same prompts.
    """
    if [verdict.asked for verdict in first] != [verdict.asked for verdict in second]:
        raise ValueError("verdicts are not of the same prompts in the same order; pair them by key")
    others = _by_category(second)
    return {
        name: paired_difference(f"judge_{name}", rights, others[name], _PROTOCOL, num_resamples, seed)
        for name, rights in _by_category(first).items()
    }


_PROTOCOL = f"pieces that stand out from the ground, matched with known pictures at {SIDE} px"


def _by_category(verdicts: Sequence[Verdict]) -> dict[str, list[float]]:
    groups: dict[str, list[float]] = {}
    for verdict in verdicts:
        groups.setdefault(verdict.asked.category, []).append(float(verdict.right))
    overall = [float(verdict.right) for verdict in verdicts if verdict.asked.category != NAMES]
    return {**groups, "overall": overall} if overall else groups


def _wrong_objects(found: Sequence[Found], asked: Asked) -> list[str]:
    seen = Counter(item.name for item in found)
    wrong = [
        f"{seen[name]} of {name!r}, not {count}"
        for name, count in asked.objects.items()
        if seen[name] != count
    ]
    others = sorted(str(name or "something unknown") for name in seen if name not in asked.objects)
    return wrong + ([f"shows also {', '.join(others)}"] if others else [])


def _wrong_sizes(found: Sequence[Found], asked: Asked, side: int) -> list[str]:
    wrong = []
    for name, size in asked.sizes.items():
        shares = [item.side / side for item in found if item.name == name]
        if not all(share >= _LARGE if size == "large" else share <= _SMALL for share in shares):
            wrong.append(f"{name!r} is not {size}: {max(shares):.2f} of the image")
    return wrong


def _wrong_relation(found: Sequence[Found], asked: Asked) -> list[str]:
    if asked.relation is None:
        return []
    first, relation, second = asked.relation
    ones, others = ([item for item in found if item.name == name] for name in (first, second))
    if len(ones) != 1 or len(others) != 1:
        return [f"cannot tell whether {first!r} is {relation} {second!r}"]
    across, down = (a - b for a, b in zip(ones[0].centre, others[0].centre, strict=True))
    holds = {
        "left of": -across >= abs(down),
        "right of": across >= abs(down),
        "above": -down >= abs(across),
        "below": down >= abs(across),
    }
    return [] if holds[relation] else [f"{first!r} is not {relation} {second!r}"]


def _gap(colour: Floats, light: NDArray[Any], dark: NDArray[Any]) -> float:
    """Distance of a colour from the line between two shades."""
    line = (dark - light).astype(np.float64)
    along = float(np.clip((colour - light) @ line / (line @ line), 0, 1))
    return float(np.linalg.norm(colour - light - along * line))
