"""`window=auto` on invented costs: which window it takes, what it asks of the model, what it keeps."""

import json
from dataclasses import replace

import pytest
import torch

from sjd2_lightning.decoding import DecodeStats, DecodingConfig, Sampling, decode
from sjd2_lightning.evaluation import auto_window
from sjd2_lightning.evaluation.auto_window import (
    WindowChoice,
    choose_window,
    pass_seconds,
    resolve_windows,
    runs_of,
)
from tests.tools.small_evaluation import METHODS, PROMPTS, SIDE, broken_backbone, small_backbone

TEXTS = [item.prompt for item in PROMPTS[:3]]
SJD2 = replace(METHODS["sjd2"], sampling=Sampling(guidance_scale=2.0))


@pytest.fixture(scope="module")
def backbone():
    return small_backbone()


@pytest.fixture
def clock(monkeypatch):
    """A clock on which a pass of n tokens takes `fixed + per_token * n`; it notes rows and n of each."""

    class Clock:
        def __init__(self):
            self.fixed, self.per_token, self.passes = 1.0, 0.0, []

        def timed(self, call, device):
            rows, length = call()
            self.passes.append((rows, length))
            return None, self.fixed + self.per_token * length

    def one_pass(backbone, config, prompts, layout, window):
        call = real(backbone, config, prompts, layout, window)

        def said():
            call()
            return len(prompts), window

        return said

    it, real = Clock(), auto_window.one_pass
    monkeypatch.setattr(auto_window, "one_pass", one_pass)
    monkeypatch.setattr(auto_window, "timed", it.timed)
    return it


def test_most_slots_a_second_and_not_a_pass():
    slots, passes = {4: 40, 8: 70, 16: 80}, {4: 10, 8: 10, 16: 10}
    assert WindowChoice({4: 1.0, 8: 1.0, 16: 1.0}, slots, passes).window == 16
    assert WindowChoice({4: 1.0, 8: 1.7, 16: 2.1}, slots, passes).window == 8
    assert WindowChoice({4: 1.0, 8: 1.8, 16: 9.0}, slots, passes).window == 4, (
        "dearer by more than it commits"
    )
    choice = WindowChoice({16: 2.0, 4: 1.0}, slots, passes)
    assert choice.window == 4, "of equals the shortest"
    assert choice.committed == {4: 4.0, 16: 8.0}
    assert choice.summary()["slots_per_second"] == {"4": 4.0, "16": 4.0}
    assert WindowChoice.from_summary(json.loads(json.dumps(choice.summary()))).summary() == choice.summary()
    assert "window 4" in str(choice)
    for seconds, seen in (({}, passes), ({4: 1.0}, {}), ({4: 1.0}, {4: 0})):
        with pytest.raises(ValueError, match="at least one"):
            WindowChoice(seconds, slots, seen)


def test_an_images_last_pass_says_nothing_of_acceptance():
    assert runs_of(DecodeStats(torch.tensor([[3, 2], [2, 5], [4, 0]]))) == [3, 2, 2]
    assert runs_of(DecodeStats(torch.tensor([[9]]))) == [9], "unless it is the only one"


@pytest.mark.parametrize("config", [SJD2, replace(METHODS["ar"], window=1), METHODS["sjd2_paper"]])
def test_curve_times_the_passes_of_the_engine(backbone, clock, config):
    clock.per_token = 0.25
    layout = backbone.layout(SIDE, SIDE)
    seconds = pass_seconds(backbone, config, TEXTS, layout, (2, 4, 8), repeats=3)
    assert seconds == {2: 1.5, 4: 2.0, 8: 3.0}
    assert clock.passes == 3 * [(3, 2), (3, 4), (3, 8)], "windows take turns"


def test_the_cheap_window_and_the_long_one(backbone, clock):
    layout = backbone.layout(SIDE, SIDE)
    job = (backbone, SJD2, TEXTS, range(3), layout)
    flat = choose_window(*job, windows=(2, 4, 99))
    assert set(flat.seconds) == {2, 4}, "99 is longer than the image"
    for window in (2, 4):
        output = decode(backbone, TEXTS, range(3), replace(SJD2, window=window), layout)
        runs = runs_of(output.stats)
        assert (flat.slots[window], flat.passes[window]) == (sum(runs), len(runs))
    assert flat.window == 4
    clock.fixed, clock.per_token = 0.0, 1.0  # a token costs what it costs: drafting cannot pay
    assert choose_window(*job, windows=(1, 2, 4)).window == 1


def test_methods_get_windows_and_a_continued_run_keeps_them(backbone, clock, tmp_path, caplog):
    layout = backbone.layout(SIDE, SIDE)
    asked = {name: replace(METHODS[name], window="auto") for name in ("sjd", "sjd2")}
    job = (backbone, METHODS | asked, PROMPTS[:2], layout)
    with caplog.at_level("INFO"):
        methods, choices = resolve_windows(*job, windows=(2, 4), folder=tmp_path)
    assert list(choices) == ["sjd", "sjd2"]
    assert methods["sjd2"] == replace(METHODS["sjd2"], window=choices["sjd2"].window)
    assert methods["sjd2_paper"] == METHODS["sjd2_paper"]
    assert f"sjd2: window {choices['sjd2'].window}" in caplog.text
    num = len(clock.passes)
    assert resolve_windows(*job, windows=(2, 4), folder=tmp_path) == (methods, choices)
    assert len(clock.passes) == num, "kept"
    resolve_windows(*job, windows=(4, 8), folder=tmp_path)
    assert len(clock.passes) > num, "another question"
    assert resolve_windows(backbone, METHODS, PROMPTS, layout) == (METHODS, {})


def test_a_chosen_window_is_a_method_like_any_other(backbone, clock):
    choice = choose_window(backbone, SJD2, TEXTS, range(3), backbone.layout(SIDE, SIDE), windows=(2, 8))
    assert DecodingConfig("sjd2", choice.window, 1).problems() == []


def test_no_window_is_chosen_for_a_model_whose_numbers_are_not_finite():
    backbone = broken_backbone()
    with pytest.raises(ValueError, match=r"not finite at slot 0.*the weight \S*up_proj"):
        choose_window(backbone, SJD2, TEXTS, [1, 2, 3], backbone.layout(SIDE, SIDE), (4,), repeats=1)
