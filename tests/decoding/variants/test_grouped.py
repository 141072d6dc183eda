"""Groups of similar codes: which codes belong, and that a group is accepted by its mass."""

import torch

from sjd2_lightning.decoding.config import Grouping
from sjd2_lightning.decoding.rules import Drafted, couple
from sjd2_lightning.decoding.variants.grouped import Grouped, group_of
from sjd2_lightning.embedding import EmbeddingSpace
from tests.decoding.test_rules import _uniform, speculative


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
    space = EmbeddingSpace(torch.zeros(4, 2))  # all codes look alike
    drafted = Drafted(tokens, *laws, tokens < 0)
    # in the order of the target, 1, 3, 0, 2, a group of two is a code and the next: 0.1 / 0.8, 0.9 / 0.2
    share = Grouped(couple, space, Grouping(2, 1.0)).accept(drafted, numbers[0]).float().mean(0)
    assert torch.allclose(share, torch.tensor([0.125, 1.0, 0.0, 0.0]), atol=5 * 0.5 / num**0.5)
    alone = Grouped(couple, space, Grouping(1)).accept(drafted, numbers[0])
    assert torch.equal(alone, speculative(tokens, *laws, *numbers).accept_mask)
