"""The picture on its way in a terminal: where it is drawn, where not, and that it is the picture."""

import io

import numpy as np
import pytest
from rich.console import Console

from sjd2_lightning.cli.preview import PictureProgress, Preview, half_blocks
from sjd2_lightning.decoding import decode
from tests.tools.small_evaluation import METHODS, SIDE, small_backbone


def console(**settings) -> Console:
    wanted = {"force_terminal": True, "color_system": "truecolor", "width": 80, "height": 24} | settings
    return Console(file=io.StringIO(), _environ={}, **wanted)


def test_half_blocks_are_the_pixels():
    picture = np.full((4, 2, 4), 255, np.uint8)
    picture[0, 0] = (10, 20, 30, 255)
    picture[1, 0] = (40, 50, 60, 255)
    picture[2, 1] = (0, 0, 0, 0)  # nothing: the ground shows
    segments = list(half_blocks(picture, 80, 40).segments)
    assert [segment.text for segment in segments] == ["▀", "▀", "\n"] * 2
    assert segments[0].style.color.triplet == (10, 20, 30)
    assert segments[0].style.bgcolor.triplet == (40, 50, 60)
    assert segments[4].style.color.triplet == (255, 255, 255)


@pytest.mark.parametrize("size", [(64, 64), (720, 720), (48, 96), (96, 48)])
def test_it_fits_the_terminal(size):
    lines = "".join(s.text for s in half_blocks(np.zeros((*size, 4), np.uint8), 80, 42).segments).splitlines()
    assert 1 < len(lines) <= 21
    assert len({len(line) for line in lines}) == 1
    assert len(lines[0]) <= 64
    assert len(lines[0]) / (2 * len(lines)) == pytest.approx(size[1] / size[0], rel=0.05)


@pytest.mark.parametrize(
    ("settings", "shown"),
    [
        ({}, True),
        ({"color_system": "256"}, True),
        ({"color_system": "standard"}, False),
        ({"force_terminal": False}, False),
        ({"width": 20}, False),
        ({"height": 10}, False),
    ],
)
def test_only_where_it_can_be_seen(settings, shown):
    assert PictureProgress(console(**settings)).has_room == shown


def test_a_file_gets_no_byte():
    out = console(force_terminal=False)
    with PictureProgress(out) as progress:
        progress.add_task("tokens", total=2)
        progress.update(progress.task_ids[0], advance=1)
    assert out.file.getvalue() == ""


def test_frames_are_drawn_now_and_then_and_their_time_is_known():
    """The clock goes on by 0.06 s at each look: a frame takes that, and the next waits for 0.3 s."""
    now = [0.0]

    def clock() -> float:
        now[0] += 0.06
        return now[0]

    backbone = small_backbone()
    layout = backbone.layout(SIDE, SIDE)
    out = console()
    shown = []
    with PictureProgress(out) as progress:
        preview = Preview(progress, backbone, layout, clock)
        show = progress.show
        progress.show = lambda picture: (shown.append(picture), show(picture))
        decode(backbone, ["red cat"], [7], METHODS["sjd2"], layout, preview)
    assert 1 < len(shown) < preview.seen.num_passes
    assert shown[0].shape == (*layout.pixels, 4)
    assert preview.seconds == pytest.approx(0.06 * (preview.seen.num_passes + len(shown)))
    assert "▀" in out.file.getvalue()
