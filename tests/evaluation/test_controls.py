"""Controls of metrics: what cannot tell real images from nonsense is not shown, and a sentence says so."""

import dataclasses

import numpy as np
import pytest
import torch

from sjd2_lightning.data.sources.scenes import Variety
from sjd2_lightning.evaluation.controls import altered_copies, judge_control, scorer_control
from sjd2_lightning.evaluation.quality import QualityMeter, QualityMetrics
from sjd2_lightning.evaluation.scene_judge import scene_judge, scene_reference
from sjd2_lightning.metrics.alignment import load_clip_scorer
from tests.tools.small_evaluation import fake_clip, reference_set


@pytest.fixture(scope="module")
def scenes():
    return scene_reference(128, 24, variety=Variety(24, True))


def test_a_judge_that_sees_passes(scenes):
    control = judge_control(scene_judge(128), scenes, 20)
    assert control.passed
    assert (control.measured["own"].value, control.measured["others"].value) == (1, 0)
    assert "24 real scenes are 100.0 % right by their own captions and 0.0 %" in control.sentence


def test_a_judge_that_calls_everything_right_or_wrong_is_not_shown(scenes):
    def sure(right):
        judge = scene_judge(128)
        found = judge(scenes.images[:1], scenes.asked[:1])[0]
        wrong = () if right else ("all",)
        return lambda images, asked: [dataclasses.replace(found, asked=a, wrong=wrong) for a in asked]

    for right in (True, False):
        control = judge_control(sure(right), scenes, 20)
        assert not control.passed
        assert control.sentence.startswith("judge is not shown: 24 real scenes are")
        meter = QualityMeter(QualityMetrics(judge=sure(right), num_resamples=20), scenes)
        assert not meter.measure(list(scenes.images), scenes.captions, scenes.asked).measured


def test_copies_have_the_same_colours_and_other_places():
    image = torch.randint(0, 256, (64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    copies = dict(altered_copies([image]))
    flat = copies.pop("the mean colour alone")[0]
    assert len({tuple(pixel) for pixel in flat.reshape(-1, 3).tolist()}) == 1
    assert len(copies) == 3
    for name, (copy,) in copies.items():
        assert not copy.equal(image), name
        assert copy.reshape(-1).sort()[0].equal(image.reshape(-1).sort()[0])


def test_the_shipped_scorer_sees_more_than_patches(tiny_weights):
    clip = load_clip_scorer(tiny_weights / "clip")
    control = scorer_control(clip, "", scene_reference(128, 140, variety=Variety(32, True)), 200)
    shuffled = [control.measured[f"shuffled blocks of {side} px"] for side in (8, 16, 32)]
    margin = 0.1 * control.measured["real"].value
    assert control.passed == all(less.interval[0] > margin for less in shuffled)
    assert control.passed


def test_a_scorer_that_sees_is_shown_and_one_of_colours_is_not(tmp_path):
    reference = reference_set()
    assert scorer_control(fake_clip(), "w", reference, 50).passed
    metrics = QualityMetrics(clip=fake_clip(knows=False), num_resamples=50)
    meter = QualityMeter(metrics, reference)
    (control,) = meter.controls
    assert not control.passed
    assert "clip_score_fake is not shown: its gain is" in control.sentence
    assert "shuffled blocks of 8 px" in control.sentence
    found = meter.measure(list(reference.images), reference.captions)
    assert (found.measured, found.clip_scores) == ({}, ())


def test_without_captions_a_scorer_is_not_shown():
    bare = dataclasses.replace(reference_set(), captions=("",) * 12)
    assert "no real images with captions" in scorer_control(fake_clip(), "", bare).sentence


def test_gains_are_kept_under_what_decides_them(tmp_path):
    reference, clip = reference_set(), fake_clip()
    first = scorer_control(clip, "w", reference, 50, tmp_path)
    clip.model.encode_image = None  # not asked again
    assert scorer_control(clip, "w", reference, 50, tmp_path) == first
    with pytest.raises(TypeError):
        scorer_control(clip, "other", reference, 50, tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_text("{")
    again = scorer_control(fake_clip(), "w", reference, 50, tmp_path)
    assert np.isclose(again.measured["real"].value, first.measured["real"].value)
