"""The judge of scenes: what it sees, what it calls wrong, and how its shares are reported."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from benchmarks.judge import blobs, blurred, noisy, shuffled, stranger_of
from sjd2_lightning.data.sources.scene_pixels import GROUND_COLOURS, cut_outs
from sjd2_lightning.data.sources.scenes import Scene, held_out_scenes
from sjd2_lightning.metrics.judge import Asked, Found, Judge, Verdict, difference, summary
from sjd2_lightning.metrics.segmentation import box_of, distance, fitted_ground, pieces

GROUNDS = {"grey": ((200, 200, 200), (120, 120, 120)), "yellow": ((255, 245, 150), (250, 215, 60))}
INK = {"disc": (220, 30, 40, 255), "square": (40, 60, 200, 255), "wedge": (20, 120, 40, 255)}


def shape(name: str, side: int = 64) -> Image.Image:
    """One of three simple pictures, opaque from edge to edge."""
    picture = Image.new("RGBA", (side, side))
    draw = ImageDraw.Draw(picture)
    if name == "disc":
        draw.ellipse((0, 0, side - 1, side - 1), fill=INK[name])
    elif name == "square":
        draw.rectangle((0, 0, side - 1, side - 1), fill=INK[name])
        draw.rectangle((side // 4, side // 4, side * 3 // 4, side * 3 // 4), fill=(250, 250, 255, 255))
    else:
        draw.polygon(((0, side - 1), (side // 2, 0), (side - 1, side - 1)), fill=INK[name])
    return picture


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge({name: np.asarray(shape(name)) for name in INK}, GROUNDS)


def drawn(*places: tuple[str, int, int, int], ground: str = "grey", size: int = 128) -> np.ndarray:
    """An image (1, size, size, 3) of shapes: name, left, top, side in 128ths."""
    canvas = Image.new("RGBA", (size, size), (*GROUNDS[ground][0], 255))
    for name, left, top, side in places:
        left, top, side = (value * size // 128 for value in (left, top, side))
        canvas.alpha_composite(shape(name, side), (left, top))
    return np.asarray(canvas.convert("RGB"))[None]


DISC, SQUARE, BELOW = ("disc", 10, 40, 30), ("square", 80, 44, 34), ("square", 12, 84, 34)
ONE = Asked("single", {"disc": 1})
LEFT = Asked("position", {"disc": 1, "square": 1}, ("disc", "left of", "square"))


@pytest.mark.parametrize(
    ("places", "ground", "asked", "wrong"),
    [
        ([DISC], "grey", ONE, None),
        ([SQUARE], "grey", ONE, r"0 of 'disc', not 1; shows also square"),
        ([], "grey", ONE, r"0 of 'disc', not 1"),
        ([DISC, SQUARE], "grey", ONE, r"shows also square"),
        ([DISC, SQUARE], "grey", Asked("two", {"square": 1, "disc": 1}), None),
        ([DISC, ("disc", 70, 20, 40)], "grey", Asked("counting", {"disc": 2}), None),
        ([DISC, ("disc", 70, 20, 40)], "grey", Asked("counting", {"disc": 3}), r"2 of 'disc', not 3"),
        ([DISC, SQUARE], "grey", LEFT, None),
        ([DISC, SQUARE], "grey", replace(LEFT, relation=("square", "right of", "disc")), None),
        ([DISC, SQUARE], "grey", replace(LEFT, relation=("disc", "right of", "square")), r"not right of"),
        ([DISC, SQUARE], "grey", replace(LEFT, relation=("disc", "above", "square")), r"not above"),
        ([DISC, BELOW], "grey", replace(LEFT, relation=("disc", "above", "square")), None),
        ([DISC, BELOW], "grey", replace(LEFT, relation=("square", "below", "disc")), None),
        ([DISC], "grey", LEFT, r"0 of 'square', not 1; cannot tell whether 'disc' is left of 'square'"),
        ([DISC], "grey", replace(ONE, ground="grey"), None),
        ([DISC], "yellow", replace(ONE, ground="grey"), r"the ground is yellow, not grey"),
        ([DISC], "grey", replace(ONE, sizes={"disc": "small"}), None),
        ([DISC], "grey", replace(ONE, sizes={"disc": "large"}), r"'disc' is not large: 0.2\d of the image"),
        ([("disc", 20, 20, 80)], "grey", replace(ONE, sizes={"disc": "large"}), None),
        ([("disc", 20, 20, 80)], "grey", replace(ONE, sizes={"disc": "small"}), r"not small"),
        ([], "grey", replace(ONE, sizes={"disc": "small"}), r"0 of 'disc', not 1"),
    ],
)
def test_verdicts(
    judge: Judge, places: list[tuple[str, int, int, int]], ground: str, asked: Asked, wrong: str | None
) -> None:
    (verdict,) = judge(drawn(*places, ground=ground), [asked])
    assert verdict.right == (wrong is None)
    if wrong is None:
        assert verdict.wrong == ()
    else:
        assert re.search(wrong, "; ".join(verdict.wrong))


def test_what_it_sees(judge: Judge) -> None:
    found, ground = judge.see(drawn(DISC, SQUARE, ground="yellow")[0])
    assert [item.name for item in found] == ["disc", "square"]
    assert ground == "yellow"
    assert np.abs(np.array([item.box for item in found]) - [[10, 40, 40, 70], [80, 44, 114, 78]]).max() <= 2
    assert min(item.score for item in found) > 0.9


def test_a_smear_is_nothing_known(judge: Judge) -> None:
    image = drawn()
    image = image.copy()
    image[0, 30:90, 30:90] = np.random.default_rng(0).integers(0, 255, (60, 60, 3))
    (verdict,) = judge(image, [ONE])
    assert [item.name for item in verdict.found] == [None]
    assert "shows also something unknown" in verdict.wrong


@pytest.mark.parametrize("size", [64, 256])
def test_other_sizes(size: int) -> None:
    other = Judge({name: np.asarray(shape(name)) for name in INK}, GROUNDS, size)
    (verdict,) = other(drawn(DISC, SQUARE, size=size), [replace(LEFT, sizes={"disc": "small"})])
    assert verdict.right


def test_tensors_and_plain_values_are_taken(judge: Judge) -> None:
    plain = {
        "category": "position",
        "objects": {"disc": 1, "square": 1},
        "ground": None,
        "caption": "ignored",
    }
    asked = Asked.of({**plain, "relation": ["disc", "left of", "square"], "sizes": {}})
    assert asked == LEFT
    assert judge(torch.from_numpy(drawn(DISC, SQUARE).copy()), [asked])[0].right


# Segmentation


@pytest.mark.parametrize("noise", [0, 12])
def test_the_ground_is_continued_from_the_rim(noise: int) -> None:
    rows = np.linspace(60, 180, 96)[:, None, None]
    truth = np.broadcast_to(rows + np.array([0, 10, 20]), (96, 96, 3))
    image = truth + np.random.default_rng(0).normal(0, noise, truth.shape)
    image[20:60, 60:] = (250, 0, 0)  # an object that touches the edge
    ground, off = fitted_ground(image.clip(0, 255).astype(np.uint8))
    assert np.abs(ground - truth).max() < 2 + noise / 2
    assert off < 1 + 2 * noise


def test_pieces_are_apart_and_specks_and_faint_ones_are_left_out() -> None:
    away = np.zeros((128, 128), np.float32)
    away[10:40, 10:40] = 200  # one object
    away[10:40, 42:60] = 200  # and its second part, two pixels away
    away[80:110, 20:50] = 90
    away[80:110, 60:90] = 30  # faint
    away[5:10, 100:105] = 255  # a speck
    boxes = [box_of(piece) for piece in pieces(away, 22, 2)]
    assert boxes == [(10, 10, 60, 40), (20, 80, 50, 110)]


def test_distance_is_that_of_the_channel_that_differs_most() -> None:
    image = np.full((9, 9, 3), 100, np.uint8)
    image[..., 1] = 160
    assert np.allclose(distance(image, np.full((9, 9, 3), 100, np.float32)), 60)


# Errors


@pytest.mark.parametrize(
    ("images", "asked", "message"),
    [
        (np.zeros((0, 128, 128, 3), np.uint8), [], r"there is no image to judge"),
        (np.zeros((1, 0, 0, 3), np.uint8), [ONE], r"the batch or the image is empty"),
        (np.zeros((1, 64, 64, 3), np.uint8), [ONE], r"shape \(1, 64, 64, 3\); .* \(N, 128, 128, 3\)"),
        (np.zeros((1, 128, 128, 3), np.float32), [ONE], r"dtype float32"),
        (np.zeros((128, 128, 3), np.uint8), [ONE], r"shape \(128, 128, 3\)"),
        (np.zeros((2, 128, 128, 3), np.uint8), [ONE], r"2 images against 1 prompts"),
        (
            drawn(),
            [Asked("single", {"ghost": 1})],
            r"prompt 0 asks for 'ghost', of which there is no picture",
        ),
        (drawn(), [replace(ONE, sizes={"ghost": "large"})], r"asks for 'ghost'"),
        (drawn(), [replace(LEFT, relation=("disc", "above", "ghost"))], r"asks for 'ghost'"),
        (drawn(), [replace(ONE, ground="mauve")], r"a ground of unknown colour 'mauve'"),
    ],
)
def test_errors(judge: Judge, images: np.ndarray, asked: list[Asked], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        judge(images, asked)


def test_a_picture_without_opacity_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"picture 'disc' has shape \(8, 8, 3\), it must be uint8 \(h, w, 4\)"
    ):
        Judge({"disc": np.zeros((8, 8, 3), np.uint8)}, GROUNDS)


def test_a_picture_that_nothing_tells_from_others_is_refused() -> None:
    with pytest.raises(ValueError, match=r"picture 'tile' is one colour from edge to edge"):
        Judge({"tile": np.full((8, 8, 4), 255, np.uint8)}, GROUNDS)


# Reports


def verdict(category: str, right: bool) -> Verdict:
    return Verdict(
        Asked(category, {"disc": 1}), (Found("disc", 1.0, (0, 0, 9, 9)),), "grey", () if right else ("x",)
    )


def test_summary_is_the_share_of_right_images_and_overall_leaves_names_out() -> None:
    found = summary([verdict("two", i % 4 > 0) for i in range(40)] + [verdict("names", False)] * 10)
    assert {name: result.value for name, result in found.items()} == {
        "two": 0.75,
        "names": 0.0,
        "overall": 0.75,
    }
    low, high = found["two"].interval or (0, 0)
    assert 0.55 < low < 0.75 < high < 0.92
    assert (found["two"].name, found["two"].num_images) == ("judge_two", 40)
    assert "overall" not in summary([verdict("names", True)])
    with pytest.raises(ValueError, match=r"there is no verdict"):
        summary([])


def test_differences_are_paired() -> None:
    first = [verdict("two", True) for _ in range(30)]
    second = [verdict("two", i % 3 > 0) for i in range(30)]
    found = difference(first, second)["overall"]
    assert found.value == pytest.approx(1 / 3)
    assert (found.interval or (0, 0))[0] > 0.1
    assert difference(second, second)["two"].interval == (0, 0), "the same images differ by nothing"
    with pytest.raises(ValueError, match=r"not of the same prompts"):
        difference(first, [verdict("single", True)] * 30)


# Real scenes


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return held_out_scenes(20, seed=3)


@pytest.fixture(scope="module")
def images(scenes: list[Scene]) -> np.ndarray:
    return np.stack([scene.image() for scene in scenes])


@pytest.fixture(scope="module")
def scene_judge() -> Judge:
    return Judge({noun: np.asarray(picture) for noun, picture in cut_outs().items()}, GROUND_COLOURS)


def share_right(judge: Judge, images: np.ndarray, scenes: list[Scene]) -> float:
    verdicts = judge(images, [Asked.of(scene.facts()) for scene in scenes])
    return float(np.mean([each.right for each in verdicts]))


def test_real_scenes_are_right_and_captions_of_others_are_wrong(
    scene_judge: Judge, images: np.ndarray, scenes: list[Scene]
) -> None:
    assert share_right(scene_judge, images, scenes) >= 0.97
    others = [scenes[stranger_of(scenes, number)] for number in range(len(scenes))]
    assert share_right(scene_judge, images, others) <= 0.03


def test_no_image_passes_by_its_colours_alone(
    scene_judge: Judge, images: np.ndarray, scenes: list[Scene]
) -> None:
    """The negative control that a bag of patches fails."""
    flat = np.broadcast_to(images.mean((1, 2), keepdims=True).astype(np.uint8), images.shape)
    assert share_right(scene_judge, flat, scenes) == 0
    assert share_right(scene_judge, shuffled(images, 16), scenes) <= 0.03
    assert share_right(scene_judge, blobs(images, scenes), scenes) <= 0.1


def test_small_flaws_are_forgiven_and_large_ones_are_not(
    scene_judge: Judge, images: np.ndarray, scenes: list[Scene]
) -> None:
    assert share_right(scene_judge, blurred(images, 1), scenes) >= 0.95
    assert share_right(scene_judge, noisy(images, 10), scenes) >= 0.95
    assert share_right(scene_judge, blurred(images, 8), scenes) <= 0.3
