"""Pictures on the way: what stands is whole, drafts are faint, the rest empty; the last one is the image."""

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

from sjd2_lightning.models.image_tokenizer import to_uint8
from sjd2_lightning.playground.frames import data_url, draw, sides
from sjd2_lightning.playground.offer import single
from sjd2_lightning.playground.race import Race
from sjd2_lightning.report.observe import OUTSIDE, Moment
from tests.tools.small_evaluation import METHODS, SIDE, small_backbone


@pytest.fixture(scope="module")
def backbone():
    return small_backbone()


@pytest.fixture(scope="module")
def race(backbone):
    methods = {name: METHODS[name] for name in ("ar", "sjd2")}
    race = Race(backbone, single("red cat", 7), methods, backbone.layout(SIDE, SIDE))
    race.run(lambda: False)
    return race


def pixels(url: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))))


def test_opacity_says_what_stands(backbone):
    guesses = np.array([1] * 5 + [2] * 4 + [OUTSIDE] * 7)
    levels = np.array([OUTSIDE] * 5 + [0, 0, 1, 1] + [OUTSIDE] * 7)
    found, blank = draw(backbone, [Moment(guesses, levels, 5), None], backbone.layout(SIDE, SIDE))
    codes = found[::2, ::2, 3].flatten()  # two pixels a code
    assert codes.tolist() == [255] * 5 + [115] * 2 + [64] * 2 + [0] * 7
    assert not blank.any()
    assert blank.shape == found.shape == (SIDE, SIDE, 4)


def test_the_last_frame_is_the_image(backbone, race):
    for runner, side in zip(race.runners, sides(race), strict=True):
        ids = torch.tensor(runner.image_ids).view(1, 4, 4)
        image = to_uint8(backbone.decode_images(ids).detach())[0].numpy()
        assert (pixels(side.picture)[..., :3] == image).all()
        assert (pixels(side.picture)[..., 3] == 255).all()
        assert (side.done, side.committed, side.passes) == (True, 1.0, runner.seen.num_passes)
        assert side.seconds == runner.clock[-1]


def test_any_pass_can_be_looked_at_again(race):
    start = sides(race, 0)
    assert [(side.passes, side.committed, side.done) for side in start] == [(0, 0.0, False)] * 2
    shares = [[side.committed for side in sides(race, place)] for place in range(20)]
    assert np.diff(shares, axis=0).min() >= 0
    assert shares[3][0] == 3 / 16
    late = sides(race, 15)
    assert [side.done for side in late] == [False, True], "the faster one stays at its end"
    assert late[0].seconds == race.runners[0].clock[15]


def test_a_large_picture_is_made_smaller_until_it_is_whole():
    picture = np.zeros((768, 512, 4), np.uint8)
    assert pixels(data_url(picture, whole=True)).shape == (768, 512, 4)
    small = data_url(picture, whole=False)
    assert small.startswith("data:image/webp")
    assert Image.open(io.BytesIO(base64.b64decode(small.partition(",")[2]))).size == (341, 512)
