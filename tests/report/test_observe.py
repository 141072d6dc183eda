"""Trajectories: they end in the image of the record, and settle when the slow definition says so."""

import numpy as np
import pytest

from sjd2_lightning.decoding.loop import decode
from sjd2_lightning.report.observe import (
    MAX_FRAME_PX,
    OUTSIDE,
    Replay,
    TrajectoryObserver,
    replay,
    settling,
    shown_passes,
    sprite,
    trace,
)
from tests.tools.small_evaluation import METHODS, PROMPTS, SIDE, small_backbone


@pytest.fixture(scope="module")
def backbone():
    return small_backbone()


@pytest.fixture(scope="module")
def trajectories(backbone):
    return trace(backbone, METHODS, PROMPTS[:2], backbone.layout(SIDE, SIDE))


def test_they_end_in_the_image_that_was_recorded(trajectories, result):
    assert len(trajectories) == 2 * len(METHODS)
    for trajectory in trajectories:
        (record,) = [r for r in result.methods[trajectory.method].records if r.key == trajectory.item.key]
        assert tuple(trajectory.image_ids.tolist()) == record.image_ids
        assert trajectory.num_passes == record.nfe
        assert tuple(trajectory.committed.tolist()) == record.settled_iteration


def test_settling_is_what_its_definition_says(trajectories):
    for trajectory in trajectories:
        guesses, final = trajectory.guesses, trajectory.image_ids
        for code in range(len(final)):
            settled = trajectory.num_passes
            while settled and guesses[settled - 1, code] == final[code]:
                settled -= 1
            assert trajectory.settled[code] == settled
            assert guesses[trajectory.entered[code], code] != OUTSIDE
        assert (trajectory.entered <= trajectory.settled).all()
        assert (trajectory.lead >= 0).all()


def test_levels_are_of_the_window_alone(trajectories):
    for trajectory in trajectories:
        before = np.concatenate([[0], trajectory.num_committed[:-1]])
        codes = np.arange(len(trajectory.image_ids))
        window = (codes >= before[:, None]) & (codes < trajectory.num_seen[:, None])
        assert ((trajectory.levels != OUTSIDE) == window).all()
        assert trajectory.levels.max() == METHODS[trajectory.method].num_levels


def test_summary_of_settling(trajectories):
    found = settling(trajectories)
    assert list(found) == list(METHODS)
    assert (found["ar"].mean_lead, found["ar"].first_guess, found["ar"].ahead) == (0, 1, (1.0,))
    for summary in found.values():
        assert summary.ahead[0] == 1
        assert list(summary.ahead) == sorted(summary.ahead, reverse=True)
        assert summary.mean_lead == pytest.approx(sum(summary.ahead[1:]))


def test_a_trajectory_is_of_one_image(backbone):
    layout = backbone.layout(SIDE, SIDE)
    with pytest.raises(ValueError, match="single prompt"):
        decode(backbone, ["red", "cat"], [1, 2], METHODS["sjd"], layout, TrajectoryObserver(layout))


def test_frames_are_few_and_reach_from_the_first_pass_to_the_last(backbone, trajectories, result):
    assert shown_passes(271, 5) == (0, 68, 135, 202, 270)
    assert shown_passes(3, 64) == (0, 1, 2)
    assert shown_passes(1, 2) == (0,)
    found = replay(backbone, trajectories[0], 7)
    assert len(found.frames) == len(found.passes) == 7
    image = result.store.images(result.methods["ar"].records[:1])[0].numpy()
    assert (found.frames[-1] == image).all()
    sheet, in_row = sprite(found)
    assert in_row == 3
    assert sheet[8:12] == b"WEBP"


def test_frames_of_large_images_are_made_smaller(trajectories):
    class Large:
        device = "cpu"

        def decode_images(self, image_ids, layout):
            import torch

            return torch.full((len(image_ids), 3, 768, 512), 0.5)

    found = replay(Large(), trajectories[0], 2)
    assert isinstance(found, Replay)
    assert found.frames.shape == (2, MAX_FRAME_PX, MAX_FRAME_PX * 512 // 768 + 1, 3)
