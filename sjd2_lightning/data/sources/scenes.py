"""Scenes of one to four Twemoji pictures: composition, and the split that holds out combinations.

A training scene is a function of (seed, index) alone, a held-out one of (category, seed, index). Training
shows every object, but never a held-out combination, whether the caption speaks of it or not: two objects in
one scene, a number of one object, an object on a ground, two objects in a relation, a large or small object
(of aligned sizes see `_counted`).
A held-out scene has the combination that its category is about held out; "single" and "names" have none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from typing import Any

import numpy as np

from sjd2_lightning.data.sources.draws import Draws, hashed
from sjd2_lightning.data.sources.nouns import EVERYDAY, load_objects
from sjd2_lightning.data.sources.scene_captions import SIZES, Asked, caption
from sjd2_lightning.data.sources.scene_pixels import (
    DIRECTIONS,
    GROUND_COLOURS,
    SHADES,
    UNITS,
    Ground,
    Placed,
    cut_outs,
    paint,
    readable_grounds,
)

# how often training shows a category, in percent
CATEGORY_SHARES = {
    "single": 20,
    "two": 16,
    "three": 8,
    "counting": 18,
    "position": 18,
    "ground": 12,
    "size": 8,
}
PROMPT_CATEGORIES = ("single", "two", "counting", "position", "ground", "size", "names")
HELD_OUT_CATEGORIES = (*CATEGORY_SHARES, "names")
HELD_OUT_SHARE = 10  # percent of all combinations
SMALL, LARGE = 40, 68  # the longest side that is small, the shortest that is large, in 128ths
LEAST_SIDE = 28
_MARGIN, _GAP = 4, 8  # to the edge of the scene, and between objects
_SIDES = {1: (40, 112), 2: (36, 60), 3: (32, 54), 4: (30, 48)}  # of objects, by how many share a scene
# kind of combination that a held-out scene of a category shows
_ABOUT = {"two": "pair", "three": "pair", "counting": "count", "position": "relation", "ground": "ground"}
_MOST_ATTEMPTS = 20_000
_LEAST_NOUNS = 12  # fewer may lack a held-out combination of some kind
_FIRST, _STEP = 8, 16  # aligned corners lie at 8, 24, 40, ...
_ALIGNED_SMALL, _ALIGNED_LARGE = 32, 72
_ALIGNED_SIDES = {
    1: (48, _ALIGNED_LARGE),
    2: (48,),
    3: (_ALIGNED_SMALL, 48),
    4: (_ALIGNED_SMALL,),
}  # as _SIDES

Combination = tuple[str, ...]


@dataclass(frozen=True)
class Variety:
    """How much scenes differ; less is learnt sooner.

    Args:
        num_nouns: number of nouns, the most everyday first (nouns.EVERYDAY); None shows every trained noun.
        aligned: whether corners lie at 8, 24, 40, ... and longer sides are 32, 48 or 72, all in 128ths, so
            that patches of 8 x 8 repeat from scene to scene and an object has few places to begin.

    Raises:
        ValueError: that many everyday nouns are not known, or with so few a category may lack held-out
            scenes.
    """

    num_nouns: int | None = None
    aligned: bool = False

    def __post_init__(self) -> None:
        if self.num_nouns is not None and not _LEAST_NOUNS <= self.num_nouns <= len(EVERYDAY):
            raise ValueError(
                f"data.num_nouns is {self.num_nouns}: it must be null (every noun) or "
                f"from {_LEAST_NOUNS} to {len(EVERYDAY)}"
            )


ALL = Variety()


@dataclass(frozen=True)
class Scene:
    """A scene as it is specified; `image` paints it.

    Args:
        key: names it within its split and seed.
        category: what it is about.
        objects: what is where.
        ground: what they stand on.
        asked: what its caption claims.
        caption: says so.
    """

    key: str
    category: str
    objects: tuple[Placed, ...]
    ground: Ground
    asked: Asked
    caption: str

    def image(self, size: int = UNITS) -> np.ndarray:
        """Its pixels, (size, size, 3) uint8."""
        return paint(self.objects, self.ground, size)

    def facts(self) -> dict[str, Any]:
        """Key, caption and what a sample keeps beside."""
        return {"key": self.key, "caption": self.caption, "category": self.category, **self.asked.plain()}


def relation(one: Placed, other: Placed) -> str | None:
    """How one object lies to the other: along the axis on which their centres are farther apart."""
    across, down = (a - b for a, b in zip(one.centre, other.centre, strict=True))
    if abs(across) == abs(down):
        return None
    if abs(across) > abs(down):
        return "left of" if across < 0 else "right of"
    return "above" if down < 0 else "below"


def combinations_of(objects: Sequence[Placed], ground: Ground) -> Iterator[Combination]:
    """Every combination that a scene shows, whether or not its caption speaks of it."""
    counts = Counter(item.noun for item in objects)
    for noun, count in counts.items():
        yield "ground", noun, ground.name
        if count > 1:
            yield "count", str(count), noun
    for pair in combinations(sorted(counts), 2):
        yield "pair", *pair
    for item in objects:
        if item.side <= SMALL:
            yield "size", "small", item.noun
        if item.side >= LARGE:
            yield "size", "large", item.noun
    for one, other in combinations(objects, 2):
        if one.noun != other.noun:
            yield from _canonical(one, other)


def _counted(
    objects: Sequence[Placed], ground: Ground, sizes: dict[str, str], variety: Variety
) -> Iterator[Combination]:
    """The combinations that decide the split: all of a scene, of aligned sizes those its caption names.

    Among three aligned sizes a large object shares no patch with a smaller one: an object that training never
    shows large could not be drawn so by any model that draws known patches.
    """
    for entry in combinations_of(objects, ground):
        if entry[0] != "size" or not variety.aligned or entry[2] in sizes:
            yield entry


def _canonical(one: Placed, other: Placed) -> Iterator[Combination]:
    """The relation of two objects from the left or upper one: "a left of b" is "b right of a"."""
    found = relation(one, other)
    if found in ("left of", "above"):
        yield "relation", found, one.noun, other.noun
    elif found:
        yield "relation", {"right of": "left of", "below": "above"}[found], other.noun, one.noun


def held_out(combination: Combination) -> bool:
    """Whether training never shows a combination; the same for all seeds."""
    return hashed("held out", *combination) % 100 < HELD_OUT_SHARE


def training_scene(seed: int, index: int, variety: Variety = ALL) -> Scene:
    """Scene `index` of the training split."""
    category = _drawn_category(Draws("category", seed, index))
    return _first_fit("train", category, seed, index, f"scene_{index:08d}", variety)


def held_out_scene(category: str, seed: int, index: int, variety: Variety = ALL) -> Scene:
    """Scene `index` of a category of the held-out split.

    Args:
        category: one of HELD_OUT_CATEGORIES; "names" shows a single object that training never shows.
        seed: seed of everything that is drawn.
        index: number of the scene in its category.
        variety: how much scenes differ.

    Returns:
        The scene; the same for the same arguments on every machine.

    Raises:
        ValueError: the category is unknown.
    """
    if category not in HELD_OUT_CATEGORIES:
        raise ValueError(f"category is {category!r}, it must be one of {', '.join(HELD_OUT_CATEGORIES)}")
    return _first_fit("val", category, seed, index, f"{category}_{index:06d}", variety)


def held_out_scenes(per_category: int, seed: int = 0, variety: Variety = ALL) -> list[Scene]:
    """Scenes for measuring, equally many of each of PROMPT_CATEGORIES; their captions are the prompts."""
    return [
        held_out_scene(category, seed, index, variety)
        for category in PROMPT_CATEGORIES
        for index in range(per_category)
    ]


def _first_fit(split: str, category: str, seed: int, index: int, key: str, variety: Variety) -> Scene:
    for attempt in range(_MOST_ATTEMPTS):
        draws = Draws(split, seed, category, index, attempt)
        if scene := _attempt(split, category, key, draws, variety):
            return scene
    raise ValueError(f"no scene {key} of seed {seed} keeps to its split; take another seed")


def _drawn_category(draws: Draws) -> str:
    left = draws.below(sum(CATEGORY_SHARES.values()))
    for category, share in CATEGORY_SHARES.items():
        left -= share
        if left < 0:
            return category
    raise AssertionError("shares add up to their sum")


def _attempt(split: str, category: str, key: str, draws: Draws, variety: Variety) -> Scene | None:
    """The scene that the draws give, if it keeps to its split and everything finds a place."""
    nouns = _drawn_nouns(category, draws, variety.num_nouns)
    counts = tuple(Counter(nouns).items())
    sizes = _drawn_sizes(category, counts, draws)
    ground = _drawn_ground(nouns, draws)
    objects = ground and _placed(nouns, dict(sizes), draws, variety.aligned)
    if not ground or not objects:
        return None
    shown = [entry for entry in _counted(objects, ground, dict(sizes), variety) if held_out(entry)]
    keeps_to_split = not shown if split == "train" else _is_new(category, sizes, shown)
    if not keeps_to_split:
        return None
    between = None
    if category == "position":
        between = relation(*objects)
        if between is None or not _clear(*objects):
            return None
    says_ground = category == "ground" or (split == "train" and draws.below(4) == 0)
    asked = Asked(counts, between, sizes, ground.name if says_ground else None)
    return Scene(key, category, objects, ground, asked, caption(asked, draws))


def _is_new(category: str, sizes: tuple[tuple[str, str], ...], shown: Sequence[Combination]) -> bool:
    """Whether a scene has the held-out combination that its category is about; some categories need none."""
    if category == "size":
        return any(("size", size, noun) in shown for noun, size in sizes)
    kind = _ABOUT.get(category)
    return kind is None or any(entry[0] == kind for entry in shown)


@lru_cache(maxsize=4)
def _nouns(trained: bool, number: int | None) -> tuple[str, ...]:
    if trained and number is not None:
        return tuple(sorted(EVERYDAY[:number]))
    return tuple(item.noun for item in load_objects() if item.trained == trained)


def _drawn_nouns(category: str, draws: Draws, num_nouns: int | None) -> list[str]:
    """A noun an object."""
    nouns = _nouns(category != "names", num_nouns)
    if category == "counting":
        count = draws.between(2, 4)
        if count < 4 and draws.below(4) == 0:
            return [draws.choice(nouns)] * count + [draws.choice(nouns)]
        return [draws.choice(nouns)] * count
    number = {"two": 2, "three": 3, "position": 2, "size": 1 + draws.below(2), "ground": 1 + draws.below(2)}
    return draws.sample(nouns, number.get(category, 1))


def _drawn_sizes(
    category: str, counts: Sequence[tuple[str, int]], draws: Draws
) -> tuple[tuple[str, str], ...]:
    if category != "size":
        return ()
    order = draws.sample(list(SIZES), 2)
    return tuple((noun, size) for (noun, _), size in zip(counts, order, strict=False))


def _drawn_ground(nouns: Sequence[str], draws: Draws) -> Ground | None:
    fits = [name for name in GROUND_COLOURS if all(name in readable_grounds()[noun] for noun in nouns)]
    if not fits:
        return None
    first, direction = draws.between(0, SHADES), draws.choice(DIRECTIONS)
    plain = draws.below(2) == 0 or direction == (0, 0)
    last = first if plain else draws.between(0, SHADES)
    return Ground(draws.choice(fits), first, last, (0, 0) if plain else direction)


def _placed(
    nouns: Sequence[str], sizes: dict[str, str], draws: Draws, aligned: bool
) -> tuple[Placed, ...] | None:
    """Boxes that neither overlap nor leave the scene; objects of one kind are about equally large."""
    drawn_side = _aligned_side if aligned else _free_side
    sides = {}
    for noun in nouns:
        sides[noun] = drawn_side(len(nouns), sizes.get(noun), draws)
    first, step = (_FIRST, _STEP) if aligned else (_MARGIN, 1)
    placed: list[Placed] = []
    for noun in nouns:
        side = sides[noun]
        if not aligned:
            shrunken = max(LEAST_SIDE, side * draws.between(92, 100) // 100)
            side = side if sizes.get(noun) == "large" else shrunken
        width, height = _box(noun, side)
        for _ in range(12):
            left, top = (
                first + step * draws.between(0, (UNITS - _MARGIN - side - first) // step)
                for side in (width, height)
            )
            item = Placed(noun, left, top, width, height)
            if all(_apart(item, other) for other in placed):
                placed.append(item)
                break
        else:
            return None
    return tuple(placed)


def aligned_boxes(variety: Variety) -> Iterator[tuple[str, int, int]]:
    """Noun, width and height of every aligned object, in 128ths."""
    for noun in _nouns(True, variety.num_nouns):
        for side in (_ALIGNED_SMALL, 48, _ALIGNED_LARGE):
            yield noun, *_box(noun, side)


def _free_side(number: int, size: str | None, draws: Draws) -> int:
    """The longest side that one of so many objects gets."""
    shortest, longest = _SIDES[number]
    low, high = {
        None: (shortest, longest),
        "large": (LARGE + 4, longest if number == 1 else 84),
        "small": (LEAST_SIDE, SMALL - 4),
    }[size]
    return draws.between(low, high)


def _aligned_side(number: int, size: str | None, draws: Draws) -> int:
    return {
        None: draws.choice(_ALIGNED_SIDES[number]),
        "large": _ALIGNED_LARGE,
        "small": _ALIGNED_SMALL,
    }[size]


def _box(noun: str, side: int) -> tuple[int, int]:
    width, height = cut_outs()[noun].size
    longer = max(width, height)
    return max(1, side * width // longer), max(1, side * height // longer)


def _apart(one: Placed, other: Placed) -> bool:
    across = max(one.left - other.left - other.width, other.left - one.left - one.width)
    down = max(one.top - other.top - other.height, other.top - one.top - one.height)
    return max(across, down) >= _GAP


def _clear(one: Placed, other: Placed) -> bool:
    """Whether nobody would doubt in which relation two objects are."""
    across, down = sorted(abs(a - b) for a, b in zip(one.centre, other.centre, strict=True))
    return 3 * across <= 2 * down
