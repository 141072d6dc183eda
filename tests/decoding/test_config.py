"""Values of a method: which are lossless, and that all problems come in one error."""

from dataclasses import replace

import pytest

from sjd2_lightning.decoding import DecodingConfig, Sampling
from sjd2_lightning.decoding.config import Grouping, PairSweeps, TreeShape

GOOD = DecodingConfig("sjd2", window=8, num_levels=2)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"window": 0}, ["window"]),
        ({"num_levels": -1}, ["num_levels"]),
        ({"method": "eagle"}, ["method", "eagle"]),
        ({"acceptance": "most"}, ["acceptance"]),
        ({"refiner": "none"}, ["refiner"]),
        ({"draft_init": "copy"}, ["draft_init"]),
        ({"schedule": "cosine"}, ["schedule"]),
        ({"method": "ar"}, ["'ar' needs window 1"]),
        ({"method": "ar", "window": 1}, ["'ar' needs window 1"]),
        ({"method": "sjd"}, ["no noise"]),
        ({"method": "mc_sjd"}, ["no noise"]),
        ({"refiner": "keep"}, ["not exact"]),
        ({"method": "jacobi"}, ["no noise"]),
        ({"refiner": "reuse"}, ["'reuse' needs"]),
        ({"acceptance": "pure", "num_levels": 0}, ["'pure' accepts"]),
        ({"draft_init": "gumbel", "acceptance": "exact"}, ["needs acceptance 'replay'"]),
        ({"source": "mask"}, ["source", "mask"]),
        ({"state": "old"}, ["state", "old"]),
        ({"estimate": "mean"}, ["estimate", "mean"]),
        ({"level_rule": "fast"}, ["level_rule", "fast"]),
        ({"confidence": 0.0}, ["confidence must lie in (0, 1]"]),
        ({"confidence": 1.5}, ["confidence must lie in (0, 1]"]),
        ({"source": "tied", "acceptance": "exact"}, ["source 'tied' needs acceptance 'replay'"]),
        ({"tree": TreeShape(0, -1, 0)}, ["tree.width", "tree.depth", "tree.length"]),
        ({"tree": TreeShape(2), "acceptance": "paper"}, ["decoding.tree needs acceptance 'exact' or"]),
        ({"tree": TreeShape(2), "acceptance": "grouped"}, ["decoding.tree needs acceptance 'exact' or"]),
        ({"method": "sjd_pac", "num_levels": 0}, ["'sjd_pac' needs tree.width"]),
        ({"method": "gsd", "num_levels": 0}, ["'gsd' needs acceptance 'grouped'"]),
        ({"groups": Grouping(5)}, ["decoding.groups needs acceptance 'grouped'"]),
        ({"groups": Grouping(0, -1.0, float("nan"))}, ["groups.size", "groups.gap", "groups.distance"]),
        ({"pairs": PairSweeps(strength=0, sweeps=0)}, ["pairs.strength", "pairs.sweeps"]),
        ({"pairs": PairSweeps("nowhere.safetensors")}, ["no file nowhere.safetensors", "data.pairs"]),
        ({"pairs": PairSweeps(__file__), "acceptance": "exact"}, ["decoding.pairs.table needs acceptance"]),
        ({"window": 0, "num_levels": -1, "sampling": Sampling(top_p=0)}, ["window", "num_levels", "top_p"]),
    ],
)
def test_problems(changes, named):
    with pytest.raises(ValueError) as error:
        replace(GOOD, **changes).check()
    assert all(name in str(error.value) for name in named)


def test_good_values_pass_and_modes_are_labelled():
    for acceptance, lossless in [
        ("replay", True),
        ("exact", True),
        ("match", True),
        ("paper", False),
        ("pure", False),
        ("grouped", False),
    ]:
        config = replace(GOOD, acceptance=acceptance)
        config.check()
        assert config.lossless is lossless
