"""The cost model of a pass, and what the loop holds and does beside it."""

import pytest
import torch

from benchmarks import scaling
from sjd2_lightning.decoding import DecodingConfig
from sjd2_lightning.models.registry import build_shrunken
from tests.tools.tiny_backbones import tiny_chameleon


def test_a_window_costs_what_was_measured():
    one = scaling.pass_seconds(1, 1200, 2, utilisation=0.6)
    assert scaling.pass_seconds(96, 1200, 2, utilisation=0.6) / one == pytest.approx(9.3 / 6.9)
    assert scaling.pass_seconds(80, 1200, 2, utilisation=0.6) / one == pytest.approx(8.75 / 6.9)
    assert one == pytest.approx((14e9 + 4 * 1200 * 32 * 4096 * 2) / 2.039e12 * 6.9 / 3.3)
    bound = scaling.pass_seconds(96, 1200, 2, utilisation=0.1)
    assert bound > 2 * scaling.pass_seconds(96, 1200, 2, utilisation=0.6), "operations bind"


def test_predictions_hang_together():
    for row in scaling.predictions(0.6).values():
        assert row["speedup"] * row["pass_cost"] == pytest.approx(row["step_compression"])
        assert row["published_pass_cost"] * row["published_speedup"] == pytest.approx(row["step_compression"])


@pytest.mark.parametrize("levels", [0, 2])
def test_own_work_stays_where_it_is(levels):
    call = scaling.own_work(window=4, vocabulary=16, levels=levels, rows=2)
    call()
    state = call.__closure__[call.__code__.co_freevars.index("state")].cell_contents
    for _ in range(3):
        call()
    assert state.head.tolist() == [0, 0]
    assert state.iteration.tolist() == [0, 0]


def test_memory_tells_the_cache_from_the_rest():
    backbone = tiny_chameleon(num_codes=256, num_layers=1, hidden_size=8)
    found = scaling.memory(backbone, (4, 4), DecodingConfig("sjd2", 8, 1, "exact"), rows=2)
    assert found["law_bytes"] == 4 * 2 * 8 * 256
    assert found["cache_bytes"] > 2 * 8 * backbone.new_cache(1, 1).num_bytes
    assert found["law_bytes"] <= found["state_bytes"] < found["peak_bytes"]
    assert (
        found["cache_bytes"] + found["law_bytes"] * found["peak_beside_cache_over_law"] == found["peak_bytes"]
    )


@torch.inference_mode()
def test_a_pass_of_the_sweep_runs():
    backbone = build_shrunken("chameleon")
    assert scaling.a_pass(backbone, window=4, prefix=8, rows=2, levels=1)() is None
