"""Replay: same seed, same image as plain autoregression, whatever the method, window, levels and batch.

Equality is required of every token. The one excuse is a near tie: where the two best perturbed scores of a
slot lie within 1e-5, rounding may decide, and the row is compared up to that slot.
"""

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch

from sjd2_lightning.decoding import (
    DecodeOutput,
    DecodingConfig,
    NearTies,
    Sampling,
    decode,
    decode_reference,
)
from sjd2_lightning.decoding.config import Grouping, TreeShape
from sjd2_lightning.decoding.drawing import Batch
from sjd2_lightning.noise import NoiseProcess
from tests.tools.tiny_backbones import RAGGED_PROMPTS, strong_table, tiny_chameleon

AR = DecodingConfig("ar", window=1)
WINDOWS = (2, 7, 16, 50)
LOSSLESS_MODES = [("replay", "couple"), ("exact", "couple"), ("exact", "resample")]
SAMPLINGS = {
    "plain": Sampling(),
    "guided": Sampling(guidance_scale=3.0),
    "guided top-k": Sampling(guidance_scale=3.0, top_k=6, temperature=1.3),
    "top-p": Sampling(top_p=0.7, temperature=0.8),
    "greedy": Sampling(temperature=0.0),
    "greedy guided": Sampling(temperature=0.0, guidance_scale=3.0),
}


@pytest.fixture(scope="module")
def backbone():
    return tiny_chameleon(num_codes=12, hidden_size=16, seed=5, scale=0.5)


@pytest.fixture(scope="module")
def layout(backbone):
    return backbone.layout(10, 8)


def near_ties(backbone, prompts, seeds, sampling, layout) -> set[tuple[int, int]]:
    """(image, slot) whose token rounding may decide, by autoregression."""
    ties = NearTies()
    decode(backbone, prompts, seeds, replace(AR, sampling=sampling), layout, ties)
    return set(ties.slots)


def assert_same(tokens: torch.Tensor, wanted: torch.Tensor, ties: set[tuple[int, int]]) -> None:
    """Rows equal up to their first near tie."""
    for row, (ours, theirs) in enumerate(zip(tokens, wanted, strict=True)):
        first = min((slot for image, slot in ties if image == row), default=len(theirs))
        assert ours[:first].tolist() == theirs[:first].tolist(), f"image {row}"


def autoregression(backbone, sampling, layout, batch: int) -> tuple[DecodeOutput, list[str], list[int]]:
    prompts = [RAGGED_PROMPTS[row % 4] for row in range(batch)]
    seeds = list(range(100, 100 + batch))
    return decode(backbone, prompts, seeds, replace(AR, sampling=sampling), layout), prompts, seeds


@pytest.mark.parametrize("name", SAMPLINGS)
def test_autoregression_is_the_reference(backbone, layout, name):
    sampling = SAMPLINGS[name]
    output, prompts, seeds = autoregression(backbone, sampling, layout, 4)
    ties = near_ties(backbone, prompts, seeds, sampling, layout)
    wanted = [decode_reference(backbone, p, s, sampling, layout) for p, s in zip(prompts, seeds, strict=True)]
    assert_same(output.slot_ids, torch.stack(wanted), ties)
    assert output.stats.nfe.tolist() == [layout.num_slots] * 4
    short = decode_reference(backbone, prompts[0], seeds[0], sampling, layout, num_slots=6)
    assert short.tolist() == wanted[0][:6].tolist()


@pytest.mark.parametrize("num_levels", [0, 1, 4])
@pytest.mark.parametrize("name", ["plain", "guided top-k", "top-p", "greedy guided"])
def test_every_method_replays_autoregression(backbone, layout, name, num_levels):
    sampling = SAMPLINGS[name]
    wanted, prompts, seeds = autoregression(backbone, sampling, layout, 8)
    ties = near_ties(backbone, prompts, seeds, sampling, layout)
    for window in WINDOWS:
        draft_init = "gumbel" if window == 16 else "random"
        config = DecodingConfig("sjd2", window, num_levels, draft_init=draft_init, sampling=sampling)
        output = decode(backbone, prompts, seeds, config, layout)
        assert_same(output.slot_ids, wanted.slot_ids, ties)
        assert (output.stats.nfe <= wanted.stats.nfe).all()
    if num_levels <= 1:
        assert (output.stats.nfe < wanted.stats.nfe).all(), "the last and longest window saved no pass"


VARIANTS = {
    "tied": {"noise": NoiseProcess(source="tied")},
    "tied white": {"draft_init": "gumbel", "noise": NoiseProcess(source="tied_white")},
    "drafts": {"noise": NoiseProcess(state="draft")},
    "tied drafts": {"tree": TreeShape(3, 2, 2), "noise": NoiseProcess(source="tied", state="draft")},
    "mean": {"noise": NoiseProcess(source="mean")},
    "above": {"noise": NoiseProcess(source="above")},
    "expected": {"noise": NoiseProcess(estimate="expected", source="mean", state="draft")},
    "stable": {"level_rule": "stable"},
    "confident": {"level_rule": "confident", "confidence": 0.4, "noise": NoiseProcess(estimate="expected")},
}


@pytest.mark.parametrize("name", ["plain", "guided top-k"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_replays_autoregression(backbone, layout, variant, name):
    """Whatever noisy slots hold and however they get clean: the tokens of ar, in batches of one and eight."""
    sampling = SAMPLINGS[name]
    wanted, prompts, seeds = autoregression(backbone, sampling, layout, 8)
    ties = near_ties(backbone, prompts, seeds, sampling, layout)
    for window, num_levels in [(2, 1), (7, 2), (7, 5), (50, 3)]:
        config = DecodingConfig("sjd2", window, num_levels, sampling=sampling, **VARIANTS[variant])
        output = decode(backbone, prompts, seeds, config, layout)
        assert_same(output.slot_ids, wanted.slot_ids, ties)
        alone = decode(backbone, prompts[:1], seeds[:1], config, layout)
        assert_same(alone.slot_ids, wanted.slot_ids[:1], ties)
        assert (output.stats.nfe <= wanted.stats.nfe).all()


@pytest.mark.parametrize("name", ["plain", "guided top-k"])
def test_batch_one_and_ragged_four(backbone, layout, name):
    """Every row of a batch is the image that the prompt gives alone, and takes as many passes."""
    sampling = SAMPLINGS[name]
    wanted, prompts, seeds = autoregression(backbone, sampling, layout, 4)
    ties = near_ties(backbone, prompts, seeds, sampling, layout)
    for num_levels in (0, 2):
        config = DecodingConfig("sjd2", 7, num_levels, sampling=sampling)
        for size in (1, 4):
            for start in range(0, 4, size):
                part = slice(start, start + size)
                output = decode(backbone, prompts[part], seeds[part], config, layout)
                shifted = {(image - start, slot) for image, slot in ties}
                assert_same(output.slot_ids, wanted.slot_ids[part], shifted)


ANY_RULE = {
    "ar exact": replace(AR, acceptance="exact"),
    "sjd": DecodingConfig("sjd", 6, acceptance="exact", refiner="resample"),
    "mc_sjd": DecodingConfig("mc_sjd", 6, acceptance="exact"),
    "sjd2 exact": DecodingConfig("sjd2", 6, 2, acceptance="exact"),
    "sjd2 replay": DecodingConfig("sjd2", 6, 2),
    "paper": DecodingConfig("sjd2", 6, 2, acceptance="paper", refiner="keep"),
    "sjd_pac": DecodingConfig("sjd_pac", 6, acceptance="exact", tree=TreeShape(4, 2, 2)),
    "sjd2 exact tree": DecodingConfig("sjd2", 6, 1, acceptance="exact", tree=TreeShape(4, 2, 2)),
    "tree replay": DecodingConfig("sjd2", 6, 1, tree=TreeShape(4, 2, 2)),
    "gsd": DecodingConfig("gsd", 6, acceptance="grouped", refiner="resample", groups=Grouping(5)),
}


@pytest.mark.parametrize("rule", ANY_RULE)
def test_an_image_does_not_depend_on_its_batch(backbone, layout, rule):
    """In any mode: alone, in fours, in one batch, in another order, and when neighbours leave early."""
    config = replace(ANY_RULE[rule], sampling=SAMPLINGS["guided top-k"])
    prompts = [RAGGED_PROMPTS[row % 4] for row in range(12)]
    seeds = list(range(12))
    sizes = []
    whole = decode(backbone, prompts, seeds, config, layout, lambda i: sizes.append(len(i.rows)))
    if rule != "ar exact":
        assert sizes[0] == 12 > sizes[-1], "no row left early: the test would show nothing"
    order = [7, 2, 9, 4, 0, 11, 5, 1, 10, 3, 8, 6]
    other = decode(backbone, [prompts[i] for i in order], [seeds[i] for i in order], config, layout)
    assert torch.equal(other.slot_ids, whole.slot_ids[order])
    assert torch.equal(other.stats.settled_iteration, whole.stats.settled_iteration[order])
    for start in range(0, 12, 4):
        part = slice(start, start + 4)
        output = decode(backbone, prompts[part], seeds[part], config, layout)
        assert torch.equal(output.slot_ids, whole.slot_ids[part])
        assert torch.equal(output.stats.nfe, whole.stats.nfe[part])
    for row in (0, 3):
        alone = decode(backbone, [prompts[row]], [seeds[row]], config, layout)
        assert torch.equal(alone.slot_ids[0], whole.slot_ids[row])
        assert torch.equal(alone.stats.settled_iteration[0], whole.stats.settled_iteration[row])


def test_neighbours_of_one_prompt_differ(backbone, layout):
    output = decode(backbone, ["red cat"] * 8, range(8), DecodingConfig("sjd2", 6, 1), layout)
    assert len({tuple(row.tolist()) for row in output.slot_ids}) == 8
    other = decode(backbone, ["blue"] * 8, range(8), DecodingConfig("sjd2", 6, 1), layout)
    assert (other.slot_ids != output.slot_ids).any(1).all()


@pytest.mark.parametrize(("acceptance", "refiner"), [*LOSSLESS_MODES, ("paper", "keep")])
def test_no_levels_is_sjd(backbone, layout, acceptance, refiner):
    sampling = SAMPLINGS["guided top-k"]
    shared = {"window": 6, "acceptance": acceptance, "refiner": refiner, "sampling": sampling}
    sjd2 = decode(backbone, RAGGED_PROMPTS, range(4), DecodingConfig("sjd2", num_levels=0, **shared), layout)
    sjd = decode(backbone, RAGGED_PROMPTS, range(4), DecodingConfig("sjd", **shared), layout)
    assert torch.equal(sjd2.slot_ids, sjd.slot_ids)
    assert torch.equal(sjd2.stats.committed, sjd.stats.committed)


@pytest.mark.parametrize(("acceptance", "refiner"), LOSSLESS_MODES)
@pytest.mark.parametrize("num_levels", [0, 4])
def test_window_of_one_is_autoregression(backbone, layout, acceptance, refiner, num_levels):
    sampling = SAMPLINGS["guided top-k"]
    config = DecodingConfig("sjd2", 1, num_levels, acceptance, refiner, sampling=sampling)
    one = decode(backbone, RAGGED_PROMPTS, range(4), config, layout)
    plain = decode(
        backbone, RAGGED_PROMPTS, range(4), replace(AR, acceptance=acceptance, sampling=sampling), layout
    )
    assert torch.equal(one.slot_ids, plain.slot_ids)
    assert one.stats.nfe.tolist() == [layout.num_slots] * 4


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("rule", ["sjd", "mc_sjd", "sjd2 exact", "sjd_pac", "sjd2 exact tree", "gsd"])
def test_greedy_is_autoregression_in_every_lossless_mode(backbone, layout, rule, scale):
    sampling = Sampling(temperature=0.0, guidance_scale=scale)
    wanted, prompts, seeds = autoregression(backbone, sampling, layout, 8)
    output = decode(backbone, prompts, seeds, replace(ANY_RULE[rule], sampling=sampling), layout)
    assert torch.equal(output.slot_ids, wanted.slot_ids)
    assert output.stats.nfe.float().mean() < layout.num_slots


@pytest.mark.parametrize("name", ["plain", "guided top-k", "top-p", "greedy guided"])
def test_trees_replay_autoregression(backbone, layout, name):
    """Whatever the tree: the tokens of ar, and in the mean fewer passes than without it."""
    sampling = SAMPLINGS[name]
    wanted, prompts, seeds = autoregression(backbone, sampling, layout, 8)
    ties = near_ties(backbone, prompts, seeds, sampling, layout)
    for window, num_levels in [(2, 0), (7, 0), (7, 2), (50, 0)]:
        plain = DecodingConfig("sjd2", window, num_levels, sampling=sampling)
        bare = decode(backbone, prompts, seeds, plain, layout)
        for shape in (TreeShape(4, 2, 2), TreeShape(2, 9, 9), TreeShape(99)):
            output = decode(backbone, prompts, seeds, replace(plain, tree=shape), layout)
            assert_same(output.slot_ids, wanted.slot_ids, ties)
            if name != "greedy guided":  # then siblings of a draft are impossible
                assert output.stats.nfe.float().mean() < bare.stats.nfe.float().mean()


def test_what_is_taken_of_a_branch_must_be_fed_again(backbone, layout):
    """Negative control: tokens differ if the columns of replaced drafts are left as they were."""
    sampling = SAMPLINGS["plain"]
    wanted, prompts, seeds = autoregression(backbone, sampling, layout, 4)
    config = DecodingConfig("gumbel", 7, tree=TreeShape(4, 2, 2), sampling=sampling)
    shape = Batch.shape
    with patch.object(Batch, "shape", lambda self: shape(self)._replace(again=1)):
        output = decode(backbone, prompts, seeds, config, layout)
    assert not torch.equal(output.slot_ids, wanted.slot_ids)


def test_observers_see_the_law_behind_a_sibling(backbone, layout):
    """Every committed code is the maximum of the scores that the pass shows for it."""
    wide = []

    def by_hand(iteration):
        for row, num in enumerate(iteration.num_committed.tolist()):
            best = (iteration.scores[row, :num] + iteration.gumbel[row, :num]).argmax(-1)
            tokens = iteration.tokens[row, :num]
            assert ((best == tokens) | (tokens >= iteration.scores.shape[-1])).all()
            wide.append(num)

    config = DecodingConfig("gumbel", 2, tree=TreeShape(4), sampling=SAMPLINGS["guided top-k"])
    decode(backbone, RAGGED_PROMPTS, range(4), config, layout, by_hand)
    assert 2 in wide


def test_groups_of_one_code_are_the_exact_rule(backbone, layout):
    shared = {"window": 6, "sampling": SAMPLINGS["guided top-k"]}
    for refiner in ("resample", "couple"):
        exact = DecodingConfig("sjd", acceptance="exact", refiner=refiner, **shared)
        groups = Grouping(size=1, gap=0.0, distance=0.0)
        gsd = DecodingConfig("gsd", acceptance="grouped", refiner=refiner, groups=groups, **shared)
        ours = decode(backbone, RAGGED_PROMPTS, range(4), gsd, layout)
        wanted = decode(backbone, RAGGED_PROMPTS, range(4), exact, layout)
        assert torch.equal(ours.slot_ids, wanted.slot_ids)
        assert torch.equal(ours.stats.committed, wanted.stats.committed)
        more = decode(backbone, RAGGED_PROMPTS, range(4), replace(gsd, groups=Grouping(5)), layout)
        assert more.stats.nfe.sum() < wanted.stats.nfe.sum(), "larger groups accept more"


def test_levels_and_window_are_free_at_inference(backbone, layout):
    """Weights know nothing of either: one backbone serves every value, and none changes it."""
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    for window, num_levels in [(3, 1), (9, 5), (20, 25)]:
        decode(backbone, ["red cat"], [0], DecodingConfig("sjd2", window, num_levels), layout)
    assert all(torch.equal(before[name], value) for name, value in backbone.state_dict().items())


def test_near_ties_are_found_where_they_are_and_only_there(backbone, layout):
    tied = tiny_chameleon(num_codes=12, hidden_size=16, seed=5)
    ties = NearTies(tolerance=0.05)
    output = decode(tied, RAGGED_PROMPTS, range(4), DecodingConfig("sjd2", 7, 1), layout, ties)
    gaps = {}

    def by_hand(iteration):
        best = (iteration.scores[:, 0] + iteration.gumbel[:, 0]).sort(-1).values
        for row in range(len(best)):
            slot = int(iteration.heads[row])
            if slot < layout.num_slots and layout.forced[slot] < 0:
                gaps[int(iteration.rows[row]), slot] = float(best[row, -1] - best[row, -2])

    decode(tied, RAGGED_PROMPTS, range(4), AR, layout, by_hand)
    assert len(gaps) == 4 * 20
    wanted = {place for place, gap in gaps.items() if gap <= 0.05}
    assert wanted
    assert set(ties.slots) == wanted
    assert len(output.slot_ids) == 4
    with pytest.raises(ValueError, match="replay"):
        decode(tied, ["blue"], [0], ANY_RULE["sjd"], layout, NearTies())


@pytest.fixture(scope="module")
def half():
    """A trunk in bfloat16, whose laws are close enough for rounding to decide often."""
    return tiny_chameleon(num_codes=40, hidden_size=32, seed=5, scale=0.15).to(torch.bfloat16)


@pytest.mark.parametrize("way", [{"window_shape": 9}, {"invariant": True}], ids=["one shape", "invariant"])
@pytest.mark.parametrize("num_levels", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_replay_in_half_precision(half, way, num_levels):
    """No excuse of near ties: where numbers depend on the prefix alone, every token is that of ar."""
    layout = half.layout(10, 8)
    guided = replace(AR, sampling=SAMPLINGS["guided"], **way)
    prompts, seeds = [RAGGED_PROMPTS[row % 4] for row in range(8)], range(8)
    wanted = decode(half, prompts, seeds, guided, layout)
    config = DecodingConfig("sjd2", 9, num_levels, sampling=SAMPLINGS["guided"], **way)
    output = decode(half, prompts, seeds, config, layout)
    assert torch.equal(output.slot_ids, wanted.slot_ids)
    assert (output.stats.nfe < wanted.stats.nfe).all()
    if "invariant" in way:  # whatever the batch, the window and what a pass carries beside it
        alone = decode(half, prompts[1:2], [1], config, layout)
        assert torch.equal(alone.slot_ids[0], wanted.slot_ids[1])
        tree = replace(config, window=7, tree=TreeShape(3, 2, 2))
        assert torch.equal(decode(half, prompts, seeds, tree, layout).slot_ids, wanted.slot_ids)


def test_half_precision_alone_is_no_replay(half):
    """Negative control: with passes in their fastest shapes some images part from ar's."""
    layout, guided = half.layout(10, 8), replace(AR, sampling=SAMPLINGS["guided"])
    prompts, seeds = [RAGGED_PROMPTS[row % 4] for row in range(40)], range(40)
    wanted = decode(half, prompts, seeds, guided, layout)
    config = DecodingConfig("sjd2", 9, 2, sampling=SAMPLINGS["guided"])
    assert not torch.equal(decode(half, prompts, seeds, config, layout).slot_ids, wanted.slot_ids)


def test_invariant_arithmetic_needs_layers():
    backbone = strong_table(3)
    with pytest.raises(ValueError, match=r"decoding.invariant=true: TableBackbone has no layers"):
        decode(backbone, ["p1"], [0], replace(AR, invariant=True), backbone.layout(2, 2))
