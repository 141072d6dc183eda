"""What trains and what measures, and the steps of small networks."""

from itertools import pairwise
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

from sjd2_lightning.training.recipes.fitting import divided, fit


class Rows(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


@pytest.mark.parametrize(("num", "share", "measuring"), [(10, 0.3, 3), (10, 0.01, 1), (2, 0.1, 1)])
def test_the_last_parts_measure(num, share, measuring):
    parts = [Rows(torch.full((2,), part), torch.full((2, 3), part)) for part in range(num)]
    train, val = divided(parts, share)
    assert train.x.tolist() == [part for part in range(num - measuring) for _ in range(2)]
    assert val.y[:, 0].tolist() == [part for part in range(num - measuring, num) for _ in range(2)]


def test_steps_see_all_rows_in_turn_and_end_small():
    weight, seen, moves = torch.nn.Parameter(torch.zeros(3)), [], [torch.zeros(3)]
    rows, recipe = Rows(torch.arange(6), torch.ones(6)), SimpleNamespace(steps=40, batch=2, lr=0.1, seed=0)

    def loss_of(part):
        seen.append(part.x.tolist())
        moves.append(weight.detach().clone())
        return -weight.sum()

    done = []
    fit([weight], rows, loss_of, recipe, done.append)
    assert len(done) == sum(done) == len(seen) == 40
    for first in (0, 3):
        assert sorted(row for rows in seen[first : first + 3] for row in rows) == list(range(6))
    assert seen[:3] != seen[3:6], "in another order"
    steps = [float((later - earlier).abs().max()) for earlier, later in pairwise(moves[1:])]
    assert max(steps) == pytest.approx(0.1, rel=0.05)
    assert steps[-1] < 0.01
