"""A world to act in: a hand picks up a cube and puts it on a goal; and a scripted demonstrator (ours).

Many episodes are stepped together, with the signature of a vector environment of gymnasium: `reset` and
`step` take and give arrays whose first axis is the episode. Lengths are shares of the table's side. The
demonstrator goes round by a side, at a speed and a height that an observation does not tell: actions of a
chunk then depend on those before them, which is what drawing codes one after another is for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

NUM_NUMBERS = 8  # of an observation: cube - hand (3), goal - cube (2), height, holding, closed
NUM_DIMS = 4  # of an action: how the hand moves (3), and whether it closes
STRIDE = 0.08  # that an action of 1 moves the hand by, on each axis
GRASP = 0.05  # least distance of hand and cube at which closing takes it
GOAL = 0.05  # least distance of cube and goal that is a success
NUM_ACTIONS = 64  # of an episode
_HELD_OUT = 1  # of seed sequences: 0 are demonstrations
_ABOVE = 0.12  # height of the hand over the cube before it goes down
_NEAR = 0.15  # distance at which it does
_PUSH = 0.15  # standard deviation of what pushes a demonstrator's hand, in strides


class State(NamedTuple):
    """Where everything is in B episodes.

    Attributes:
        hand, cube: (B, 3) places.
        goal: (B, 2) place on the table.
        holding: (B,) whether the hand holds the cube.
        closed: (B,) whether the hand is closed.
    """

    hand: Array
    cube: Array
    goal: Array
    holding: Array
    closed: Array

    @property
    def solved(self) -> Array:
        """(B,) whether the cube lies on the goal, let go."""
        near = np.linalg.norm(self.cube[:, :2] - self.goal, axis=1) < GOAL
        return near & ~self.holding & (self.cube[:, 2] == 0)


class PickAndPlace:
    """B episodes of the world.

    Attributes:
        state: where everything is; see `State`.
    """

    state: State

    def reset(self, seed: Sequence[int], split: int = _HELD_OUT) -> tuple[Array, dict[str, Any]]:
        """Starts an episode for each seed.

        Args:
            seed: B seeds, each of one episode.
            split: 1 for held-out episodes; 0 is that of demonstrations.

        Returns:
            Observations (B, 8) in [0, 1], and nothing else that is worth to know.
        """
        places = np.stack([np.random.default_rng((split, number)).random(7) for number in seed])
        hand = np.concatenate([places[:, :2], 0.3 + 0.3 * places[:, 2:3]], axis=1)
        cube = np.pad(0.1 + 0.8 * places[:, 3:5], ((0, 0), (0, 1)))
        goal = 0.1 + 0.8 * places[:, 5:7]
        none = np.zeros(len(places), dtype=bool)
        self.state, self.num_actions = State(hand, cube, goal, none, none.copy()), 0
        return self.observation(), {}

    def step(self, actions: Array) -> tuple[Array, Array, Array, Array, dict[str, Any]]:
        """Takes actions (B, 4) in [-1, 1].

        Returns:
            Observations (B, 8), rewards (B,), which episodes are solved (B,), which are out of time (B,), {}.
        """
        before = self.state
        hand = np.clip(before.hand + STRIDE * np.clip(actions[:, :3], -1, 1), 0, 1)
        closed = actions[:, 3] > 0
        near = np.linalg.norm(hand - before.cube, axis=1) < GRASP
        # only a hand that closes around the cube takes it, not one that comes closed
        holding = closed & (before.holding | (near & ~before.closed))
        dropped = np.concatenate([before.cube[:, :2], np.zeros((len(hand), 1))], axis=1)
        cube = np.where(holding[:, None], hand, dropped)
        self.state = State(hand, cube, before.goal, holding, closed)
        self.num_actions += 1
        solved = self.state.solved
        late = np.full(len(solved), self.num_actions >= NUM_ACTIONS)
        return self.observation(), solved.astype(float), solved, late, {}

    def observation(self) -> Array:
        """(B, 8) numbers in [0, 1]; differences are finest near zero, by their signed square root."""
        hand, cube, goal, holding, closed = self.state
        gaps = np.concatenate([cube - hand, goal - cube[:, :2]], axis=1)
        fine = (np.sign(gaps) * np.sqrt(np.abs(gaps)) + 1) / 2
        return np.column_stack([fine, hand[:, 2], holding, closed])


class Demonstrator:
    """Acts in B episodes as a person would show it, each in a style of its own.

    Args:
        seed: B seeds of the episodes.
    """

    def __init__(self, seed: Sequence[int]) -> None:
        styles = np.stack([np.random.default_rng((3, number)).random(4) for number in seed])
        self.side = np.where(styles[:, 0] < 0.5, -1.0, 1.0)
        self.speed, self.bend = 0.6 + 0.4 * styles[:, 1], 0.2 + 0.5 * styles[:, 2]
        self.height = 0.15 + 0.25 * styles[:, 3]
        self.opened = np.zeros(len(styles), dtype=bool)

    def act(self, state: State) -> Array:
        """Actions (B, 4) of the next step."""
        hand, cube, goal, holding, _ = state
        toward = np.where(holding[:, None], goal, cube[:, :2]) - hand[:, :2]
        far = np.linalg.norm(toward, axis=1)
        around = np.stack([-toward[:, 1], toward[:, 0]], axis=1) * (self.side * self.bend)[:, None]
        along = toward + np.where((far > 0.1)[:, None], around, 0)
        # down as it comes near, as on the inside of a cone
        z = np.minimum(1, far / _NEAR) * np.where(holding, self.height, _ABOVE) + 0.02 * holding
        there = (far < 0.6 * GRASP) & (hand[:, 2] < np.where(holding, 0.08, 0.6 * GRASP))
        self.opened |= holding & there
        # what was put down is left alone: the hand goes up and waits
        done = self.opened & ~holding
        move = np.column_stack([along, z - hand[:, 2]])
        move = np.where(done[:, None], [0, 0, 1] * (self.height - hand[:, 2])[:, None], move) / STRIDE
        move = move / np.maximum(np.abs(move).max(axis=1, keepdims=True) / self.speed[:, None], 1)
        closes = np.where(holding, ~self.opened, there & ~done)
        return np.column_stack([move, np.where(closes, 1.0, -1.0)])


class Windows(NamedTuple):
    """Chunks of demonstrations, as codes.

    Attributes:
        numbers: (n, 8) observations.
        codes: (n, A, 4) the actions that follow.
        share_solved: share of the demonstrations that ended on the goal.
    """

    numbers: Array
    codes: Array
    share_solved: float


def demonstrations(num: int, num_steps: int, num_bins: int, seed: int = 0) -> Windows:
    """Windows of demonstrations: one for each action until shortly behind the end.

    Args:
        num: number of demonstrations.
        num_steps: A, actions of a window.
        num_bins: values that numbers are rounded to.
        seed: which demonstrations; those of other seeds are others.
    """
    seeds = [seed * 1_000_003 + number for number in range(num)]
    pushes = np.random.default_rng((2, seed))
    world, person = PickAndPlace(), Demonstrator(seeds)
    seen, _ = world.reset(seeds, split=0)
    numbers, actions, ended = [], [], np.zeros(num, dtype=int)
    for _ in range(NUM_ACTIONS + num_steps):
        numbers.append(seen)
        actions.append(person.act(world.state))
        # what is recorded is what the person meant: it shows the way back from where a push led
        pushed = _PUSH * pushes.standard_normal((num, NUM_DIMS)) * [1, 1, 1, 0]
        seen, _, solved, _, _ = world.step(actions[-1] + pushed)
        ended += ~solved
    codes = to_bins((np.stack(actions) + 1) / 2, num_bins)  # (T, B, 4)
    last = np.minimum(ended + 2, NUM_ACTIONS)
    kept = [(start, row) for row in range(num) for start in range(last[row])]
    chosen = np.array(kept)
    return Windows(
        to_bins(np.stack(numbers), num_bins)[chosen[:, 0], chosen[:, 1]],
        np.stack([codes[start : start + num_steps, row] for start, row in kept]),
        float((ended < NUM_ACTIONS).mean()),
    )


def to_bins(values: Array, num_bins: int) -> Array:
    """Whole numbers below `num_bins` of values in [0, 1], which are cut into bins of one width."""
    return np.clip(np.floor(values * num_bins), 0, num_bins - 1).astype(np.int64)


def actions_of(codes: Array, num_bins: int) -> Array:
    """Actions in [-1, 1] of codes: the middles of their bins."""
    return (2 * codes + 1) / num_bins - 1


def observation_text(numbers: Array) -> str:
    """What a policy reads of an observation (8,) in whole numbers."""
    return " ".join(map(str, numbers.tolist()))
