"""Values of a method: which are lossless, and that all problems come in one error."""

from dataclasses import replace

import pytest

from sjd2_lightning.decoding import DecodingConfig, Sampling
from sjd2_lightning.decoding.config import Grouping, PairSweeps, TreeShape
from sjd2_lightning.noise import NoiseProcess

GOOD = DecodingConfig("sjd2", window=8, num_levels=2)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"window": 0}, ["window"]),
        ({"num_levels": -1}, ["num_levels"]),
        ({"method": "ar"}, ["method=ar needs window 1"]),
        ({"method": "ar", "window": 1}, ["num_levels=2: method=ar needs num_levels 0"]),
        ({"method": "sjd"}, ["has no noise"]),
        ({"method": "mc_sjd"}, ["has no noise"]),
        ({"refiner": "keep"}, ["refiner=keep: is not exact"]),
        ({"method": "jacobi"}, ["has no noise"]),
        ({"refiner": "reuse"}, ["refiner=reuse: needs"]),
        ({"acceptance": "pure", "num_levels": 0}, ["acceptance=pure: accepts"]),
        ({"draft_init": "gumbel", "acceptance": "exact"}, ["draft_init=gumbel: needs acceptance=replay"]),
        ({"confidence": 0.0}, ["confidence=0.0: must lie in (0, 1]"]),
        ({"confidence": 1.5}, ["confidence=1.5: must lie in (0, 1]"]),
        (
            {"noise": NoiseProcess(source="tied"), "acceptance": "exact"},
            ["noise.source=tied: needs acceptance=replay"],
        ),
        ({"tree": TreeShape(0, -1, 0)}, ["tree.width", "tree.depth", "tree.length"]),
        ({"tree": TreeShape(2), "acceptance": "paper"}, ["tree.width=2: needs acceptance exact or replay"]),
        ({"tree": TreeShape(2), "acceptance": "grouped"}, ["tree.width=2: needs acceptance exact or replay"]),
        ({"method": "sjd_pac", "num_levels": 0}, ["method=sjd_pac: needs tree.width"]),
        ({"method": "gsd", "num_levels": 0}, ["method=gsd: needs acceptance=grouped"]),
        ({"groups": Grouping(5)}, ["groups.size=5: needs acceptance=grouped"]),
        ({"groups": Grouping(0, -1.0, float("nan"))}, ["groups.size", "groups.gap", "groups.distance"]),
        ({"pairs": PairSweeps(strength=0, sweeps=0)}, ["pairs.strength", "pairs.sweeps"]),
        ({"pairs": PairSweeps("nowhere.safetensors")}, ["no such file", "sjd2 pairs"]),
        ({"pairs": PairSweeps(__file__), "acceptance": "exact"}, ["needs acceptance=replay; set it to null"]),
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


@pytest.mark.parametrize("field", ["method", "acceptance", "refiner", "draft_init", "level_rule"])
def test_unknown_choices_are_named(field):
    config = replace(GOOD)
    object.__setattr__(config, field, "none")  # the type checker of the tests lets no such value through
    with pytest.raises(ValueError, match=f"decoding.{field}='none': must be one of "):
        config.check()
    assert "decoding.noise.source='mask': must be one of gaussian, tied" in _refused_noise("source", "mask")
    assert "decoding.sampling.guidance_schedule='x': must be one of constant, linear" in _refused_sampling(
        "x"
    )


def _refused_noise(field, value):
    noise = NoiseProcess()
    object.__setattr__(noise, field, value)
    return "; ".join(f"decoding.{line}" for line in replace(GOOD, noise=noise).problems())


def _refused_sampling(value):
    sampling = Sampling()
    object.__setattr__(sampling, "guidance_schedule", value)
    return "; ".join(f"decoding.{line}" for line in replace(GOOD, sampling=sampling).problems())
