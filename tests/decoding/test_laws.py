"""The law of whole images against enumeration: every lossless rule passes, and every known wrong rule fails.

Each test decodes thousands of prompts in one batch and compares the images with the exact law over all K^n
of them by one chi-square test, the four prompts of a ragged batch taken together. A rule passes at p > 1e-6.
The two tiers make under 150 such tests, so a correct decoder with fresh seeds would fail the file with
probability below 2e-4 (Bonferroni); the seeds are fixed. A wrong rule must give p < 1e-12 in the same test.
"""

from contextlib import ExitStack
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch

from sjd2_lightning.decoding import DecodingConfig, Sampling, decode, loop, verify
from sjd2_lightning.decoding.probs import residual
from sjd2_lightning.decoding.verify import num_leading
from tests.decoding.enumeration import chi_square, histogram, p_value, sequence_law
from tests.tiny_backbones import RAGGED_PROMPTS, strong_table, tiny_chameleon

P_PASS, P_FAIL = 1e-6, 1e-12
SAMPLING = Sampling(guidance_scale=2.0, top_k=2, temperature=1.2)
TABLE_PROMPTS = ("p1", "p0 p2", "p0 p0 p3", "p1 p0 p0 p2 p1")

RULES = {
    "sjd": DecodingConfig("sjd", acceptance="exact", refiner="resample"),
    "mc_sjd": DecodingConfig("mc_sjd", acceptance="exact", refiner="couple"),
    "sjd2-1": DecodingConfig("sjd2", acceptance="exact", num_levels=1),
    "sjd2-4": DecodingConfig("sjd2", acceptance="exact", num_levels=4),
    "sjd2-karras-resample": DecodingConfig(
        "sjd2", acceptance="exact", num_levels=2, refiner="resample", schedule="karras"
    ),
    "jacobi": DecodingConfig("jacobi", acceptance="match"),
    "sjd-left": DecodingConfig("sjd", acceptance="exact", refiner="resample", draft_init="repeat_left"),
    "mc_sjd-above": DecodingConfig("mc_sjd", acceptance="exact", draft_init="repeat_above"),
    "sjd_pp": DecodingConfig("sjd_pp", acceptance="exact", refiner="reuse"),
    "sjd-replay": DecodingConfig("sjd"),
    "sjd2-replay": DecodingConfig("sjd2", num_levels=2, draft_init="gumbel"),
}


@pytest.fixture(scope="module")
def table():
    """The fake backbone, its layout of 3 x 2 codes, and prompts of unequal length and law."""
    backbone = strong_table(3, num_prompts=5, seed=1, scale=1.0)
    return backbone, backbone.layout(3, 2), TABLE_PROMPTS


@pytest.fixture(scope="module")
def trunk():
    """A real trunk with cache, its layout of 2 x 2 codes, and prompts of unequal length."""
    backbone = tiny_chameleon(4, seed=3, scale=0.6)
    return backbone, backbone.layout(4, 4), RAGGED_PROMPTS


_exact_laws: dict = {}


def law_p(
    model, config: DecodingConfig, num_draws: int, num_prompts: int = 4, batch_size: int | None = None
) -> float:
    """p-value of `num_draws` images, the prompts in turn, under their enumerated laws."""
    backbone, layout, prompts = model
    config = replace(config, sampling=SAMPLING)
    prompts = prompts[:num_prompts]
    rows = [prompts[draw % num_prompts] for draw in range(num_draws)]
    batch_size = batch_size or num_draws
    batches = [range(start, start + batch_size) for start in range(0, num_draws, batch_size)]
    outputs = [decode(backbone, [rows[seed] for seed in seeds], seeds, config, layout) for seeds in batches]
    images = torch.cat([output.image_ids for output in outputs])
    statistics = []
    for number, prompt in enumerate(prompts):
        key = (backbone, prompt)
        if key not in _exact_laws:
            _exact_laws[key] = sequence_law(backbone, prompt, layout, SAMPLING)
        counts = histogram(images[number::num_prompts], backbone.num_codes)
        statistics.append(chi_square(counts, _exact_laws[key]))
    return p_value(statistics)


def test_the_laws_are_worth_testing(table, trunk):
    """Prompts differ in length and law, many images are likely, and top-k forbids most of the others."""
    for backbone, layout, prompts in (table, trunk):
        assert len({len(backbone.prompt_ids(prompt, layout)) for prompt in prompts}) == 4
        laws = [sequence_law(backbone, prompt, layout, SAMPLING) for prompt in prompts]
        assert all(abs(law.sum() - 1) < 1e-9 for law in laws)
        assert all((law > 2e-3).sum() > 10 for law in laws)
        assert all((law == 0).mean() > 0.5 for law in laws)
        assert all(abs(laws[a] - laws[b]).sum() > 0.2 for a in range(4) for b in range(a))


@pytest.mark.parametrize("window", [1, 2, 4, 9])
@pytest.mark.parametrize("rule", RULES)
def test_table_law(table, rule, window):
    assert law_p(table, replace(RULES[rule], window=window), 8_000) > P_PASS


@pytest.mark.parametrize("rule", RULES)
def test_table_law_of_one_prompt(table, rule):
    assert law_p(table, replace(RULES[rule], window=4), 4_000, num_prompts=1) > P_PASS


@pytest.mark.parametrize("window", [3, 6])
@pytest.mark.parametrize("rule", RULES)
def test_trunk_law(trunk, rule, window):
    assert law_p(trunk, replace(RULES[rule], window=window), 4_000) > P_PASS


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
def test_table_law_closely(table, rule):
    assert law_p(table, replace(RULES[rule], window=4), 400_000) > P_PASS


@pytest.mark.slow
@pytest.mark.parametrize("window", [2, 4])
@pytest.mark.parametrize("rule", RULES)
def test_trunk_law_closely(trunk, rule, window):
    assert law_p(trunk, replace(RULES[rule], window=window), 100_000) > P_PASS


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("rule", RULES)
def test_table_law_one_by_one_and_in_fours(table, rule, batch_size):
    """What the tests above decode in one batch, in batches of the size that people use."""
    config = replace(RULES[rule], window=4)
    num_draws = 2_000 * batch_size
    assert law_p(table, config, num_draws, num_prompts=batch_size, batch_size=batch_size) > P_PASS


def _judge_with(change):
    """A stand-in for `loop.judge` that changes (slots, verdict, refined, law) of the real one."""
    real = loop.judge

    def judged(slots, *others):
        verdict, refined, law = real(slots, *others)
        return change(slots, verdict, refined, law)

    return judged


def _old_law_where_kept(slots, verdict, refined, law):
    return verdict, refined, slots.draft_probs.where((refined == slots.tokens)[..., None], law)


def _old_law_everywhere(slots, verdict, refined, law):
    return verdict, refined, slots.draft_probs


def _run_stays_with_old_law(slots, verdict, refined, law):
    run = verdict.accept_mask.long().cumprod(-1).bool()
    return verdict, slots.tokens.where(run, refined), slots.draft_probs.where(run[..., None], law)


def _least_of_four(mask):
    return num_leading(mask).view(-1, 4).amin(-1, keepdim=True).expand(-1, 4).reshape(-1)


def _noisy_slots_as_drafts(slots, source, *others):
    exact = loop.SlotSource.__new__(loop.SlotSource)
    exact.__dict__ = {**source.__dict__, "config": replace(source.config, acceptance="exact")}
    return _REAL_JUDGE(slots, exact, *others)


def _flat_law_of_repeats(slots, source, *others):
    certain = slots.draft_probs.amax(-1, keepdim=True) == 1
    flat = slots.draft_probs.where(~certain, 1 / slots.draft_probs.shape[-1])
    return _REAL_JUDGE(slots._replace(draft_probs=flat), source, *others)


_REAL_JUDGE = loop.judge
_COUPLE, _RESAMPLE, _LEFT = RULES["mc_sjd"], RULES["sjd"], RULES["sjd-left"]

# name: the nearest right method, and what is broken in it
CONTROLS = {
    "old law on kept slots": (_COUPLE, {"judge": _judge_with(_old_law_where_kept)}),
    "old law on every slot": (_COUPLE, {"judge": _judge_with(_old_law_everywhere)}),
    "keep at half, current law (paper)": (replace(_RESAMPLE, acceptance="paper", refiner="keep"), {}),
    "keep at half, old law": (
        replace(_RESAMPLE, acceptance="paper", refiner="keep"),
        {"judge": _judge_with(_old_law_where_kept)},
    ),
    "no residual": (_RESAMPLE, {"residual": lambda target_probs, draft_probs: target_probs}),
    "residual without clamp": (_RESAMPLE, {"residual": lambda target, draft: (target - draft).abs()}),
    "noisy slots accepted": (replace(RULES["sjd2-1"], acceptance="paper"), {"judge": _noisy_slots_as_drafts}),
    "kept drafts, current law (SJD++ as published)": (
        replace(RULES["sjd_pp"], acceptance="paper", refiner="keep"),
        {},
    ),
    "kept drafts, old law": (RULES["sjd_pp"], {"judge": _judge_with(_old_law_everywhere)}),
    "repeated drafts, flat law": (_LEFT, {"judge": _flat_law_of_repeats}),
    "pure": (DecodingConfig("sjd2_pure", num_levels=2, acceptance="pure"), {}),
    "paper": (replace(RULES["sjd2-1"], acceptance="paper", refiner="keep"), {}),
    "least of four rows": (
        _RESAMPLE,
        {"judge": _judge_with(_run_stays_with_old_law), "num_leading": _least_of_four, "_LEAVE_SHARE": 2.0},
    ),
}


@pytest.mark.parametrize("name", CONTROLS)
def test_wrong_rules_fail(table, name):
    config, broken = CONTROLS[name]
    with ExitStack() as stack:
        for part, wrong in broken.items():
            stack.enter_context(patch.object(verify if part == "residual" else loop, part, wrong))
        assert law_p(table, replace(config, window=4), 16_000) < P_FAIL


def test_the_stand_ins_themselves_change_nothing(table):
    """What the controls share with the right rule, the real parts put back in, passes."""
    same = _judge_with(lambda slots, verdict, refined, law: (verdict, refined, law))
    with patch.multiple(loop, judge=same, _LEAVE_SHARE=2.0), patch.object(verify, "residual", residual):
        assert law_p(table, replace(_RESAMPLE, window=4), 8_000) > P_PASS


def test_chi_square_of_a_wrong_law_fails():
    law = torch.tensor([0.5, 0.3, 0.2, 0.0]).double().numpy()
    counts = torch.tensor([5000, 3000, 2000, 0]).numpy()
    assert p_value([chi_square(counts, law)]) > 0.99
    assert p_value([chi_square(counts[[1, 0, 2, 3]], law)]) < P_FAIL
    assert p_value([chi_square(counts + (law == 0), law)]) == 0
