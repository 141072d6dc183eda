"""Time inside methods: only the named ones count, and no trace is left."""

import time

import pytest
import torch

from benchmarks.timing import time_inside


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
