"""A variant of decoding is one file: its word stands there, in `method` and in `config`, nowhere else."""

import re

import pytest

from tests.tools.source import PACKAGE, REPO

ROOM = REPO / PACKAGE / "decoding"
LOOK_UP = {"method.py", "config.py"}
# word: file of `variants` that it belongs to
WORDS = {
    "tree": "tree.py",
    "siblings": "tree.py",
    "grouped": "grouped.py",
    "grouping": "grouped.py",
    "pairs": "pairs.py",
    "sweeps": "pairs.py",
    "corrector": "corrector.py",
    "early": "early_exit.py",
    "exit": "early_exit.py",
    "drafter": "drafter.py",
    "above": "first_drafts.py",
    "tied": "first_drafts.py",
    "pure": "paper.py",
}
# Streams of random numbers have their numbers in one place, since no two may be equal.
EXCEPT = {"randomness.py": {"siblings"}, "__init__.py": {"pure"}}


def strangers(name: str, source: str) -> set[str]:
    """Words of variants that stand in a file of the room and have no business there."""
    if name in LOOK_UP:
        return set()
    words = {
        word
        for part in re.findall(r"[A-Za-z_]+", source)
        for word in re.split(r"_|(?<=[a-z])(?=[A-Z])", part)
    }
    own = {word for word, home in WORDS.items() if home == name}
    return ({word.lower() for word in words} & set(WORDS)) - own - EXCEPT.get(name, set())


@pytest.mark.parametrize("name", sorted({path.name for path in ROOM.rglob("*.py")}))
def test_a_variant_is_one_file(name):
    found = [strangers(path.name, path.read_text()) for path in ROOM.rglob(name)]
    assert not set().union(*found), "what differs is a class in `variants`, found by its name in method.py"


def test_words_of_other_variants_are_seen():
    assert strangers("window.py", "if self.tree is None: x = tied_noise") == {"tree", "tied"}
    assert strangers("grouped.py", "class FromAbove: the grouped rule") == {"above"}
    assert strangers("loop.py", "class TreePass") == {"tree"}
    assert not strangers("tree.py", "siblings of a tree")
    assert not strangers("method.py", "Grouped")
    for word, home in WORDS.items():
        assert word in (ROOM / "variants" / home).read_text().lower(), "the word of a variant that is gone"
