"""Acceptance rules on laws that force always, never and now and then."""

import numpy as np
import pytest
import torch

from sjd2_lightning.decoding.rules import (
    Drafted,
    Exact,
    Match,
    Replay,
    Scores,
    Slots,
    couple,
    judged,
    num_leading,
    resample,
    reuse,
)


def _uniform(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def _one_hot(code: int, size: int = 4) -> torch.Tensor:
    return torch.eye(size)[code]


def slots_of(tokens, **fields) -> Slots:
    """A window of codes (B, W), all clean."""
    return Slots(tokens, torch.ones_like(tokens, dtype=torch.bool), torch.zeros_like(tokens), **fields)


def speculative(tokens, draft, target, accept_u, residual_u):
    """The verdict of `Exact` on drafts (B, W) of laws (B, W, K)."""
    uniforms = torch.stack([accept_u, residual_u, residual_u], dim=-1)
    return Exact(couple)(slots_of(tokens, draft_probs=draft, uniforms=uniforms), Scores(target.log()))


def test_equal_laws_always_accept():
    law = _uniform(50, 3, 4).softmax(-1)
    drafts = torch.randint(4, (50, 3), generator=torch.Generator().manual_seed(0))
    verdict = speculative(drafts, law, law, _uniform(50, 3), _uniform(50, 3, seed=1))
    assert verdict.accept_mask.all()
    assert torch.equal(verdict.tokens, drafts)


def test_disjoint_laws_never_accept_and_draw_the_target():
    draft, target = _one_hot(0).expand(5, 2, 4), _one_hot(3).expand(5, 2, 4)
    verdict = speculative(torch.zeros(5, 2, dtype=torch.long), draft, target, _uniform(5, 2), _uniform(5, 2))
    assert not verdict.accept_mask.any()
    assert (verdict.tokens == 3).all()


def test_a_draft_of_recorded_probability_zero_is_rejected():
    draft, target = _one_hot(0).expand(5, 1, 4), torch.full((5, 1, 4), 0.25)
    tokens = torch.full((5, 1), 2)
    assert not speculative(tokens, draft, target, _uniform(5, 1), _uniform(5, 1)).accept_mask.any()


def test_speculative_rule_is_a_maximal_coupling():
    """Tokens follow the target; drafts stand with probability 1 - TV; given a stand, token = draft."""
    draft_law, target_law = torch.tensor([0.4, 0.3, 0.2, 0.1]), torch.tensor([0.1, 0.3, 0.0, 0.6])
    num = 200_000
    drafts = torch.multinomial(draft_law, num, replacement=True, generator=torch.Generator().manual_seed(0))[
        :, None
    ]
    laws = draft_law.expand(num, 1, 4), target_law.expand(num, 1, 4)
    verdict = speculative(drafts, *laws, _uniform(num, 1, seed=1), _uniform(num, 1, seed=2))
    share = verdict.tokens[:, 0].bincount(minlength=4) / num
    assert torch.allclose(share, target_law, atol=5 * 0.5 / num**0.5)
    overlap = torch.minimum(draft_law, target_law).sum()
    assert abs(verdict.accept_mask.float().mean() - overlap) < 5 * 0.5 / num**0.5
    assert torch.equal(verdict.accept_mask, verdict.tokens == drafts)


def test_replay_takes_the_perturbed_maximum():
    scores = torch.tensor([[[0.0, 1.0, -torch.inf], [0.0, 0.0, 0.0]]])
    noise = torch.tensor([[[2.0, 0.5, 99.0], [0.1, 0.3, 0.2]]])
    verdict = Replay()(slots_of(torch.tensor([[0, 2]]), gumbel=noise), Scores(scores))
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
    return Drafted(torch.zeros(1, 4, dtype=torch.long), draft, target, noisy)


def test_refiners(laws):
    tokens, number = torch.tensor([[0, 1, 0, 1]]), torch.full((1, 4), 0.95)  # draws code 1 of every target
    wanted = {resample: [1, 1, 1, 1], couple: [0, 1, 0, 1], reuse: [0, 1, 0, 0]}
    for refine, drafts in wanted.items():
        assert refine(laws, tokens, number)[0].tolist() == [drafts]


@pytest.mark.parametrize("refine", [resample, couple, reuse])
def test_recorded_laws_are_those_that_drafts_follow(refine):
    """Over drafts of the old law: the share of each code is what the refiner says."""
    num = 100_000
    draft, target = torch.tensor([0.6, 0.3, 0.1, 0.0]), torch.tensor([0.2, 0.4, 0.1, 0.3])
    old, new = draft.expand(num, 1, 4), target.expand(num, 1, 4)
    rng = torch.Generator().manual_seed(5)
    tokens = torch.multinomial(draft, num, replacement=True, generator=rng)[:, None]
    verdict = speculative(tokens, old, new, _uniform(num, 1, seed=1), _uniform(num, 1, seed=2))
    drafted = Drafted(tokens, old, new, tokens < 0)
    drafts, law = refine(drafted, verdict.tokens, _uniform(num, 1, seed=3))
    share = drafts[:, 0].bincount(minlength=4) / num
    assert torch.allclose(share, law[0, 0], atol=5 * 0.5 / num**0.5)
    assert torch.allclose(law.sum(-1), torch.ones(1))


def test_match_stands_on_what_is_drawn_again():
    law = torch.tensor([[[0.5, 0.5], [0.5, 0.5], [1.0, 0.0]]])
    uniforms = torch.tensor([[0.3, 0.8, 0.5]])[..., None].expand(1, 3, 3)
    verdict = Match()(slots_of(torch.tensor([[0, 0, 1]]), uniforms=uniforms), Scores(law.log()))
    assert verdict.tokens.tolist() == [[0, 1, 0]]
    assert verdict.accept_mask.tolist() == [[True, False, False]]


def test_resampling_is_independent_of_the_draft(laws):
    num = 40_000
    many = Drafted(*(part.expand(num, *part.shape[1:]) for part in laws))
    share = resample(many, many.codes, _uniform(num, 4))[0].float().mean(0)
    assert np.allclose(share, [0.75, 0.76, 0.1, 0.1], atol=5 * 0.5 / num**0.5)


def test_structural_slots_always_stand():
    slots = slots_of(torch.tensor([[7, 0]]), gumbel=torch.zeros(1, 2, 3))
    slots = slots._replace(is_code=torch.tensor([[False, True]]))
    verdict = judged(Replay(), slots, Scores(torch.tensor([[[0.0, 1.0, 0.0]] * 2])))
    assert verdict.tokens.tolist() == verdict.drafts.tolist() == [[7, 1]]
    assert verdict.accept_mask.tolist() == [[True, False]]
