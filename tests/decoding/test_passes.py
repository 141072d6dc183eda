"""What follows from a verdict: which slots stand, and which of them the cache holds."""

import pytest
import torch

from sjd2_lightning.decoding.config import DecodingConfig
from sjd2_lightning.decoding.passes import Pass
from sjd2_lightning.decoding.rules import Scores, Slots, Verdict

ACCEPTED = torch.tensor([[1, 1, 0, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 1, 1], [1, 1, 1, 1, 0]]).bool()
LEVELS = torch.tensor([[0, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 2]])
IS_CODE = torch.ones(4, 5, dtype=torch.bool)
SLOTS = Slots(torch.zeros(4, 5, dtype=torch.long), IS_CODE, LEVELS)
SCORES = Scores(torch.zeros(4, 5, 3))


class Given:
    """A rule whose verdict is written out."""

    keeps = frozenset()

    def __init__(self, accepts_noisy):
        self.accepts_noisy = accepts_noisy

    def __call__(self, slots, scores):
        return Verdict(slots.tokens + 1, ACCEPTED, slots.tokens + 2)


def one_pass(accepts_noisy):
    return Pass(DecodingConfig("sjd2", 5, 2), Given(accepts_noisy))


def test_a_run_ends_at_the_first_slot_that_is_rejected_or_noisy():
    this = one_pass(False).judge(SLOTS, SCORES)
    # the last slot was not fed: nothing follows from its verdict
    assert this.run.tolist() == this.cached.tolist() == [2, 1, 0, 4]


def test_a_rule_that_accepts_noisy_slots_has_them_fed_again():
    it = one_pass(True)
    this = it.judge(SLOTS, SCORES)
    assert this.run.tolist() == [2, 4, 0, 4]
    assert this.cached.tolist() == [2, 1, 0, 4]
    assert (it.least_again, it.most_again) == (1, 5)


def test_other_rules_feed_one_slot_again():
    it = one_pass(False)
    assert (it.least_again, it.most_again) == (1, 1)


def test_a_pass_of_a_longer_shape_commits_no_more_than_the_window():
    for accepts_noisy, wanted in ((False, [1, 1, 0, 1]), (True, [1, 1, 0, 1])):
        it = Pass(DecodingConfig("sjd2", 2, 2, window_shape=5), Given(accepts_noisy))
        assert it.judge(SLOTS, SCORES).run.tolist() == wanted


def test_structural_slots_always_stand():
    slots = SLOTS._replace(is_code=ACCEPTED, tokens=torch.full((4, 5), 7))
    this = one_pass(False).judge(slots, SCORES)
    assert this.run.tolist() == [4, 1, 4, 4]
    assert (this.verdict.tokens == torch.where(ACCEPTED, 8, 7)).all()
    assert (this.verdict.drafts == torch.where(ACCEPTED, 9, 7)).all()


@pytest.mark.parametrize("num_levels", [0, 2])
def test_clean_slots_need_no_mask(num_levels):
    levels = Pass(DecodingConfig("sjd2", 5, num_levels), Given(False)).levels(SLOTS)
    assert (levels is None) == (num_levels == 0)
    assert levels is None or torch.equal(levels, LEVELS[:, :-1])
