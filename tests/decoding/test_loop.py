"""The fast loop against the slow one, token by token and pass by pass, for every rule."""

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch

from sjd2_lightning.decoding import DecodingConfig, Sampling, decode
from sjd2_lightning.decoding.config import Grouping, PairSweeps, TreeShape
from sjd2_lightning.decoding.variants.pairs import PairTable
from sjd2_lightning.noise import NoiseProcess
from tests.tools.slow_loop import SlowDecoder
from tests.tools.tiny_backbones import RAGGED_PROMPTS, TableBackbone, strong_table, tiny_chameleon

GROUPS = Grouping(size=5, gap=0.2, distance=2.2)
GUIDED = Sampling(guidance_scale=2.0, top_k=5, temperature=1.1)
SAMPLINGS = {
    "sjd2-exact-resample": Sampling(top_p=0.9),
    "paper-couple": Sampling(top_p=0.9),
    "sjd_pac-long": Sampling(guidance_scale=2.0, top_k=6, top_p=0.9),
    "gsd-couple": Sampling(top_p=0.9),
    "tree-resample-left": Sampling(guidance_scale=3.0, guidance_schedule="linear"),
    "jacobi": Sampling(guidance_scale=3.0, guidance_schedule="linear"),
    "sjd-replay": Sampling(
        guidance_scale=3.0, guidance_schedule="interval", guidance_start=0.2, guidance_end=0.7
    ),
}
RULES = {
    "ar": DecodingConfig("ar", window=1),
    "sjd": DecodingConfig("sjd", window=5, acceptance="exact", refiner="resample"),
    "mc_sjd": DecodingConfig("mc_sjd", window=7, acceptance="exact"),
    "sjd-replay": DecodingConfig("sjd", window=7, draft_init="gumbel"),
    "sjd2-replay": DecodingConfig("sjd2", window=6, num_levels=2),
    "sjd2-replay-karras": DecodingConfig(
        "sjd2", window=40, num_levels=3, noise=NoiseProcess(schedule="karras", t_min=0.1, rho=5.0)
    ),
    "tied": DecodingConfig("sjd2", window=6, num_levels=2, noise=NoiseProcess(source="tied")),
    "tied-white-drafts": DecodingConfig(
        "sjd2", window=9, num_levels=3, noise=NoiseProcess(source="tied_white", state="draft")
    ),
    "drafts": DecodingConfig(
        "sjd2", window=6, num_levels=3, acceptance="exact", noise=NoiseProcess(state="draft")
    ),
    "mean": DecodingConfig("sjd2", window=6, num_levels=3, noise=NoiseProcess(source="mean")),
    "above": DecodingConfig("sjd2", window=9, num_levels=1, noise=NoiseProcess(source="above")),
    "above-levels": DecodingConfig("sjd2", window=12, num_levels=3, noise=NoiseProcess(source="above")),
    "above-exact": DecodingConfig(
        "sjd2", window=9, num_levels=2, acceptance="exact", noise=NoiseProcess(source="above")
    ),
    "mean-exact": DecodingConfig(
        "sjd2", window=6, num_levels=3, acceptance="exact", noise=NoiseProcess(source="mean")
    ),
    "mask": DecodingConfig("sjd2", window=7, num_levels=3, noise=NoiseProcess(source="mean", state="draft")),
    "expected": DecodingConfig("sjd2", window=6, num_levels=3, noise=NoiseProcess(estimate="expected")),
    "expected-karras": DecodingConfig(
        "sjd2",
        window=9,
        num_levels=4,
        noise=NoiseProcess(schedule="karras", t_min=0.1, source="mean", estimate="expected"),
    ),
    "expected-drafts": DecodingConfig(
        "sjd2",
        window=6,
        num_levels=3,
        acceptance="exact",
        noise=NoiseProcess(estimate="expected", state="draft"),
    ),
    "stable": DecodingConfig("sjd2", window=9, num_levels=4, level_rule="stable"),
    "stable-exact": DecodingConfig("sjd2", window=9, num_levels=4, acceptance="exact", level_rule="stable"),
    "stable-paper": DecodingConfig(
        "sjd2", window=9, num_levels=4, acceptance="paper", refiner="keep", level_rule="stable"
    ),
    "confident": DecodingConfig("sjd2", window=9, num_levels=4, level_rule="confident", confidence=0.5),
    "confident-pure": DecodingConfig(
        "sjd2_pure", window=9, num_levels=4, acceptance="pure", level_rule="confident", confidence=0.4
    ),
    "confident-tree": DecodingConfig(
        "sjd2",
        9,
        4,
        tree=TreeShape(3, 2, 2),
        level_rule="confident",
        confidence=0.4,
        noise=NoiseProcess(estimate="expected"),
    ),
    "sjd2-exact": DecodingConfig("sjd2", window=6, num_levels=3, acceptance="exact"),
    "sjd2-exact-resample": DecodingConfig(
        "sjd2", window=6, num_levels=1, acceptance="exact", refiner="resample"
    ),
    "paper": DecodingConfig("sjd2", window=8, num_levels=2, acceptance="paper", refiner="keep"),
    "paper-couple": DecodingConfig("sjd2", window=8, num_levels=4, acceptance="paper"),
    "jacobi": DecodingConfig("jacobi", window=6, acceptance="match"),
    "sjd-left": DecodingConfig(
        "sjd", window=6, acceptance="exact", refiner="resample", draft_init="repeat_left"
    ),
    "sjd-above": DecodingConfig("sjd", window=9, acceptance="exact", draft_init="repeat_above"),
    "replay-left": DecodingConfig("gumbel", window=6, draft_init="repeat_left"),
    "sjd_pp": DecodingConfig("sjd_pp", window=6, acceptance="exact", refiner="reuse"),
    "sjd_pp-left": DecodingConfig(
        "sjd_pp", window=6, acceptance="exact", refiner="reuse", draft_init="repeat_left"
    ),
    "sjd_pac": DecodingConfig("sjd_pac", window=7, acceptance="exact", tree=TreeShape(4, 2, 2)),
    "sjd_pac-long": DecodingConfig("sjd_pac", window=9, acceptance="exact", tree=TreeShape(5, 3, 5)),
    "sjd_pac-wide": DecodingConfig("sjd_pac", window=40, acceptance="exact", tree=TreeShape(9, 1, 1)),
    "sjd_pac-window-2": DecodingConfig("sjd_pac", window=2, acceptance="exact", tree=TreeShape(4, 3, 3)),
    "sjd_pac-window-1": DecodingConfig("sjd_pac", window=1, acceptance="exact", tree=TreeShape(4, 3, 3)),
    "tree-resample-left": DecodingConfig(
        "sjd",
        window=6,
        acceptance="exact",
        refiner="resample",
        draft_init="repeat_left",
        tree=TreeShape(3, 3),
    ),
    "tree-reuse": DecodingConfig(
        "sjd_pp", window=6, acceptance="exact", refiner="reuse", tree=TreeShape(3, 2, 2)
    ),
    "tree-levels": DecodingConfig(
        "sjd2", window=6, num_levels=2, acceptance="exact", tree=TreeShape(4, 2, 2)
    ),
    "tree-replay": DecodingConfig("gumbel", window=7, draft_init="gumbel", tree=TreeShape(4, 2, 3)),
    "tree-replay-levels": DecodingConfig("sjd2", window=7, num_levels=2, tree=TreeShape(4, 2, 3)),
    "gsd": DecodingConfig("gsd", window=6, acceptance="grouped", refiner="resample", groups=GROUPS),
    "gsd-couple": DecodingConfig("gsd", window=9, acceptance="grouped", groups=replace(GROUPS, size=2)),
    "gsd-levels": DecodingConfig("sjd2", window=6, num_levels=1, acceptance="grouped", groups=GROUPS),
    "pure": DecodingConfig("sjd2_pure", window=8, num_levels=3, acceptance="pure"),
    "paper-window-1": DecodingConfig("sjd2", window=1, num_levels=2, acceptance="paper", refiner="keep"),
    "paper-clean": DecodingConfig("sjd2", window=30, num_levels=0, acceptance="paper", refiner="keep"),
}


@pytest.fixture(scope="module")
def backbone():
    return tiny_chameleon(num_codes=7, seed=3, scale=0.4)


@pytest.mark.parametrize("rule", RULES)
def test_fast_loop_is_the_slow_one(backbone, rule):
    assert_slow_loop_agrees(backbone, replace(RULES[rule], sampling=SAMPLINGS.get(rule, GUIDED)))


SWEPT = {
    "replay": DecodingConfig("sjd2", window=7, num_levels=1),
    "levels": DecodingConfig("sjd2", window=9, num_levels=3),
    "clean": DecodingConfig("gumbel", window=30, draft_init="repeat_above"),
    "tree": DecodingConfig("sjd2", window=7, num_levels=1, tree=TreeShape(4, 2, 3)),
    "short": DecodingConfig("gumbel", window=2),
}


@pytest.mark.parametrize("sweeps", [1, 3])
@pytest.mark.parametrize("rule", SWEPT)
def test_fast_sweeps_are_the_slow_ones(backbone, tmp_path, rule, sweeps):
    path = tmp_path / "pairs.safetensors"
    rank = 3 if sweeps == 1 else 7  # factors, and the whole table
    factors = torch.randn(2, 7, rank, generator=torch.Generator().manual_seed(sweeps))
    PairTable(*factors).save(path)
    config = replace(
        SWEPT[rule], pairs=PairSweeps(str(path), 1.5 if rank == 3 else 0.6, sweeps), sampling=GUIDED
    )
    assert_slow_loop_agrees(backbone, config)


def assert_slow_loop_agrees(backbone, config):
    layout = backbone.layout(6, 6)
    seeds = [11, 12, 13, 14]
    output = decode(backbone, RAGGED_PROMPTS, seeds, config, layout)
    for row, (prompt, seed) in enumerate(zip(RAGGED_PROMPTS, seeds, strict=True)):
        slow = SlowDecoder(backbone, prompt, seed, config, layout)
        assert output.slot_ids[row].tolist() == slow.decode()
        assert output.stats.settled_iteration[row].tolist() == slow.settled
        assert int(output.stats.nfe[row]) == slow.settled[-1] + 1
        assert output.stats.accepted[row] == [slow.settled.count(i) for i in range(slow.settled[-1] + 1)]


def test_counts_agree_with_each_other(backbone):
    layout = backbone.layout(8, 6)
    output = decode(
        backbone, RAGGED_PROMPTS, [0, 1, 2, 3], DecodingConfig("sjd2", window=5, num_levels=1), layout
    )
    stats = output.stats
    assert stats.num_generated.tolist() == [layout.num_slots] * 4 == [4 * 4 - 1] * 4
    assert stats.committed.sum(0).tolist() == [layout.num_slots] * 4
    assert (stats.settled_iteration.diff(dim=1) >= 0).all()
    assert stats.nfe.tolist() == [len(passes) for passes in stats.accepted]
    assert torch.allclose(stats.step_compression, layout.num_slots / stats.nfe)
    assert output.image_ids.shape == (4, 4, 3)
    assert torch.equal(layout.slot_ids(output.image_ids), output.slot_ids)


@pytest.mark.parametrize("window", [1, 3, 8, 40])
@pytest.mark.parametrize("num_levels", [0, 1, 3])
def test_passes_of_a_law_without_surprises(window, num_levels):
    """One code has all the mass: a slot's draft is right after its first pass, whatever it started with."""
    logits = torch.full((1, 10, 10, 8), -1e4)
    logits[..., 5] = 0.0
    backbone = TableBackbone(logits)
    layout = backbone.layout(4, 5)
    config = DecodingConfig("sjd2", window=window, num_levels=num_levels)
    output = decode(backbone, ["p0"] * 50, range(50), config, layout)
    assert (output.image_ids == 5).all()
    expected = passes_without_surprises(layout.forced, window, num_levels)
    assert output.stats.nfe.max() == expected
    if num_levels:  # without levels a first draft may be right by chance
        assert output.stats.nfe.min() == expected


def passes_without_surprises(forced: tuple[int, ...], window: int, num_levels: int) -> int:
    """Passes when a draft is right, and its slot clean, from its second or later pass on."""
    age: list[int] = []
    head, passes = 0, 0
    while head < len(forced):
        age += [0] * (min(window, len(forced) - head) - len(age))
        num = 1
        while num < len(age) and (forced[head + num - 1] >= 0 or age[num - 1] >= max(1, num_levels)):
            num += 1
        head, passes, age = head + num, passes + 1, [a + 1 for a in age[num:]]
    return passes


def test_bad_input_is_named_before_any_forward(backbone):
    layout = backbone.layout(8, 6)
    good = DecodingConfig("sjd2", window=4, num_levels=1)
    with pytest.raises(ValueError, match="one seed a prompt"):
        decode(backbone, ["red cat"], [1, 2], good, layout)
    with pytest.raises(ValueError, match="at least one"):
        decode(backbone, [], [], good, layout)
    with pytest.raises(ValueError, match="empty prompt"):
        decode(backbone, ["red cat", "  "], [1, 2], good, layout)
    with pytest.raises(ValueError, match=r"window.*num_levels"):
        decode(backbone, ["red cat"], [1], replace(good, window=0, num_levels=-1), layout)
    with patch.object(type(backbone), "forward", side_effect=AssertionError("a forward pass")):
        for changes in ({"tree": TreeShape(0)}, {"groups": Grouping(3)}, {"method": "sjd_pac"}):
            with pytest.raises(ValueError, match=r"tree|groups"):
                decode(backbone, ["red cat"], [1], replace(good, **changes), layout)


def test_guidance_needs_an_unconditional_prompt():
    backbone = strong_table(3)
    backbone.unconditional_ids = lambda layout, ids=(): []
    backbone.forward = None  # a call of it would be another error
    with pytest.raises(ValueError, match="no unconditional prompt"):
        decode(backbone, ["p1"], [0], replace(RULES["ar"], sampling=GUIDED), backbone.layout(2, 2))


def test_a_cache_that_is_too_short_is_named_before_any_forward():
    backbone = strong_table(3)
    make = backbone.new_cache
    backbone.new_cache = lambda batch, max_len: make(batch, max_len - 1)
    backbone.forward = None
    with pytest.raises(ValueError, match=r"cache too short: .* take 7 positions, .* gave 6"):
        decode(backbone, ["p1"], [0], RULES["ar"], backbone.layout(2, 2))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"window": 0}, "decoding.window=0: must be >= 1"),
        ({"num_levels": -1}, "decoding.num_levels=-1: must be >= 0"),
        ({"sampling": Sampling(top_p=0.0)}, r"decoding.sampling.top_p=0.0: must lie in \(0, 1\]"),
        ({"sampling": Sampling(top_p=1.5)}, r"decoding.sampling.top_p=1.5: must lie in \(0, 1\]"),
    ],
)
def test_each_bad_value_is_one_error_before_any_forward(changes, named):
    backbone = strong_table(3)
    backbone.forward = backbone.prompt_ids = None
    good = DecodingConfig("sjd2", window=4, num_levels=1)
    with pytest.raises(ValueError, match=f"^{named}") as error:
        decode(backbone, ["p1"], [0], replace(good, **changes), backbone.layout(2, 2))
    assert len(replace(good, **changes).problems()) == 1
    assert str(error.value) == f"decoding.{replace(good, **changes).problems()[0]}"


def test_prompts_beyond_the_model_s_positions_are_refused_before_any_forward():
    backbone = tiny_chameleon(7)
    layout, config = backbone.layout(6, 4), RULES["ar"]  # 8 slots, 5 tokens of the template
    assert decode(backbone, ["cat " * 243], [0], config, layout).image_ids.shape == (1, 3, 2)
    with patch.object(type(backbone), "forward", side_effect=AssertionError("a forward pass")):
        with pytest.raises(
            ValueError, match=r"the prompt 'cat cat .*' has 249 tokens .* 256 positions, 8 of"
        ):
            decode(backbone, ["red cat", "cat " * 244], [0, 1], config, layout)
        backbone.unconditional_ids = lambda layout, ids=(): [0] * 249
        with pytest.raises(ValueError, match="unconditional context of guidance has 249 tokens"):
            decode(backbone, ["red cat"], [0], replace(config, sampling=GUIDED), layout)
