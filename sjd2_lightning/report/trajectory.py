"""How drafts came to their final values: images decoded again with an observer, untimed.

Source: ours, after the paper's figure 8, which shows how tokens settle along the iterations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sjd2_lightning.decoding.loop import decode
from sjd2_lightning.decoding.methods import DecodingConfig
from sjd2_lightning.decoding.stats import Iteration
from sjd2_lightning.models.backbone import Backbone, ImageLayout
from sjd2_lightning.prompts import PromptItem

OUTSIDE = -1


@dataclass(frozen=True)
class Trajectory:
    """What the model thought of each code after each forward pass; codes in raster order, row ends left out.

    Attributes:
        item: the prompt.
        method: name of the method.
        guesses: (P, C) what verification gave each code of the window; left of it what was committed, right
            of it -1.
        levels: (P, C) noise level that a draft was fed with; -1 outside the window.
        num_committed: (P,) codes committed after each pass.
        size: (height, width) in codes.
    """

    item: PromptItem
    method: str
    guesses: np.ndarray
    levels: np.ndarray
    num_committed: np.ndarray
    size: tuple[int, int]

    @property
    def num_passes(self) -> int:
        return len(self.guesses)

    @property
    def image_ids(self) -> np.ndarray:
        """(C,) the codes of the image."""
        return self.guesses[-1]

    @property
    def num_seen(self) -> np.ndarray:
        """(P,) codes committed or in the window in each pass."""
        return (self.guesses != OUTSIDE).sum(1)

    @property
    def entered(self) -> np.ndarray:
        """(C,) pass, from 0, that first looked at each code."""
        return (self.guesses != OUTSIDE).argmax(0)

    @property
    def committed(self) -> np.ndarray:
        """(C,) pass that committed each code."""
        return (self.num_committed[:, None] > np.arange(self.guesses.shape[1])).argmax(0)

    @property
    def settled(self) -> np.ndarray:
        """(C,) pass from which on the guess was the final value, never after the pass that committed it."""
        unchanged = np.logical_and.accumulate((self.guesses == self.image_ids)[::-1])
        return self.num_passes - unchanged.sum(0)

    @property
    def lead(self) -> np.ndarray:
        """(C,) passes between settling and being committed."""
        return self.committed - self.settled


class TrajectoryObserver:
    """Observer of `decode` for a batch of one image: keeps guesses and levels of each pass, on the CPU."""

    def __init__(self, layout: ImageLayout) -> None:
        self.layout = layout
        self._slots: list[tuple[int, int, list[int], list[int]]] = []

    def __call__(self, iteration: Iteration) -> None:
        """Notes one pass."""
        if iteration.rows.tolist() != [0]:
            raise ValueError("a trajectory is of one image: decode a single prompt")
        head, count = int(iteration.heads[0]), int(iteration.num_committed[0])
        self._slots.append((head, count, iteration.tokens[0].tolist(), iteration.levels[0].tolist()))

    def trajectory(self, item: PromptItem, method: str) -> Trajectory:
        """What was seen since the observer was made."""
        num_slots, codes = self.layout.num_slots, self.layout.code_slots.numpy()
        guesses = np.full((len(self._slots), num_slots), OUTSIDE)
        levels = np.full_like(guesses, OUTSIDE)
        done = np.full(num_slots, OUTSIDE)
        ends = np.zeros(len(self._slots), dtype=int)
        for place, (head, count, tokens, noise) in enumerate(self._slots):
            end = min(head + len(tokens), num_slots)
            guesses[place] = done
            guesses[place, head:end] = tokens[: end - head]
            levels[place, head:end] = noise[: end - head]
            done[head : head + count] = tokens[:count]
            ends[place] = head + count
        num_committed = (codes < ends[:, None]).sum(1)
        size = (self.layout.height, self.layout.width)
        return Trajectory(item, method, guesses[:, codes], levels[:, codes], num_committed, size)


def trace(
    backbone: Backbone,
    methods: Mapping[str, DecodingConfig],
    prompts: Sequence[PromptItem],
    layout: ImageLayout,
) -> list[Trajectory]:
    """Decodes prompts by every method, one image at a time, with an observer (ours; the paper's figure 8).

    Args:
        backbone: model, in eval mode.
        methods: configurations by name.
        prompts: few: each is decoded once more by every method.
        layout: of the images.
    """
    found = []
    for item in prompts:
        for name, config in methods.items():
            observer = TrajectoryObserver(layout)
            decode(backbone, [item.prompt], [item.seed], config, layout, observer)
            found.append(observer.trajectory(item, name))
    return found


@dataclass(frozen=True)
class Settling:
    """How a method's drafts settled, over all its trajectories.

    Attributes:
        mean_lead: passes that a code had its final value before it was committed.
        first_guess: share of codes whose first guess was final.
        ahead: entry k is the share of codes that were final k passes before they were committed.
    """

    mean_lead: float
    first_guess: float
    ahead: tuple[float, ...]

    def as_object(self) -> dict[str, Any]:
        """For report.json."""
        return {"mean_lead": self.mean_lead, "first_guess": self.first_guess, "ahead": list(self.ahead)}


def settling(trajectories: Sequence[Trajectory]) -> dict[str, Settling]:
    """By method, how its drafts settled."""
    found = {}
    for name in dict.fromkeys(trajectory.method for trajectory in trajectories):
        own = [trajectory for trajectory in trajectories if trajectory.method == name]
        lead = np.concatenate([trajectory.lead for trajectory in own])
        first = np.concatenate([trajectory.settled == trajectory.entered for trajectory in own])
        ahead = tuple(float((lead >= passes).mean()) for passes in range(int(lead.max()) + 1))
        found[name] = Settling(float(lead.mean()), float(first.mean()), ahead)
    return found
