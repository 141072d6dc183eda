"""The grammar of the scenes' captions, with its synonyms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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
