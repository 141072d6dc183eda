"""Scenes in an evaluation: prompts with what they ask for, real scenes with the same keys, and the judge."""

from collections import Counter
from dataclasses import asdict

import pytest
import torch

from sjd2_lightning.data.sources.nouns import EVERYDAY, load_objects
from sjd2_lightning.data.sources.scenes import PROMPT_CATEGORIES, Variety
from sjd2_lightning.evaluation.prompts import PromptItem, check_prompts, repeat_prompts
from sjd2_lightning.evaluation.quality import QualityMeter, QualityMetrics, judged_less
from sjd2_lightning.evaluation.scene_judge import scene_judge, scene_prompts, scene_reference, with_asked

FEW = Variety(24, True)


@pytest.fixture(scope="module")
def meter():
    metrics = QualityMetrics(judge=scene_judge(128), num_resamples=50)
    return QualityMeter(metrics, scene_reference(128, 24, variety=FEW))


def test_prompts_are_equally_many_of_each_category():
    prompts = scene_prompts(12, variety=FEW)
    assert set(Counter(item.asked.category for item in prompts).values()) == {2}
    assert "names" not in {item.asked.category for item in prompts}, "of few nouns most names are unknown"
    assert [item.asked.category for item in scene_prompts(7)] == list(PROMPT_CATEGORIES)
    assert scene_prompts(4, variety=FEW) == prompts[:4], "a longer list begins with the shorter one"
    assert prompts[0].identity == {name: asdict(prompts[0])[name] for name in ("key", "prompt", "seed")}
    few = scene_prompts(12, variety=Variety(12, True))
    unknown = {item.noun for item in load_objects()} - set(EVERYDAY[:12])
    assert not [item for item in few if set(item.prompt.split()) & unknown]
    check_prompts(few)
    assert [item.asked for item in repeat_prompts(prompts[:1], 2)] == [prompts[0].asked] * 2


def test_more_prompts_than_can_be_made_in_seconds_are_refused():
    for number in (0, 1_000_000):
        with pytest.raises(ValueError, match=f"num_prompts is {number}: ask for 1 to 10000 scenes"):
            scene_prompts(number)


def test_real_scenes_are_those_of_the_prompts():
    prompts, reference = scene_prompts(6, variety=FEW), scene_reference(64, 10, variety=FEW)
    part = reference.matching(prompts)
    assert part.keys == tuple(item.key for item in prompts)
    assert part.asked == tuple(item.asked for item in prompts)
    assert part.images.shape == (6, 64, 64, 3)


def test_typed_prompts_are_judged_where_the_grammar_reads_them():
    prompts = with_asked([PromptItem("a", "two dogs on a green background", 1), PromptItem("b", "a poem", 2)])
    assert (prompts[0].asked.objects, prompts[0].asked.ground) == ({"dog": 2}, "green")
    assert prompts[0].asked.category == "counting"
    assert prompts[1].asked is None


def test_images_are_judged_by_what_their_prompts_ask_for(meter):
    reference = meter.reference
    images = list(reference.images)
    real = meter.measure(images, reference.captions, reference.asked)
    assert real.measured["judge"].value == real.measured["judge_position"].value == 1
    categories = [name for name in PROMPT_CATEGORIES if name != "names"]
    assert set(real.measured) == {"judge", *(f"judge_{name}" for name in categories)}
    wrong = [images[0], *[torch.full_like(image, 200) for image in images[1:]]]
    shown = meter.measure(wrong, reference.captions, reference.asked)
    assert shown.measured["judge"].value == pytest.approx(1 / 24)
    assert shown.verdicts[0].right
    assert "0 of" in shown.verdicts[1].sentence
    less = judged_less(shown.verdicts, real.verdicts, 50)["judge_minus_ar"]
    assert less.value == pytest.approx(1 / 24 - 1)
    assert less.interval[0] <= less.value <= less.interval[1] < 0


def test_images_without_what_is_asked_are_not_judged(meter):
    images, captions = list(meter.reference.images)[:2], meter.reference.captions[:2]
    assert not meter.measure(images, captions).measured
    half = meter.measure(images, captions, (None, meter.reference.asked[1]))
    assert half.measured["judge"].num_images == 1
    assert half.verdicts[0] is None
    assert judged_less((), (), 10) == {}
