"""The grammar of captions: what it says it reads back."""

import pytest

from sjd2_lightning.data.sources.scene_captions import Asked, read_caption
from sjd2_lightning.data.sources.scene_pixels import GROUND_COLOURS
from sjd2_lightning.data.sources.scenes import held_out_scenes, training_scene

GROUNDS = tuple(GROUND_COLOURS)


def test_every_caption_is_read_as_what_it_says():
    scenes = [*held_out_scenes(12), *(training_scene(3, index) for index in range(150))]
    for scene in scenes:
        assert read_caption(scene.caption, GROUNDS) == scene.asked, scene.caption
    held_out = [scene for scene in scenes[:84] if scene.category != "names"]
    assert {scene.category for scene in held_out} >= {"single", "two", "counting", "position"}
    assert all(read_caption(scene.caption, GROUNDS).category == scene.category for scene in held_out)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Two dogs on a green background.", Asked((("dog", 2),), ground="green")),
        ("a key left of a bell", Asked((("key", 1), ("bell", 1)), "left of")),
        ("a  big dog and a key", Asked((("dog", 1), ("key", 1)), None, (("dog", "large"),))),
        ("a dog, two keys and a bell", Asked((("dog", 1), ("key", 2), ("bell", 1)))),
    ],
)
def test_sentences_that_people_type(text, expected):
    assert read_caption(text, GROUNDS) == expected


@pytest.mark.parametrize(
    "text",
    [
        "", "dog", "a dog on", "a dog on a table", "a happy dog", "a dog a key", "a dogs house", "five dogs",
        "a dog and a dog", "two dogs left of a key", "a dog left of a key above a bell",
        "a dog and a key left of a bell", "a dog, a key, a bell and an apple",
        "a dog on a green background a key",
    ],
)  # fmt: skip
def test_other_sentences_are_not_read(text):
    assert read_caption(text, GROUNDS) is None
