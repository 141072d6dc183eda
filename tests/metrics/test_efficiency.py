"""Timing: what is inside the clock, how it is summarised, and that the device is waited for."""

import time

import numpy as np
import pytest
import torch

from sjd2_lightning.metrics import efficiency
from sjd2_lightning.metrics.efficiency import (
    latency_summary,
    peak_memory,
    speedup_result,
    time_inside,
    timed,
    warm_up,
)


def test_timed_gives_result_and_seconds():
    found, seconds = timed(lambda: (time.sleep(0.05), 7)[1])
    assert found == 7
    assert 0.05 <= seconds < 0.5


def test_device_is_emptied_before_and_after_every_timing(monkeypatch):
    events = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: events.append("wait"))
    timed(lambda: events.append("work"), device="cuda")
    assert events == ["wait", "work", "wait"]
    events.clear()
    timed(lambda: events.append("work"), device="cpu")
    assert events == ["work"]


def test_warm_up_calls_and_waits(monkeypatch):
    events = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: events.append("wait"))
    warm_up(lambda: events.append("work"), 2, device="cuda")
    assert events == ["work", "work", "wait"]


def test_time_inside_watches_what_it_names_and_leaves_no_trace():
    class Sleeper(torch.nn.Module):
        def forward(self, seconds):
            time.sleep(seconds)
            return seconds

        def idle(self):
            time.sleep(0.05)

    sleeper = Sleeper()
    with time_inside(sleeper, "forward") as inside:
        assert sleeper(0.03) == 0.03
        sleeper.idle()
        sleeper(seconds=0.03)
    assert 0.06 <= inside.seconds < 0.1
    assert "forward" not in vars(sleeper)
    with pytest.raises(ZeroDivisionError), time_inside(sleeper, "idle"):
        1 / 0  # noqa: B018
    assert "idle" not in vars(sleeper)


def test_summary():
    summary = latency_summary(np.arange(1, 102) / 10)
    assert (summary.median, summary.p95, summary.num_calls) == (pytest.approx(5.1), pytest.approx(9.6), 101)
    assert summary.mean == pytest.approx(5.1)
    with pytest.raises(ValueError, match="at least one call"):
        latency_summary([])


def test_speedup_is_a_ratio_of_totals_paired_by_prompt():
    prompts = np.random.default_rng(0).uniform(1, 10, 30)
    result = speedup_result(3 * prompts, prompts)
    assert result.value == pytest.approx(3)
    assert result.interval == pytest.approx((3, 3))  # exact pairing leaves no spread; unpaired it would
    assert (result.name, result.num_images) == ("speedup", 30)
    with pytest.raises(ValueError, match="pair them"):
        speedup_result([1.0, 2.0], [1.0])


def test_peak_memory(monkeypatch):
    with peak_memory("cpu") as peak:
        torch.ones(10)
    assert peak.num_bytes is None
    events = []
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda device, name=name: events.append(name))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 123)
    with peak_memory("cuda") as peak:
        events.append("work")
    assert (peak.num_bytes, events) == (
        123,
        ["synchronize", "reset_peak_memory_stats", "work", "synchronize"],
    )
    assert efficiency.PeakMemory().num_bytes is None
