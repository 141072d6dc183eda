"""The world: what grasping and letting go do, that seeds decide it, and that its demonstrator solves it."""

import numpy as np
import pytest

from sjd2_lightning.data.sources import pick_place
from sjd2_lightning.data.sources.pick_place import (
    NUM_ACTIONS,
    STRIDE,
    Demonstrator,
    PickAndPlace,
    State,
    actions_of,
    demonstrations,
    to_bins,
)


def world_at(hand, cube=(0.5, 0.5, 0), goal=(0.5, 0.5), holding=False, closed=False) -> PickAndPlace:
    world = PickAndPlace()
    world.reset([0])
    rows = [np.array([value]) for value in (hand, cube, goal, holding, closed)]
    world.state = State(*rows)
    return world


def after(world, *actions):
    for action in actions:
        seen, reward, solved, _, _ = world.step(np.array([action], dtype=float))
    return seen[0], reward[0], bool(solved[0])


def test_a_hand_takes_the_cube_by_closing_around_it_and_drops_it_by_opening():
    world = world_at((0.5, 0.5, 0.02), goal=(0.5, 0.5))
    after(world, (0, 0, 0, 1))
    assert world.state.holding[0]
    after(world, (0, 0, 1, 1))
    assert world.state.cube[0, 2] == pytest.approx(0.02 + STRIDE)
    _, reward, solved = after(world, (0, 0, 0, -1))
    assert world.state.cube[0].tolist() == [0.5, 0.5, 0]
    assert solved
    assert reward == 1


def test_a_hand_that_comes_closed_takes_nothing():
    world = world_at((0.5, 0.5, 0.2), closed=True)
    after(world, (0, 0, -1, 1), (0, 0, -1, 1), (0, 0, -1, 1))
    assert not world.state.holding[0]


def test_a_cube_is_not_there_while_it_is_held_or_away_from_the_goal():
    held = world_at((0.5, 0.5, 0))
    assert not after(held, (0, 0, 0, 1))[2]
    assert not after(world_at((0.9, 0.9, 0.5), goal=(0.6, 0.5)), (0, 0, 0, -1))[2]


def test_moves_are_clipped_and_stay_on_the_table():
    world = world_at((0.5, 0.98, 0.5))
    after(world, (-9, 1, 0, -1))
    assert world.state.hand[0].tolist() == pytest.approx([0.5 - STRIDE, 1, 0.5])


def test_seeds_decide_an_episode_and_held_out_ones_are_others():
    world = PickAndPlace()
    one, _ = world.reset([3, 4])
    assert np.array_equal(one[1:], world.reset([4])[0])
    assert not np.array_equal(one, world.reset([3, 4], split=0)[0])


def test_time_runs_out():
    world = PickAndPlace()
    world.reset([0])
    late = [world.step(np.zeros((1, 4)))[3][0] for _ in range(NUM_ACTIONS)]
    assert late == [False] * (NUM_ACTIONS - 1) + [True]


def test_the_demonstrator_does_the_task_through_bins_too():
    seeds, world = range(100), PickAndPlace()
    world.reset(seeds)
    person = Demonstrator(seeds)
    for _ in range(NUM_ACTIONS):
        codes = to_bins((person.act(world.state) + 1) / 2, 64)
        world.step(actions_of(codes, 64))
    assert world.state.solved.mean() > 0.95


def test_windows_are_what_followed_an_observation():
    found = demonstrations(5, num_steps=8, num_bins=64, seed=1)
    again = demonstrations(5, num_steps=8, num_bins=64, seed=1)
    assert np.array_equal(found.codes, again.codes)
    assert not np.array_equal(found.codes[:20], demonstrations(5, 8, 64, seed=2).codes[:20])
    # windows of one demonstration overlap: the second begins with the second action of the first
    assert np.array_equal(found.codes[0, 1:], found.codes[1, :-1])
    assert found.numbers.shape == (len(found.codes), 8)
    assert found.codes.min() >= 0
    assert found.codes.max() < 64
    assert found.share_solved == 1


def test_bins_have_one_width_and_their_middles_come_back():
    codes = np.arange(64)
    assert np.array_equal(to_bins((actions_of(codes, 64) + 1) / 2, 64), codes)
    assert to_bins(np.array([-1, 0, 0.999, 1, 7]), 64).tolist() == [0, 0, 63, 63, 63]


def test_observations_are_finest_near_zero():
    near, far = (world_at((0.5 + gap, 0.5, 0)).observation()[0, 0] for gap in (0.001, 0.002))
    assert 64 * (near - far) > 0.4, "a millimetre moves nearly half a bin"
    assert len(world_at((0.5, 0.5, 0)).observation()[0]) == pick_place.NUM_NUMBERS
