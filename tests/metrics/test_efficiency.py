"""Timing and memory: what is inside the clock, and that the device is waited for."""

import time

import torch

from sjd2_lightning.metrics import efficiency
from sjd2_lightning.metrics.efficiency import peak_memory, timed


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
