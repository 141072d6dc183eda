"""A method put together: every name of the configuration has one thing, and what rules read is kept."""

from typing import get_args, get_type_hints

import pytest
import torch

from sjd2_lightning.decoding.config import LOSSLESS, WITH_TREE, DecodingConfig, TreeShape
from sjd2_lightning.decoding.levels import LEVEL_RULES, Gaussian, TableMean
from sjd2_lightning.decoding.method import REFINERS, RULES, TREE_PASSES, Method, verified
from sjd2_lightning.decoding.passes import Pass
from sjd2_lightning.decoding.rules import Rule, Scores, Slots, Verdict
from sjd2_lightning.decoding.variants.first_drafts import FromAbove, OwnMaximum, Repeated, Tied
from sjd2_lightning.decoding.variants.tree import ReplayTreePass, TreePass
from sjd2_lightning.decoding.window import Window
from sjd2_lightning.models.backbone import rows_with_newlines
from sjd2_lightning.noise import NoiseProcess


def method_of(*args, **kwargs):
    table = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    return Method(DecodingConfig(*args, **kwargs), table, 5)


def slots_of(method):
    """The window of two rows in front of their first slot."""
    layout = rows_with_newlines(3, 3, 5, (3, 3))
    state = method.begin(torch.tensor([3, 4]), [layout] * 2, layout.num_slots + method.config.size)
    return Window(method.source, state).slots()


@pytest.mark.parametrize(
    ("field", "things"), [("acceptance", RULES), ("refiner", REFINERS), ("level_rule", LEVEL_RULES)]
)
def test_every_name_has_one_thing(field, things):
    assert set(get_args(get_type_hints(DecodingConfig)[field])) == set(things)
    assert set(TREE_PASSES) == set(WITH_TREE) <= set(LOSSLESS)


@pytest.mark.parametrize("acceptance", RULES)
def test_rules_say_what_they_keep(acceptance):
    method = method_of("sjd2", 4, 1, acceptance)
    rule = method.one_pass.rule
    assert isinstance(rule, Rule)
    assert method.source.keeps == rule.keeps | {"noisy"}
    assert rule.accepts_noisy == (acceptance == "paper")
    slots = slots_of(method)
    held = {name for name, field in slots._asdict().items() if field is not None}
    assert held == {"tokens", "is_code", "levels"} | method.source.keeps


def test_what_nobody_reads_is_not_kept():
    assert method_of("ar", window=1).source.keeps == {"gumbel"}
    assert method_of("jacobi", 4, acceptance="match").source.keeps == {"uniforms"}
    assert method_of("sjd", 4, acceptance="exact").source.keeps == {"draft_probs", "uniforms"}
    assert method_of("sjd", 4, tree=TreeShape(2)).source.keeps == {"gumbel", "draft_probs"}


def test_a_tree_is_fed_where_it_can_help():
    shape = TreeShape(3, 2, 1)
    assert type(method_of("sjd", 4, tree=shape).one_pass) is ReplayTreePass
    assert type(method_of("sjd", 4, acceptance="exact", tree=shape).one_pass) is TreePass
    for method in (method_of("sjd", 1, tree=shape), method_of("sjd", 4, tree=TreeShape(1, 2, 2))):
        assert type(method.one_pass) is Pass


def test_what_slots_start_from():
    def start(source, num_levels=2):
        return type(method_of("sjd2", 4, num_levels, noise=NoiseProcess(source=source)).levels.start)

    assert [start(source) for source in ("gaussian", "tied", "tied_white")] == [Gaussian, Tied, Tied]
    assert start("mean") is start("above") is TableMean
    above = method_of("sjd2", 4, 2, noise=NoiseProcess(source="above"))
    assert [type(event) for event in above.on_entry] == [FromAbove]
    for kind, wanted in (("random", []), ("gumbel", [OwnMaximum]), ("repeat_left", [Repeated])):
        method = method_of("sjd", 4, draft_init=kind)
        assert [type(event) for event in method.on_entry] == wanted


def test_settled_slots_hold_the_verdict_and_others_their_next_draft():
    verdict = Verdict(
        torch.tensor([[1, 2, 3]]), torch.ones(1, 3, dtype=torch.bool), torch.tensor([[4, 5, 6]])
    )
    settled, slots = (
        torch.tensor([[True, True, False]]),
        Slots(verdict.tokens, verdict.accept_mask, verdict.tokens),
    )
    assert verified(slots, verdict, Scores(torch.zeros(1, 3, 5)), settled).tolist() == [[1, 2, 6]]
