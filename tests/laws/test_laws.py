"""The law of whole images against enumeration: every lossless rule passes, and every known wrong rule fails.

Each test decodes thousands of prompts in one batch and compares the images with the exact law over all K^n
of them by one chi-square test, the four prompts of a ragged batch taken together. A rule passes at p > 1e-6.
The two tiers make under 200 such tests, so a correct decoder with fresh seeds would fail the file with
probability below 2e-4 (Bonferroni); the seeds are fixed. A wrong rule must give p < 1e-12 in the same test.
"""

from contextlib import ExitStack
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from torch.nn import functional

from sjd2_lightning.decoding import DecodingConfig, Sampling, decode, drawing, method, passes, rules
from sjd2_lightning.decoding.config import Grouping, TreeShape
from sjd2_lightning.decoding.law import draw, residual
from sjd2_lightning.decoding.rules import Exact, couple, num_leading, resample
from sjd2_lightning.decoding.variants import tree
from sjd2_lightning.noise import NoiseProcess
from tests.tools.enumeration import chi_square, histogram, p_value, sequence_law
from tests.tools.tiny_backbones import RAGGED_PROMPTS, strong_table, tiny_chameleon

P_PASS, P_FAIL = 1e-6, 1e-12
MOST_ROWS = 20_000  # of one batch: five times as many take more memory than a small machine has
SAMPLING = Sampling(guidance_scale=2.0, top_k=2, top_p=0.95, temperature=1.2)
TABLE_PROMPTS = ("p1", "p0 p2", "p0 p0 p3", "p1 p0 p0 p2 p1")

RULES = {
    "sjd": DecodingConfig("sjd", acceptance="exact", refiner="resample"),
    "mc_sjd": DecodingConfig("mc_sjd", acceptance="exact", refiner="couple"),
    "sjd2-1": DecodingConfig("sjd2", acceptance="exact", num_levels=1),
    "sjd2-4": DecodingConfig("sjd2", acceptance="exact", num_levels=4),
    "sjd2-karras-resample": DecodingConfig(
        "sjd2", acceptance="exact", num_levels=2, refiner="resample", noise=NoiseProcess(schedule="karras")
    ),
    "jacobi": DecodingConfig("jacobi", acceptance="match"),
    "sjd-left": DecodingConfig("sjd", acceptance="exact", refiner="resample", draft_init="repeat_left"),
    "mc_sjd-above": DecodingConfig("mc_sjd", acceptance="exact", draft_init="repeat_above"),
    "sjd_pp": DecodingConfig("sjd_pp", acceptance="exact", refiner="reuse"),
    "sjd_pac": DecodingConfig("sjd_pac", acceptance="exact", tree=TreeShape(3, 2, 2)),
    "sjd_pac-deep": DecodingConfig(
        "sjd_pac", acceptance="exact", refiner="resample", tree=TreeShape(2, 9, 9)
    ),
    "sjd2-1-tree": DecodingConfig("sjd2", acceptance="exact", num_levels=1, tree=TreeShape(3, 2, 1)),
    "sjd-replay": DecodingConfig("sjd"),
    "sjd-replay-tree": DecodingConfig("sjd", tree=TreeShape(3, 3, 2)),
    "sjd2-replay": DecodingConfig("sjd2", num_levels=2, draft_init="gumbel"),
}


@pytest.fixture(scope="module")
def table():
    """The fake backbone, its layout of 3 x 2 codes, and prompts of unequal length and law; guided and cut."""
    backbone = strong_table(3, num_prompts=5, seed=1, scale=1.0)
    return backbone, backbone.layout(3, 2), TABLE_PROMPTS, SAMPLING


@pytest.fixture(scope="module")
def strong():
    """A table whose codes depend on those before them as strongly as they can while all stay possible."""
    backbone = strong_table(3, num_prompts=5, seed=2, scale=2.0)
    return backbone, backbone.layout(3, 2), TABLE_PROMPTS, Sampling()


@pytest.fixture(scope="module")
def trunk():
    """A real trunk with cache, its layout of 2 x 2 codes, and prompts of unequal length."""
    backbone = tiny_chameleon(4, seed=3, scale=0.6)
    return backbone, backbone.layout(4, 4), RAGGED_PROMPTS, SAMPLING


_exact_laws: dict = {}


def law_p(
    model, config: DecodingConfig, num_draws: int, num_prompts: int = 4, batch_size: int | None = None
) -> float:
    """p-value of `num_draws` images, the prompts in turn, under their enumerated laws."""
    backbone, layout, prompts, sampling = model
    config = replace(config, sampling=sampling)
    prompts = prompts[:num_prompts]
    rows = [prompts[draw % num_prompts] for draw in range(num_draws)]
    batch_size = batch_size or min(num_draws, MOST_ROWS)
    seeds = range(num_draws)
    batches = [seeds[start : start + batch_size] for start in range(0, num_draws, batch_size)]
    outputs = [decode(backbone, [rows[seed] for seed in batch], batch, config, layout) for batch in batches]
    images = torch.cat([output.image_ids for output in outputs])
    statistics = []
    for number, prompt in enumerate(prompts):
        key = (backbone, prompt)
        if key not in _exact_laws:
            _exact_laws[key] = sequence_law(backbone, prompt, layout, sampling)
        counts = histogram(images[number::num_prompts], backbone.num_codes)
        statistics.append(chi_square(counts, _exact_laws[key]))
    return p_value(statistics)


def test_the_laws_are_worth_testing(table, trunk):
    """Prompts differ in length and law, many images are likely, and top-k forbids most of the others."""
    for backbone, layout, prompts, sampling in (table, trunk):
        assert len({len(backbone.prompt_ids(prompt, layout)) for prompt in prompts}) == 4
        laws = [sequence_law(backbone, prompt, layout, sampling) for prompt in prompts]
        assert all(abs(law.sum() - 1) < 1e-9 for law in laws)
        assert all((law > 2e-3).sum() > 10 for law in laws)
        assert all((law == 0).mean() > 0.5 for law in laws)
        assert all(abs(laws[a] - laws[b]).sum() > 0.2 for a in range(4) for b in range(a))


def test_the_strong_law_is_strong(strong):
    """Every code is possible everywhere, and what stands before it moves its law by half in the mean."""
    laws = strong[0].table.softmax(-1).flatten(0, 2)
    assert laws.min() > 1e-5
    assert 0.5 * (laws[:, None] - laws).abs().sum(-1).mean() > 0.5


@pytest.mark.parametrize("rule", RULES)
def test_strong_law(strong, rule):
    assert law_p(strong, replace(RULES[rule], window=4), 4_000) > P_PASS


@pytest.mark.parametrize("rule", ["mc_sjd", "sjd_pac", "sjd2-1"])
def test_rows_do_not_depend_on_the_size_of_the_batch(table, rule):
    """What the laws here are measured on in one batch is, row by row, what batches of 1 and 4 give."""
    backbone, layout, prompts, sampling = table
    config = replace(RULES[rule], window=4, sampling=sampling)
    whole = decode(backbone, prompts * 25, range(100), config, layout).image_ids
    for size in (1, 4):
        for start in range(0, 12, size):
            seeds = range(start, start + size)
            part = decode(backbone, (prompts * 3)[start : start + size], seeds, config, layout)
            assert torch.equal(part.image_ids, whole[start : start + size])


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
    assert law_p(table, replace(RULES[rule], window=4), 100_000) > P_PASS


@pytest.mark.slow
@pytest.mark.parametrize("window", [2, 4])
@pytest.mark.parametrize("rule", RULES)
def test_trunk_law_closely(trunk, rule, window):
    assert law_p(trunk, replace(RULES[rule], window=window), 40_000) > P_PASS


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("rule", RULES)
def test_table_law_one_by_one_and_in_fours(table, rule, batch_size):
    """What the tests above decode in one batch, in batches of the size that people use."""
    config = replace(RULES[rule], window=4)
    num_draws = 2_000 * batch_size
    assert law_p(table, config, num_draws, num_prompts=batch_size, batch_size=batch_size) > P_PASS


class Changed:
    """A rule that changes the verdict of a right one."""

    def __init__(self, right, change):
        self.right, self.change = right, change
        self.keeps, self.accepts_noisy = right.keeps, right.accepts_noisy

    def __call__(self, slots, scores):
        return self.change(slots, self.right(slots, scores))


def changed(change):
    """The rule "exact" or "paper" of a method, with its verdict changed."""
    return {
        name: lambda config, space, make=RIGHT[name]: Changed(make(config, space), change)
        for name in ("exact", "paper")
    }


def _old_law_where_kept(slots, verdict):
    kept = (verdict.drafts == slots.tokens)[..., None]
    return verdict._replace(draft_probs=slots.draft_probs.where(kept, verdict.draft_probs))


def _old_law_everywhere(slots, verdict):
    return verdict._replace(draft_probs=slots.draft_probs)


def _run_stays_with_old_law(slots, verdict):
    run = (verdict.accept_mask | ~slots.is_code).long().cumprod(-1).bool()
    law = slots.draft_probs.where(run[..., None], verdict.draft_probs)
    return verdict._replace(drafts=slots.tokens.where(run, verdict.drafts), draft_probs=law)


def _least_of_four(mask):
    return num_leading(mask).view(-1, 4).amin(-1, keepdim=True).expand(-1, 4).reshape(-1)


class NoisySlotsStand(Exact):
    """The exact test, also where the slot was fed with noise."""

    accepts_noisy = True


class FlatLawOfRepeats(Exact):
    """The exact test, as if repeated drafts had been drawn from a flat law."""

    def __call__(self, slots, scores):
        certain = slots.draft_probs.amax(-1, keepdim=True) == 1
        flat = slots.draft_probs.where(~certain, 1 / slots.draft_probs.shape[-1])
        return super().__call__(slots._replace(draft_probs=flat), scores)


def _not_renormalised(probs, uniform):
    """A draw from weights as if they summed to one: what is missing goes to the last code."""
    sums = probs.cumsum(-1)
    return torch.searchsorted(sums, uniform[..., None]).squeeze(-1).clamp_max(probs.shape[-1] - 1)


def _siblings_with_replacement(self, slots, noise):
    tokens, branches = _REAL_GROW(self, slots, noise)
    rng = torch.Generator().manual_seed(int(noise.view(torch.int32).sum()) % 2**31)
    for number in range(self.width - 1):
        law = slots.draft_probs[:, : self.depth].flatten(0, 1)
        tokens[:, :, number, 0] = torch.multinomial(law, 1, generator=rng).view(-1, self.depth)
    return tokens, branches._replace(embeddings=functional.embedding(tokens.flatten(1), self.table))


def _siblings_by_the_whole_law(candidates, draft_probs, target_probs, accept_u, residual_u):
    """Siblings tested against the law that still holds the candidates before them."""
    rest, which = residual(target_probs, draft_probs), torch.full_like(residual_u, -1).long()
    for number in range(candidates.shape[1] - 1):
        rest = rest / rest.sum(-1, keepdim=True)
        sibling = candidates[:, number + 1 : number + 2]
        odds = (rest / draft_probs).gather(1, sibling).squeeze(1)
        which = torch.where((accept_u[:, number] < odds) & (which < 0), number, which)
        rest = residual(rest, draft_probs)
    tokens = candidates.gather(1, which[:, None] + 1).squeeze(1)
    return tokens.where(which >= 0, draw(rest, residual_u)), which


def _siblings_of_a_bare_residual(candidates, draft_probs, target_probs, accept_u, residual_u):
    """The right rule, were residual and draft law not made to sum to one again."""
    rest, which = residual(target_probs, draft_probs), torch.full_like(residual_u, -1).long()
    for number in range(candidates.shape[1] - 1):
        draft_probs = draft_probs.scatter(-1, candidates[:, number : number + 1], 0.0)
        sibling = candidates[:, number + 1 : number + 2]
        odds = (rest / draft_probs.clamp_min(1e-9)).gather(1, sibling).squeeze(1)
        which = torch.where((accept_u[:, number] < odds) & (which < 0), number, which)
        rest = residual(rest, draft_probs)
    tokens = candidates.gather(1, which[:, None] + 1).squeeze(1)
    return tokens.where(which >= 0, draw(rest, residual_u)), which


def _law_behind_the_draft(self, window, slots, this, branches, behind):
    """What follows a sibling, drawn from the law that follows the draft."""
    laws = this.scores.log[:, self.tree.behind][:, :, None].expand(*branches.shape, -1)
    return _REAL_FOLLOW(self, window, slots, this, branches, laws.flatten(1, 3))


_REAL_GROW, _REAL_FOLLOW = tree.Tree.grow, tree.TreePass.follow
RIGHT = dict(method.RULES)
_COUPLE, _RESAMPLE, _LEFT = RULES["mc_sjd"], RULES["sjd"], RULES["sjd-left"]

# name: the nearest right method, and what is broken in it
CONTROLS = {
    "old law on kept slots": (_COUPLE, changed(_old_law_where_kept)),
    "old law on every slot": (_COUPLE, changed(_old_law_everywhere)),
    "keep at half, current law (paper)": (replace(_RESAMPLE, acceptance="paper", refiner="keep"), {}),
    "keep at half, old law": (
        replace(_RESAMPLE, acceptance="paper", refiner="keep"),
        changed(_old_law_where_kept),
    ),
    "no residual": (_RESAMPLE, {"residual": lambda target_probs, draft_probs: target_probs}),
    "residual without clamp": (_RESAMPLE, {"residual": lambda target, draft: (target - draft).abs()}),
    "noisy slots accepted": (
        replace(RULES["sjd2-1"], acceptance="paper"),
        {"paper": lambda config, space: NoisySlotsStand(couple)},
    ),
    "kept drafts, current law (SJD++ as published)": (
        replace(RULES["sjd_pp"], acceptance="paper", refiner="keep"),
        {},
    ),
    "kept drafts, old law": (RULES["sjd_pp"], changed(_old_law_everywhere)),
    "repeated drafts, flat law": (_LEFT, {"exact": lambda config, space: FlatLawOfRepeats(resample)}),
    "residual not renormalised": (_RESAMPLE, {"draw": _not_renormalised}),
    "groups of codes": (DecodingConfig("gsd", acceptance="grouped", groups=Grouping(3, 1.0, 99.0)), {}),
    "pure": (DecodingConfig("sjd2_pure", num_levels=2, acceptance="pure"), {}),
    "paper": (replace(RULES["sjd2-1"], acceptance="paper", refiner="keep"), {}),
    "least of four rows": (
        _RESAMPLE,
        changed(_run_stays_with_old_law) | {"num_leading": _least_of_four, "LEAVE_SHARE": 1.0},
    ),
}


HOMES = {"residual": rules, "draw": rules, "num_leading": passes, "LEAVE_SHARE": drawing}


@pytest.mark.parametrize("name", CONTROLS)
def test_wrong_rules_fail(table, name):
    config, broken = CONTROLS[name]
    with ExitStack() as stack:
        for part, wrong in broken.items():
            if part in RIGHT:
                stack.enter_context(patch.dict(method.RULES, {part: wrong}))
            else:
                stack.enter_context(patch.object(HOMES[part], part, wrong))
        assert law_p(table, replace(config, window=4), 16_000) < P_FAIL


TREE_CONTROLS = {
    "siblings with replacement": (tree.Tree, "grow", _siblings_with_replacement),
    "siblings tested against the whole draft law": (tree, "first_sibling", _siblings_by_the_whole_law),
    "residual of siblings not renormalised": (tree, "first_sibling", _siblings_of_a_bare_residual),
    "law behind the draft": (tree.TreePass, "follow", _law_behind_the_draft),
}


@pytest.mark.parametrize(
    "name",
    [
        name if name == "law behind the draft" else pytest.param(name, marks=pytest.mark.slow)
        for name in TREE_CONTROLS
    ],
)
def test_wrong_trees_fail(strong, name):
    config = DecodingConfig("sjd_pac", 9, acceptance="exact", refiner="resample", tree=TreeShape(3, 4, 2))
    with patch.object(*TREE_CONTROLS[name]):
        assert law_p(strong, config, 48_000) < P_FAIL


def test_the_right_tree_passes(strong):
    config = DecodingConfig("sjd_pac", 9, acceptance="exact", refiner="resample", tree=TreeShape(3, 4, 2))
    assert law_p(strong, config, 48_000) > P_PASS


def test_the_stand_ins_themselves_change_nothing(table):
    """What the controls share with the right rule, the real parts put back in, passes."""
    same = changed(lambda slots, verdict: verdict)
    with (
        patch.dict(method.RULES, same),
        patch.object(drawing, "LEAVE_SHARE", 1.0),
        patch.object(rules, "residual", residual),
    ):
        assert law_p(table, replace(_RESAMPLE, window=4), 8_000) > P_PASS


def test_chi_square_of_a_wrong_law_fails():
    law = torch.tensor([0.5, 0.3, 0.2, 0.0]).double().numpy()
    counts = torch.tensor([5000, 3000, 2000, 0]).numpy()
    assert p_value([chi_square(counts, law)]) > 0.99
    assert p_value([chi_square(counts[[1, 0, 2, 3]], law)]) < P_FAIL
    assert p_value([chi_square(counts + (law == 0), law)]) == 0
