"""Siblings of a rejected draft, tried in turn, on laws that are written out."""

import pytest
import torch

from sjd2_lightning.decoding.variants.tree import first_sibling
from tests.decoding.test_rules import _one_hot, _uniform, speculative


@pytest.mark.parametrize("num_siblings", [1, 2, 3, 5])
def test_draft_and_siblings_in_turn_give_the_target(num_siblings):
    """The draft's test, then `first_sibling`: tokens follow the target, whatever the number of siblings."""
    draft_law = torch.tensor([0.4, 0.3, 0.2, 0.1, 0.0])
    target_law = torch.tensor([0.1, 0.2, 0.0, 0.4, 0.3])
    num, shape = 200_000, (200_000, 1, 5)
    rng = torch.Generator().manual_seed(0)
    noise = -torch.log(-torch.log(torch.rand(num, 5, generator=rng)))
    candidates = (draft_law.log() + noise).topk(min(num_siblings + 1, 5)).indices
    laws = draft_law.expand(shape), target_law.expand(shape)
    first = speculative(candidates[:, :1], *laws, _uniform(num, 1, seed=1), _uniform(num, 1, seed=2))
    numbers = _uniform(num, candidates.shape[1] - 1, seed=3), _uniform(num, seed=4)
    tokens, which = first_sibling(candidates, laws[0][:, 0], laws[1][:, 0], *numbers)
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
    tokens, which = first_sibling(candidates, certain, target, _uniform(4, 3), _uniform(4, seed=1))
    assert (which == -1).all()
    assert set(tokens.tolist()) <= {1, 2}
