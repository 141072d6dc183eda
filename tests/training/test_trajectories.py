"""What a teacher shows: every state on its way is one pass from the last, and labels mix by distance."""

import math

import pytest
import torch

from sjd2_lightning.decoding import DecodingConfig, decode
from sjd2_lightning.training.states import TeacherForced, logits_of
from sjd2_lightning.training.trajectories import GREEDY, jacobi_trajectories, near_enough
from tests.decoding.variants.test_early_exit import TEXTS, N, policy

SEEDS = list(range(len(TEXTS)))


@pytest.mark.parametrize("batch", [4, 3])
def test_each_state_is_one_pass_behind_the_last_and_the_end_is_plain_decoding(batch):
    model = policy()
    found = jacobi_trajectories(model, TEXTS, SEEDS, model.chunk, batch)
    plain = decode(model, TEXTS, SEEDS, DecodingConfig("ar", window=1, sampling=GREEDY), model.chunk)
    assert torch.equal(found.ends.long(), plain.slot_ids)
    numbers = [[int(word) for word in text.split()] for text in TEXTS]
    with torch.no_grad():
        for place in range(N):
            sample = TeacherForced(numbers, found.states[:, place].long().view(-1, 4, 3), model.chunk)
            assert torch.equal(logits_of(model, sample, None).argmax(-1), found.states[:, place + 1].long())
    assert (found.num_passes > 2).all()


def test_drawn_states_are_on_the_way_and_spread_over_it():
    model = policy()
    found = jacobi_trajectories(model, TEXTS, SEEDS, model.chunk)
    rows = torch.arange(4).repeat_interleave(200)
    drawn = found.drawn(rows, torch.Generator().manual_seed(0))
    for row in range(4):
        ways = found.states[row, : found.num_passes[row]]
        counts = (drawn[rows == row][:, None] == ways).all(-1).sum(0)
        assert (counts > 0).all()
        assert counts.sum() >= 200


def test_labels_are_the_teacher_s_up_to_a_distance():
    shown = torch.tensor([[5, 5, 5, 5], [5, 5, 5, 5], [5, 5, 5, 5]])
    teacher = torch.tensor([[5, 5, 5, 5], [6, 4, 6, 4], [9, 9, 1, 5]])  # 0, 1 and 3 bins away
    near = {limit: near_enough(teacher, shown, limit).tolist() for limit in (-1, 0.9, 1, 3, math.inf)}
    far, all_of_them = [True, True, False], [True] * 3
    assert near == {-1: [False] * 3, 0.9: [True, False, False], 1: far, 3: all_of_them, math.inf: all_of_them}
