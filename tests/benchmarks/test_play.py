"""The lag of the page is counted from the first pass that it did not show yet."""

from importlib import import_module

import pytest


def test_lag_is_the_age_of_the_oldest_pass_that_was_missing():
    play = import_module("benchmarks.play")
    finished = [[1.0, 1.1, 1.2, 1.3], [1.05, 1.25]]
    shown = [(0.0, [0, 0]), (1.15, [2, 1]), (1.2, [2, 1]), (1.5, [4, 2])]
    assert play.lags(shown, finished) == pytest.approx([0.15, 0.3])
