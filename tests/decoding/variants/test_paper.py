"""The paper's printed rules: what is kept, what it follows, and what stands when it is clean."""

import torch

from sjd2_lightning.decoding.rules import Drafted, Scores
from sjd2_lightning.decoding.variants.paper import Pure, keep
from tests.decoding.test_rules import _uniform, slots_of


def test_clean_drafts_are_kept_at_a_ratio_of_one_half():
    """Four slots: ratio of exactly one half, just below, well above, and high but noisy."""
    draft = torch.tensor([[[0.5, 0.5]] * 4])
    target = torch.tensor([[[0.25, 0.75], [0.24, 0.76], [0.9, 0.1], [0.9, 0.1]]])
    noisy = torch.tensor([[False, False, False, True]])
    drafted = Drafted(torch.zeros(1, 4, dtype=torch.long), draft, target, noisy)
    number = torch.full((1, 4), 0.95)  # draws code 1 of every target
    assert keep(drafted, drafted.codes, number)[0].tolist() == [[0, 1, 0, 1]]
    assert keep(drafted, drafted.codes, torch.full((1, 4), 0.01))[0].tolist() == [[0, 0, 0, 0]]
    clean = drafted._replace(noisy=~noisy & noisy)
    assert keep(clean, drafted.codes, number)[0].tolist() == [[0, 1, 0, 0]]


def test_keeping_follows_another_law_than_it_records():
    num = 100_000
    draft, target = torch.tensor([0.6, 0.3, 0.1, 0.0]), torch.tensor([0.4, 0.4, 0.1, 0.1])
    old, new = draft.expand(num, 1, 4), target.expand(num, 1, 4)
    rng = torch.Generator().manual_seed(5)
    tokens = torch.multinomial(draft, num, replacement=True, generator=rng)[:, None]
    drafts, law = keep(Drafted(tokens, old, new, tokens < 0), tokens, _uniform(num, 1, seed=3))
    share = drafts[:, 0].bincount(minlength=4) / num
    assert torch.equal(law[0, 0], target)
    assert (share - target).abs().max() > 0.1


def test_pure_stands_on_clean_slots_near_the_head():
    law = torch.tensor([[[0.0, 1.0]] * 4])
    clean = torch.tensor([[True, False, True, True]])
    slots = slots_of(torch.zeros(1, 4, dtype=torch.long), uniforms=torch.full((1, 4, 3), 0.5))
    verdict = Pure(3)(slots._replace(levels=(~clean).long()), Scores(law.log()))
    assert verdict.tokens.tolist() == [[0, 1, 0, 0]]
    assert verdict.accept_mask.tolist() == [[True, False, True, False]]
