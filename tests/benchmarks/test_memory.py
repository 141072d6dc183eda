"""Bytes of tensors: what is alive, what was at most, and what does not count."""

import pytest
import torch

from benchmarks.memory import LiveBytes


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.enable_grad])
def test_bytes_are_counted_until_the_last_view_is_gone(mode):
    old = torch.zeros(1000)
    with mode(), LiveBytes() as live:
        made = old + 1
        assert (live.now, live.peak) == (4000, 4000)
        view = made.view(10, 100)[2:]
        del made
        assert live.now == 4000, "a view keeps all of it"
        pair = torch.ones(100).sort()
        assert live.now == 4000 + 100 * (4 + 8), "both results; the input is gone"
        assert live.peak == live.now + 400
        del view, pair
        assert live.now == 0
        assert live.peak == 4000 + 1600


def test_what_was_there_before_does_not_count():
    old = torch.zeros(1000)
    with LiveBytes() as live:
        old.add_(1)
        kept = old.view(10, 100)
        again = kept.T
    assert (live.now, live.peak) == (0, 0)
    assert again.shape == (100, 10)


def test_nothing_is_counted_behind_the_block():
    with LiveBytes() as live:
        kept = torch.ones(10)
    other = torch.ones(99)
    assert (live.now, live.peak) == (40, 40)
    del kept, other
    assert live.now == 0
