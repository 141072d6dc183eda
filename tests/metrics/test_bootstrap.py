"""Intervals: they cover what they promise, they are seeded, and pairing is used."""

import numpy as np
import pytest

from sjd2_lightning.metrics.bootstrap import (
    mean_result,
    paired_difference,
    ratio_of_totals,
    resample_counts,
    share_result,
)


def test_mean_interval_covers_the_true_mean():
    rng = np.random.default_rng(0)
    found = [
        mean_result("m", rng.exponential(size=60), "p", num_resamples=400, seed=trial) for trial in range(300)
    ]
    covered = np.mean([r.interval[0] <= 1.0 <= r.interval[1] for r in found])
    assert 0.88 <= covered <= 0.98  # 95 % aimed at; a skewed law and N = 60 cost two or three points


def test_ratio_interval_covers_the_true_ratio():
    rng = np.random.default_rng(1)
    covered = []
    for trial in range(200):
        prompt = rng.uniform(0.5, 2.0, 40)  # long and short prompts: what pairing takes out
        base, fast = 3 * prompt * rng.lognormal(0, 0.1, 40), prompt * rng.lognormal(0, 0.1, 40)
        low, high = ratio_of_totals("speedup", base, fast, "p", 300, trial).interval
        covered.append(low <= 3.0 <= high)
        assert high - low < 0.5
    assert 0.88 <= np.mean(covered) <= 0.99


def test_pairing_narrows_the_interval():
    rng = np.random.default_rng(2)
    shared = rng.normal(size=100)
    first, second = shared + 1 + 0.01 * rng.normal(size=100), shared + 0.01 * rng.normal(size=100)
    low, high = paired_difference("d", first, second, "p").interval
    assert low < 1 < high
    assert high - low < 0.02


def test_equal_methods_seldom_seem_to_differ():
    """False alarms: intervals that leave out 0 where the true difference is 0; 5 % aimed at."""
    rng = np.random.default_rng(4)
    alarms = []
    for trial in range(300):
        shared = rng.exponential(size=60)  # hard and easy prompts, skewed noise on top
        first, second = (shared + 0.3 * rng.exponential(size=60) for _ in range(2))
        low, high = paired_difference("d", first, second, "p", 400, trial).interval
        alarms.append(not low <= 0 <= high)
    assert 0.02 <= np.mean(alarms) <= 0.09


def test_same_seed_same_interval():
    values = np.random.default_rng(3).normal(size=50)
    one, same, other = (mean_result("m", values, "p", seed=seed).interval for seed in (0, 0, 1))
    assert one == same != other


def test_result_says_what_it_is():
    result = mean_result("clip_score_x", [1.0, 2.0, 3.0], "how", num_resamples=0)
    assert (result.name, result.value, result.interval, result.num_images) == ("clip_score_x", 2.0, None, 3)
    assert mean_result("m", [4.0], "p").interval is None
    assert mean_result("m", [4.0, 4.0], "p").interval == (4.0, 4.0)
    with pytest.raises(AttributeError):
        result.value = 0.0


def test_counts_are_resamples_of_every_item():
    counts = resample_counts(20, 500, 0)
    assert counts.shape == (500, 20)
    assert (counts.sum(1) == 20).all()
    assert abs(counts.mean() - 1) < 1e-9


def test_wilson_s_interval_holds_at_the_ends():
    found = share_result("s", [True] * 10, "p")
    assert found.value == 1
    assert found.interval == pytest.approx((1 / (1 + 1.959964**2 / 10), 1))
    low, high = share_result("s", [True, False] * 250, "p").interval
    assert 0.45 < low < 0.5 < high < 0.55


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: mean_result("m", [], "p"), "non-empty"),
        (lambda: share_result("s", [], "p"), "non-empty"),
        (lambda: mean_result("m", [1.0, float("nan")], "p"), "sample 1 is nan"),
        (lambda: paired_difference("d", [1.0], [1.0, 2.0], "p"), "pair them by key"),
        (lambda: ratio_of_totals("speedup", [1.0, 1.0], [1.0, 0.0], "p"), "denominator 1 is 0.0"),
    ],
)
def test_bad_samples_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
