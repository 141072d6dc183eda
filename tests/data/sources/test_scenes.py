"""Scenes: the vocabulary, the grammar, composition, and that the splits share no held-out combination."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from functools import cache
from importlib.metadata import version
from itertools import combinations

import numpy as np
import pytest

from sjd2_lightning.data.sources.draws import Draws
from sjd2_lightning.data.sources.emoji import load_emoji_index
from sjd2_lightning.data.sources.nouns import EVERYDAY, load_objects, plural_of
from sjd2_lightning.data.sources.scene_captions import COUNTS, RELATIONS, SIZES, Asked, article, caption
from sjd2_lightning.data.sources.scene_pixels import (
    DIRECTIONS,
    GROUND_COLOURS,
    SHADES,
    Ground,
    Placed,
    ground_pixels,
    readable_grounds,
)
from sjd2_lightning.data.sources.scenes import (
    CATEGORY_SHARES,
    HELD_OUT_CATEGORIES,
    HELD_OUT_SHARE,
    PROMPT_CATEGORIES,
    Scene,
    Variety,
    held_out_scene,
    held_out_scenes,
    training_scene,
)
from tests.tools.source import REPO

NUM_TRAINING = 12_000
# of the first scenes; if either changes, raise SCENES_VERSION in scene_shards.py
SPECIFICATIONS = "d1242ce9cb262f2f"
# Pillow 13 rounds otherwise than 12
PIXELS = "a3e9e2620e249994" if version("pillow") >= "13" else "aae1ff917fc9302e"


@cache
def training() -> tuple[Scene, ...]:
    return tuple(training_scene(0, index) for index in range(NUM_TRAINING))


@cache
def held_out() -> tuple[Scene, ...]:
    return tuple(
        held_out_scene(category, 0, index) for category in HELD_OUT_CATEGORIES for index in range(60)
    )


def shown(scene: Scene, aligned: bool = False) -> set[tuple[str, ...]]:
    """Every combination of a scene, read anew from where its objects are and from what its caption claims."""
    found: set[tuple[str, ...]] = set()
    counts = Counter(item.noun for item in scene.objects)
    for number in (counts, dict(scene.asked.counts)):
        found |= {("count", str(count), noun) for noun, count in number.items() if count > 1}
        found |= {("pair", *sorted(pair)) for pair in combinations(number, 2)}
        found |= {("ground", noun, scene.ground.name) for noun in number}
    for one, other in combinations(scene.objects, 2):
        dx = (one.left + one.width / 2) - (other.left + other.width / 2)
        dy = (one.top + one.height / 2) - (other.top + other.height / 2)
        if one.noun != other.noun and abs(dx) != abs(dy):
            first, second = (one, other) if (dx if abs(dx) > abs(dy) else dy) < 0 else (other, one)
            found.add(("relation", "left of" if abs(dx) > abs(dy) else "above", first.noun, second.noun))
    if scene.asked.relation:
        (first_noun, _), (second_noun, _) = scene.asked.counts
        name = {"right of": "left of", "below": "above"}.get(scene.asked.relation)
        pair = (second_noun, first_noun) if name else (first_noun, second_noun)
        found.add(("relation", name or scene.asked.relation, *pair))
    found |= {("size", size, noun) for noun, size in scene.asked.sizes}
    if not aligned:
        found |= {("size", "small", item.noun) for item in scene.objects if item.side <= 40}
        found |= {("size", "large", item.noun) for item in scene.objects if item.side >= 68}
    return found


def is_held_out(combination: tuple[str, ...]) -> bool:
    digest = hashlib.sha256("/".join(["held out", *combination]).encode()).digest()
    return int.from_bytes(digest[:8], "big") % 100 < HELD_OUT_SHARE


# Vocabulary


def test_nouns_are_the_pictures_they_name() -> None:
    split = {item.path: item.split for item in load_emoji_index()}
    objects = load_objects()
    assert len({item.noun for item in objects}) == len({item.path for item in objects}) == len(objects) > 400
    assert len({item.plural for item in objects} - {item.noun for item in objects}) > 400
    assert all(item.trained == (split[item.path] == "train") for item in objects)
    assert 20 <= sum(not item.trained for item in objects) <= 40


@pytest.mark.parametrize(
    ("one", "several"),
    [
        *[("mouse", "mice"), ("kitchen knife", "kitchen knives"), ("wolf", "wolves"), ("goose", "geese")],
        *[("fox", "foxes"), ("strawberry", "strawberries"), ("monkey", "monkeys"), ("fish", "fish")],
        *[("pair of scissors", "pairs of scissors"), ("box of popcorn", "boxes of popcorn"), ("die", "dice")],
        *[("wrench", "wrenches"), ("tooth", "teeth"), ("potato", "potatoes"), ("radio", "radios")],
        *[("wine glass", "wine glasses"), ("bow and arrow", "bows and arrows"), ("snowman", "snowmen")],
    ],
)
def test_plurals(one: str, several: str) -> None:
    assert {item.noun: item.plural for item in load_objects()}[one] == several


def test_a_plural_by_rule() -> None:
    assert [plural_of(noun) for noun in ("bus", "berry", "toy", "cup of tea")] == [
        *("buses", "berries", "toys", "cups of tea")
    ]


def test_every_object_stands_out_on_some_grounds() -> None:
    grounds = readable_grounds()
    assert min(len(names) for names in grounds.values()) >= 3
    assert "white" not in grounds["tooth"]
    assert "black" in grounds["tooth"]
    assert "green" not in grounds["green heart"]


# Grammar


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("dog", "a dog"),
        ("ant", "an ant"),
        ("hourglass", "an hourglass"),
        ("unicorn", "a unicorn"),
        ("umbrella", "an umbrella"),
        ("x-ray", "an x-ray"),
        ("horse", "a horse"),
        ("orange book", "an orange book"),
    ],
)
def test_articles(words: str, said: str) -> None:
    assert article(words) == said


def every_caption(asked: Asked) -> set[str]:
    return {caption(asked, Draws("captions", number)) for number in range(300)}


def test_the_grammar_says_the_same_in_several_ways() -> None:
    assert every_caption(Asked((("dog", 1),))) == {"a dog", "one dog"}
    assert every_caption(Asked((("apple", 3),))) == {"three apples", "3 apples"}
    assert every_caption(Asked((("dog", 1), ("ant", 1)))) == {"a dog and an ant", "a dog with an ant"}
    assert every_caption(Asked((("dog", 1), ("ant", 1), ("key", 1)))) == {"a dog, an ant and a key"}
    assert every_caption(Asked((("key", 1), ("ant", 1)), relation="left of")) == {
        f"a key {words} an ant" for words in RELATIONS["left of"]
    }
    assert every_caption(Asked((("dog", 1),), sizes=(("dog", "large"),))) == {
        *("a large dog", "one large dog", "a big dog", "one big dog")
    }
    grounds = every_caption(Asked((("dog", 2),), ground="orange"))
    assert "two dogs on an orange background" in grounds
    assert "2 dogs on orange" in grounds
    assert len(grounds) == 8


def claims(text: str) -> dict[str, object]:
    """What a caption claims, read back from its words alone."""
    sizes, counts, relations = {}, {}, []
    nouns = {item.noun: item.noun for item in load_objects()}
    nouns |= {item.plural: item.noun for item in load_objects() if item.plural != item.noun}
    ground = re.search(
        rf" (?:on|against)(?: an?)? ({'|'.join(GROUND_COLOURS)})(?: background| ground)?$", text
    )
    rest = text[: ground.start()] if ground else text
    synonyms = {word: name for name, words in RELATIONS.items() for word in words}
    joints = "|".join(sorted(map(re.escape, synonyms), key=len, reverse=True))
    numbers = {word: n for n, words in COUNTS.items() for word in words} | {"a": 1, "an": 1, "one": 1}
    thing = rf"({'|'.join(numbers)}) (?:({'|'.join(w for s in SIZES.values() for w in s)}) )?"
    thing += rf"({'|'.join(sorted(map(re.escape, nouns), key=len, reverse=True))})"
    while rest:
        found = re.match(rf"{thing}(?:$|(, | and | with )| ({joints}) )", rest)
        assert found, (text, rest)
        number, size, noun, _, joint = found.groups()
        counts[nouns[noun]] = numbers[number]
        if size:
            sizes[nouns[noun]] = next(name for name, words in SIZES.items() if size in words)
        if joint:
            relations.append(synonyms[joint])
        rest = rest[found.end() :]
    first_second = [next(iter(counts)), relations[0], list(counts)[-1]] if relations else None
    return {"objects": counts, "relation": first_second, "sizes": sizes, "ground": ground and ground[1]}


def test_captions_say_what_is_asked_and_what_is_asked_is_there() -> None:
    for scene in (*training()[:3000], *held_out()):
        assert claims(scene.caption) == scene.asked.plain(), scene
        assert Counter(item.noun for item in scene.objects) == dict(scene.asked.counts)
        assert scene.asked.ground in (None, scene.ground.name)
        for noun, size in scene.asked.sizes:
            (side,) = [item.side for item in scene.objects if item.noun == noun]
            assert side >= 68 if size == "large" else side <= 40


# Composition


def overlap(one: Placed, other: Placed) -> bool:
    across = min(one.left + one.width, other.left + other.width) - max(one.left, other.left)
    down = min(one.top + one.height, other.top + other.height) - max(one.top, other.top)
    return across > -4 and down > -4


def test_objects_neither_overlap_nor_leave_the_scene_nor_get_too_small() -> None:
    for scene in (*training(), *held_out()):
        assert 1 <= len(scene.objects) <= 4
        assert not any(overlap(*pair) for pair in combinations(scene.objects, 2))
        for item in scene.objects:
            assert item.side >= 24
            assert min(item.left, item.top) >= 4
            assert item.left + item.width <= 124
            assert item.top + item.height <= 124
            assert scene.ground.name in readable_grounds()[item.noun]


def test_training_shows_every_category_and_every_object_and_every_ground() -> None:
    about = Counter(scene.category for scene in training())
    assert all(
        abs(about[name] / NUM_TRAINING - share / 100) < 0.02 for name, share in CATEGORY_SHARES.items()
    )
    seen = {item.noun for scene in training() for item in scene.objects}
    assert seen == {item.noun for item in load_objects() if item.trained}
    assert {scene.ground.name for scene in training()} == set(GROUND_COLOURS)
    graded = [scene for scene in training() if scene.ground.first != scene.ground.last]
    assert 0.25 < len(graded) / NUM_TRAINING < 0.5
    assert {scene.ground.direction for scene in graded} == set(DIRECTIONS) - {(0, 0)}
    assert len({scene.key for scene in training()}) == NUM_TRAINING


def test_grounds_are_plain_or_graded() -> None:
    plain = ground_pixels(Ground("green", 3, 3, (0, 0)), 32)
    assert len(np.unique(plain.reshape(-1, 3), axis=0)) == 1
    graded = ground_pixels(Ground("green", 0, SHADES, (0, -1)), 32)
    assert (tuple(graded[5, -1]), tuple(graded[5, 0])) == GROUND_COLOURS["green"]
    assert (graded[0] == graded[-1]).all()


@pytest.mark.parametrize("size", [64, 128, 200])
def test_a_scene_has_any_size(size: int) -> None:
    image = training()[0].image(size)
    assert (image.shape, image.dtype) == ((size, size, 3), np.uint8)
    assert abs(training()[0].image(64).mean() - image.mean()) < 2


# Splits


def test_training_shows_no_held_out_combination() -> None:
    """By content: every combination of 12,000 scenes, in pixels and captions."""
    trained = set().union(*map(shown, training()))
    kept = [entry for scene in held_out() for entry in shown(scene) if is_held_out(entry)]
    assert {entry[0] for entry in kept} == {"pair", "count", "ground", "relation", "size"}
    assert not [entry for entry in trained if is_held_out(entry)]
    assert not trained & set(kept)


def test_training_shows_neighbours_of_what_is_held_out() -> None:
    """The object of a held-out number was counted before."""
    trained: set[tuple[str, ...]] = set().union(*map(shown, training()))
    counted = {entry[2] for entry in trained if entry[0] == "count"}
    grounds = Counter(entry[1] for entry in trained if entry[0] == "ground")
    nouns = [item.noun for item in load_objects() if item.trained]
    assert len(counted) > 0.95 * len(nouns)
    assert min(grounds[noun] for noun in nouns) >= 3


def test_training_never_shows_a_held_out_name() -> None:
    names = {item.noun for item in load_objects() if not item.trained}
    assert not names & {item.noun for scene in training() for item in scene.objects}
    for scene in held_out():
        assert {item.noun in names for item in scene.objects} == {scene.category == "names"}


@pytest.mark.parametrize(
    ("category", "kind"),
    [
        ("two", "pair"),
        ("three", "pair"),
        ("counting", "count"),
        ("position", "relation"),
        ("ground", "ground"),
        ("size", "size"),
    ],
)
def test_a_held_out_scene_is_about_a_held_out_combination(category: str, kind: str) -> None:
    for scene in held_out():
        if scene.category == category:
            assert [entry for entry in shown(scene) if entry[0] == kind and is_held_out(entry)], scene


def test_other_seeds_hold_out_the_same_combinations() -> None:
    other: Iterable[Scene] = (training_scene(5, index) for index in range(1000))
    assert not [entry for scene in other for entry in shown(scene) if is_held_out(entry)]


def test_prompts_are_equally_many_of_each_category() -> None:
    prompts = held_out_scenes(5)
    assert Counter(scene.category for scene in prompts) == dict.fromkeys(PROMPT_CATEGORIES, 5)
    assert len({scene.key for scene in prompts}) == len(prompts)
    assert prompts[:3] == held_out_scenes(3)[:3], "more prompts change none"
    assert json.loads(json.dumps(prompts[-1].facts())) == prompts[-1].facts()


def test_an_unknown_category_is_refused() -> None:
    with pytest.raises(ValueError, match=r"category is 'colours', it must be one of single, two"):
        held_out_scene("colours", 0, 0)


# Less variety

FEW = Variety(num_nouns=12, aligned=True)


def test_few_nouns_are_the_first_of_the_everyday_ones() -> None:
    trained = {item.noun for item in load_objects() if item.trained}
    assert len(set(EVERYDAY)) == len(EVERYDAY)
    assert trained.issuperset(EVERYDAY)
    nouns = {item.noun for index in range(300) for item in training_scene(0, index, FEW).objects}
    assert nouns == set(EVERYDAY[:12])


def test_aligned_objects_repeat_patch_by_patch() -> None:
    objects = [item for index in range(300) for item in training_scene(0, index, FEW).objects]
    assert {item.side for item in objects} == {32, 48, 72}
    assert not [item for item in objects if item.left % 16 != 8 or item.top % 16 != 8]
    assert any(item.left % 8 for index in range(50) for item in training_scene(0, index).objects)


def test_held_out_combinations_of_few_nouns_are_of_trained_nouns() -> None:
    for category in CATEGORY_SHARES:
        for index in range(10):
            scene = held_out_scene(category, 0, index, FEW)
            assert {item.noun for item in scene.objects} <= set(EVERYDAY[:12])
            if category != "single":
                assert any(is_held_out(entry) for entry in shown(scene, aligned=True))
    seen = {entry for index in range(1000) for entry in shown(training_scene(0, index, FEW), aligned=True)}
    assert not [entry for entry in seen if is_held_out(entry)]


def test_every_aligned_object_is_trained_in_every_size() -> None:
    """One that training never shows large cannot be drawn so: of aligned sizes, captions are held out."""
    scenes = (training_scene(0, index, FEW) for index in range(3000))
    assert len({(item.noun, item.side) for scene in scenes for item in scene.objects}) == 12 * 3


@pytest.mark.parametrize("number", [11, len(EVERYDAY) + 1])
def test_a_number_of_nouns_that_are_not_there_is_refused(number: int) -> None:
    with pytest.raises(ValueError, match=rf"data.num_nouns is {number}: it must be null .* from 12 to"):
        Variety(num_nouns=number)


# The same on every machine


def digests() -> tuple[str, str]:
    scenes = [training_scene(0, index) for index in range(64)] + held_out_scenes(4)
    facts = json.dumps([[scene.facts(), repr(scene.objects), repr(scene.ground)] for scene in scenes])
    pixels = b"".join(scene.image().tobytes() for scene in scenes)
    return hashlib.sha256(facts.encode()).hexdigest()[:16], hashlib.sha256(pixels).hexdigest()[:16]


def test_the_same_seed_gives_the_same_bytes() -> None:
    assert digests() == (SPECIFICATIONS, PIXELS)


def test_the_same_bytes_in_another_process() -> None:
    code = "from tests.data.sources.test_scenes import digests; print(*digests())"
    environment = {"PYTHONHASHSEED": "7", "PYTHONPATH": str(REPO), "PATH": "/usr/bin:/bin"}
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=REPO, env=environment, capture_output=True, text=True, check=True
    )
    assert ran.stdout.split() == [*digests()]


def test_draws_are_even_and_depend_on_their_name() -> None:
    draws = Draws("a", 1)
    counts = Counter(draws.below(5) for _ in range(5000))
    assert set(counts) == set(range(5))
    assert max(counts.values()) - min(counts.values()) < 200
    assert [Draws("a", 1).below(10**6)] == [Draws("a", 1).below(10**6)] != [Draws("a", 2).below(10**6)]
    assert sorted(Draws("b").sample(range(9), 9)) == list(range(9))
