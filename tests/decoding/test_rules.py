"""Acceptance rules on laws that force always, never and now and then."""

import numpy as np
import pytest
import torch

from sjd2_lightning.decoding.config import Grouping
from sjd2_lightning.decoding.rules import (
    Laws,
    Verdict,
    couple,
    keep,
    num_leading,
    resample,
    reuse,
    verify_match,
    verify_pure,
    verify_replay,
    verify_siblings,
    verify_speculative,
)
from sjd2_lightning.decoding.variants.grouped import group_of, verify_grouped
from sjd2_lightning.embedding import EmbeddingSpace


def _uniform(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def _one_hot(code: int, size: int = 4) -> torch.Tensor:
    return torch.eye(size)[code]


def test_equal_laws_always_accept():
    law = _uniform(50, 3, 4).softmax(-1)
    drafts = torch.randint(4, (50, 3), generator=torch.Generator().manual_seed(0))
    verdict = verify_speculative(drafts, law, law, _uniform(50, 3), _uniform(50, 3, seed=1))
    assert verdict.accept_mask.all()
    assert torch.equal(verdict.tokens, drafts)


def test_disjoint_laws_never_accept_and_draw_the_target():
    draft, target = _one_hot(0).expand(5, 2, 4), _one_hot(3).expand(5, 2, 4)
    verdict = verify_speculative(
        torch.zeros(5, 2, dtype=torch.long), draft, target, _uniform(5, 2), _uniform(5, 2)
    )
    assert not verdict.accept_mask.any()
    assert (verdict.tokens == 3).all()


def test_a_draft_of_recorded_probability_zero_is_rejected():
    draft, target = _one_hot(0).expand(5, 1, 4), torch.full((5, 1, 4), 0.25)
    tokens = torch.full((5, 1), 2)
    assert not verify_speculative(tokens, draft, target, _uniform(5, 1), _uniform(5, 1)).accept_mask.any()


def test_speculative_rule_is_a_maximal_coupling():
    """Tokens follow the target; drafts stand with probability 1 - TV; given a stand, token = draft."""
    draft_law, target_law = torch.tensor([0.4, 0.3, 0.2, 0.1]), torch.tensor([0.1, 0.3, 0.0, 0.6])
    num = 200_000
    drafts = torch.multinomial(draft_law, num, replacement=True, generator=torch.Generator().manual_seed(0))[
        :, None
    ]
    laws = draft_law.expand(num, 1, 4), target_law.expand(num, 1, 4)
    verdict = verify_speculative(drafts, *laws, _uniform(num, 1, seed=1), _uniform(num, 1, seed=2))
    share = verdict.tokens[:, 0].bincount(minlength=4) / num
    assert torch.allclose(share, target_law, atol=5 * 0.5 / num**0.5)
    overlap = torch.minimum(draft_law, target_law).sum()
    assert abs(verdict.accept_mask.float().mean() - overlap) < 5 * 0.5 / num**0.5
    assert torch.equal(verdict.accept_mask, verdict.tokens == drafts)


@pytest.mark.parametrize("num_siblings", [1, 2, 3, 5])
def test_draft_and_siblings_in_turn_give_the_target(num_siblings):
    """The draft's test, then `verify_siblings`: tokens follow the target, whatever the number of siblings."""
    draft_law = torch.tensor([0.4, 0.3, 0.2, 0.1, 0.0])
    target_law = torch.tensor([0.1, 0.2, 0.0, 0.4, 0.3])
    num, shape = 200_000, (200_000, 1, 5)
    rng = torch.Generator().manual_seed(0)
    noise = -torch.log(-torch.log(torch.rand(num, 5, generator=rng)))
    candidates = (draft_law.log() + noise).topk(min(num_siblings + 1, 5)).indices
    laws = draft_law.expand(shape), target_law.expand(shape)
    first = verify_speculative(candidates[:, :1], *laws, _uniform(num, 1, seed=1), _uniform(num, 1, seed=2))
    numbers = _uniform(num, candidates.shape[1] - 1, seed=3), _uniform(num, seed=4)
    tokens, which = verify_siblings(candidates, laws[0][:, 0], laws[1][:, 0], *numbers)
    settled = torch.where(first.accept_mask[:, 0], candidates[:, 0], tokens)
    share = settled.bincount(minlength=5) / num
    assert torch.allclose(share, target_law, atol=5 * 0.5 / num**0.5)
    chosen = candidates.gather(1, which[:, None].clamp_min(0) + 1)[:, 0]
    assert torch.equal(tokens[which >= 0], chosen[which >= 0])
    assert (which[~first.accept_mask[:, 0]] >= 0).float().mean() > 0.1
    assert (draft_law[chosen[which >= 0]] > 0).all(), "what the draft law cannot give is no sibling"


def test_no_sibling_is_left_of_a_certain_draft():
    certain, target = _one_hot(0).expand(4, 4), torch.tensor([0.0, 0.5, 0.5, 0.0]).expand(4, 4)
    candidates = torch.tensor([[0, 1, 2, 3]]).expand(4, 4)
    tokens, which = verify_siblings(candidates, certain, target, _uniform(4, 3), _uniform(4, seed=1))
    assert (which == -1).all()
    assert set(tokens.tolist()) <= {1, 2}


def _groups(size, gap=1.0, distance=99.0):
    space = EmbeddingSpace(torch.tensor([[0.0, 0.0], [0.1, 0.0], [4.0, 4.0], [4.0, 4.1], [-4.0, -4.0]]))
    law = torch.tensor([0.35, 0.3, 0.2, 0.15, 0.0]).expand(1, 5, 5)
    codes, belongs = group_of(torch.arange(5)[None], law, space, Grouping(size, gap, distance))
    return [sorted(c[b].tolist()) for c, b in zip(codes[0], belongs[0], strict=True)]


def test_groups_are_neighbours_in_likelihood_that_look_alike():
    assert _groups(1, 0.0, 0.0) == [[0], [1], [2], [3], [4]]
    assert _groups(3) == [[0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 4], [3, 4]]
    assert _groups(2) == [[0, 1], [1, 2], [2, 3], [3, 4], [4]]
    assert _groups(3, gap=0.06) == [[0, 1], [0, 1], [2, 3], [2, 3], [4]]
    assert _groups(5, distance=0.1) == [[0, 1], [0, 1], [2, 3], [2, 3], [4]]


def test_grouped_rule_accepts_by_mass_and_never_what_is_cut_off():
    draft, target = torch.tensor([0.6, 0.2, 0.2, 0.0]), torch.tensor([0.1, 0.5, 0.0, 0.4])
    num = 100_000
    laws = draft.expand(num, 4, 4), target.expand(num, 4, 4)
    tokens, numbers = torch.arange(4).expand(num, 4), (_uniform(num, 4), _uniform(num, 4, seed=1))
    group = torch.tensor([[0, 1], [1, 0], [2, 1], [3, 1]]), torch.ones(4, 2, dtype=torch.bool)
    group = tuple(part.expand(num, 4, 2) for part in group)
    verdict = verify_grouped(tokens, *laws, *numbers, group)
    share = verdict.accept_mask.float().mean(0)
    assert torch.allclose(share, torch.tensor([0.75, 0.75, 0.0, 0.0]), atol=5 * 0.5 / num**0.5)
    alone = verify_grouped(tokens, *laws, *numbers, tuple(part[..., :1] for part in group))
    for ours, exact in zip(alone, verify_speculative(tokens, *laws, *numbers), strict=True):
        assert torch.equal(ours, exact)


def test_replay_takes_the_perturbed_maximum():
    scores = torch.tensor([[[0.0, 1.0, -torch.inf], [0.0, 0.0, 0.0]]])
    noise = torch.tensor([[[2.0, 0.5, 99.0], [0.1, 0.3, 0.2]]])
    verdict = verify_replay(torch.tensor([[0, 2]]), scores, noise)
    assert verdict.tokens.tolist() == [[0, 1]]
    assert verdict.accept_mask.tolist() == [[True, False]]


@pytest.mark.parametrize(
    ("mask", "wanted"),
    [([1, 1, 1], 3), ([1, 1, 0], 2), ([1, 0, 1], 1), ([0, 1, 1], 0), ([], 0)],
)
def test_leading_run(mask, wanted):
    assert num_leading(torch.tensor([mask], dtype=torch.bool)).tolist() == [wanted]


@pytest.fixture
def laws():
    """Four slots: ratio of exactly one half, just below, well above, and high but noisy."""
    draft = torch.tensor([[[0.5, 0.5], [0.5, 0.5], [0.5, 0.5], [0.5, 0.5]]])
    target = torch.tensor([[[0.25, 0.75], [0.24, 0.76], [0.9, 0.1], [0.9, 0.1]]])
    noisy = torch.tensor([[False, False, False, True]])
    return Laws(torch.zeros(1, 4, dtype=torch.long), draft, target, noisy)


def test_refiners(laws):
    verdict = Verdict(torch.tensor([[0, 1, 0, 1]]), torch.ones(1, 4, dtype=torch.bool))
    number = torch.full((1, 4), 0.95)  # draws code 1 of every target
    wanted = {resample: [1, 1, 1, 1], couple: [0, 1, 0, 1], keep: [0, 1, 0, 1], reuse: [0, 1, 0, 0]}
    for refiner, tokens in wanted.items():
        assert refiner(laws, verdict, number).tokens.tolist() == [tokens]
    assert keep(laws, verdict, torch.full((1, 4), 0.01)).tokens.tolist() == [[0, 0, 0, 0]]
    assert keep(laws._replace(noisy=None), verdict, number).tokens.tolist() == [[0, 1, 0, 0]]


@pytest.mark.parametrize("refiner", [resample, couple, reuse])
def test_recorded_laws_are_those_that_drafts_follow(refiner):
    """Over drafts of the old law: the share of each code is what the refiner says."""
    num = 100_000
    draft, target = torch.tensor([0.6, 0.3, 0.1, 0.0]), torch.tensor([0.2, 0.4, 0.1, 0.3])
    old, new = draft.expand(num, 1, 4), target.expand(num, 1, 4)
    rng = torch.Generator().manual_seed(5)
    tokens = torch.multinomial(draft, num, replacement=True, generator=rng)[:, None]
    verdict = verify_speculative(tokens, old, new, _uniform(num, 1, seed=1), _uniform(num, 1, seed=2))
    refined = refiner(Laws(tokens, old, new, None), verdict, _uniform(num, 1, seed=3))
    share = refined.tokens[:, 0].bincount(minlength=4) / num
    assert torch.allclose(share, refined.probs[0, 0], atol=5 * 0.5 / num**0.5)
    assert torch.allclose(refined.probs.sum(-1), torch.ones(1))


def test_keeping_follows_another_law_than_it_records():
    num = 100_000
    draft, target = torch.tensor([0.6, 0.3, 0.1, 0.0]), torch.tensor([0.4, 0.4, 0.1, 0.1])
    old, new = draft.expand(num, 1, 4), target.expand(num, 1, 4)
    rng = torch.Generator().manual_seed(5)
    tokens = torch.multinomial(draft, num, replacement=True, generator=rng)[:, None]
    verdict = Verdict(tokens, tokens >= 0)
    refined = keep(Laws(tokens, old, new, None), verdict, _uniform(num, 1, seed=3))
    share = refined.tokens[:, 0].bincount(minlength=4) / num
    assert torch.equal(refined.probs[0, 0], target)
    assert (share - target).abs().max() > 0.1


def test_match_stands_on_what_is_drawn_again():
    law = torch.tensor([[[0.5, 0.5], [0.5, 0.5], [1.0, 0.0]]])
    verdict = verify_match(torch.tensor([[0, 0, 1]]), law, torch.tensor([[0.3, 0.8, 0.5]]))
    assert verdict.tokens.tolist() == [[0, 1, 0]]
    assert verdict.accept_mask.tolist() == [[True, False, False]]


def test_pure_stands_on_clean_slots_near_the_head():
    law = torch.tensor([[[0.0, 1.0]] * 4])
    clean = torch.tensor([[True, False, True, True]])
    verdict = verify_pure(torch.zeros(1, 4, dtype=torch.long), law, torch.full((1, 4), 0.5), clean, 3)
    assert verdict.tokens.tolist() == [[0, 1, 0, 0]]
    assert verdict.accept_mask.tolist() == [[True, False, True, False]]


def test_resampling_is_independent_of_the_draft(laws):
    num = 40_000
    many = Laws(*(part.expand(num, *part.shape[1:]) for part in laws))
    verdict = Verdict(many.draft_tokens, many.noisy)
    share = resample(many, verdict, _uniform(num, 4)).tokens.float().mean(0)
    assert np.allclose(share, [0.75, 0.76, 0.1, 0.1], atol=5 * 0.5 / num**0.5)
