"""The grammar of the scenes' captions, with its synonyms: captions are made by it, and prompts read by it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from sjd2_lightning.data.sources.draws import Draws
from sjd2_lightning.data.sources.nouns import load_objects

RELATIONS = {
    "left of": ("left of", "to the left of", "on the left of"),
    "right of": ("right of", "to the right of", "on the right of"),
    "above": ("above", "over"),
    "below": ("below", "under", "beneath"),
}
SIZES = {"large": ("large", "big"), "small": ("small", "little")}
COUNTS = {2: ("two", "2"), 3: ("three", "3"), 4: ("four", "4")}
_GROUNDS = ("on a {} background", "on {}", "on a {} ground", "against a {} background")
_SILENT_H = ("hour", "honest")
_LINKS = (", and ", ", ", " and ", " with ")  # between objects; the longest first


@dataclass(frozen=True)
class Asked:
    """What a caption claims.

    Args:
        counts: nouns and how many of each, in the order of the caption.
        relation: how the first object lies to the second, a key of RELATIONS.
        sizes: nouns and "large" or "small".
        ground: colour of the ground.
    """

    counts: tuple[tuple[str, int], ...]
    relation: str | None = None
    sizes: tuple[tuple[str, str], ...] = ()
    ground: str | None = None

    @property
    def category(self) -> str:
        """The category of scenes that a caption of this form belongs to."""
        if self.relation or self.sizes:
            return "position" if self.relation else "size"
        if any(count > 1 for _, count in self.counts):
            return "counting"
        if self.ground:
            return "ground"
        return ("single", "two", "three")[len(self.counts) - 1]

    def plain(self) -> dict[str, Any]:
        """As plain values, for files and for the judge."""
        first, second = (self.counts[0][0], self.counts[-1][0])
        return {
            "objects": dict(self.counts),
            "relation": [first, self.relation, second] if self.relation else None,
            "sizes": dict(self.sizes),
            "ground": self.ground,
        }


def article(words: str) -> str:
    """The words with "a" or "an" before them."""
    sound = words.lower()
    vowel = sound.startswith(("a", "e", "i", "o", "x-", *_SILENT_H))
    vowel = vowel or (sound.startswith("u") and not sound.startswith(("uni", "use", "uk")))
    return f"{'an' if vowel else 'a'} {words}"


def caption(asked: Asked, draws: Draws) -> str:
    """One of the sentences that say what is asked; the draws choose the synonyms."""
    sizes = dict(asked.sizes)
    alone = len(asked.counts) == 1
    parts = [_named(noun, count, sizes.get(noun), alone, draws) for noun, count in asked.counts]
    if asked.relation:
        text = f"{parts[0]} {draws.choice(RELATIONS[asked.relation])} {parts[1]}"
    elif len(parts) == 2:
        text = f"{parts[0]} {draws.choice(('and', 'and', 'with'))} {parts[1]}"
    else:
        text = _listed(parts)
    if asked.ground is None:
        return text
    return f"{text} {draws.choice(_GROUNDS).format(asked.ground)}".replace(" a orange ", " an orange ")


def _named(noun: str, count: int, size: str | None, alone: bool, draws: Draws) -> str:
    adjective = f"{draws.choice(SIZES[size])} " if size else ""
    if count > 1:
        number = draws.choice(COUNTS[count])
        return f"{number} {adjective}{_plurals()[noun]}"
    words = f"{adjective}{noun}"
    return draws.choice((article(words), article(words), f"one {words}")) if alone else article(words)


def _listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _plurals() -> dict[str, str]:
    return {item.noun: item.plural for item in load_objects()}


def read_caption(text: str, grounds: Sequence[str]) -> Asked | None:
    """What a sentence of this grammar asks for; None for any other sentence.

    Args:
        text: a caption, or what a person typed; case, and a full stop at the end, do not count.
        grounds: known colours of the ground.
    """
    rest, ground = _without_ground(" ".join(text.lower().split()).removesuffix("."), grounds)
    counts: dict[str, int] = {}
    sizes: dict[str, str] = {}
    relation = None
    while found := _object_pattern().match(rest):
        number, size, name = found.groups()
        noun = _nouns_by_name()[name]
        if noun in counts:
            return None
        counts[noun] = _numbers()[number]
        if size:
            sizes[noun] = next(key for key, words in SIZES.items() if size in words)
        rest = rest[found.end() :]
        if not rest:
            break
        if relation is not None:
            return None
        relation, rest = _after_link(rest, len(counts))
    if rest or not 1 <= len(counts) <= 3 or (relation and [*counts.values()] != [1, 1]):
        return None
    return Asked(tuple(counts.items()), relation, tuple(sizes.items()), ground)


def _without_ground(text: str, grounds: Sequence[str]) -> tuple[str, str | None]:
    """The text before a ground, and its colour."""
    for form in _GROUNDS:
        for colour in grounds:
            ending = f" {form.format(colour)}".replace(" a orange ", " an orange ")
            if text.endswith(ending):
                return text.removesuffix(ending), colour
    return text, None


def _after_link(text: str, num_objects: int) -> tuple[str | None, str]:
    """A relation, or None for a mere link, and what comes behind it; the text as it is if it is neither."""
    for relation, words in RELATIONS.items():
        for word in words:
            if num_objects == 1 and text.startswith(f" {word} "):
                return relation, text.removeprefix(f" {word} ")
    link = next((link for link in _LINKS if text.startswith(link)), "")
    return None, text.removeprefix(link) if link else f" {text}"


@lru_cache(maxsize=1)
def _nouns_by_name() -> dict[str, str]:
    """Nouns by what captions call one or several of them, in small letters."""
    objects = load_objects()
    return {item.plural.lower(): item.noun for item in objects} | {o.noun.lower(): o.noun for o in objects}


@lru_cache(maxsize=1)
def _numbers() -> dict[str, int]:
    return {"a": 1, "an": 1, "one": 1} | {word: count for count, words in COUNTS.items() for word in words}


@lru_cache(maxsize=1)
def _object_pattern() -> re.Pattern[str]:
    """A number, a size if there is one, and the longest noun that fits."""
    names = sorted(_nouns_by_name(), key=len, reverse=True)
    sizes = [word for words in SIZES.values() for word in words]
    number, size, name = ("|".join(map(re.escape, words)) for words in (_numbers(), sizes, names))
    return re.compile(rf"({number}) (?:({size}) )?({name})(?![\w-])")
