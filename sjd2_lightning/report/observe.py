"""Decodes a few prompts once more and keeps what a report shows of them.

- trajectory: the model's guess for each code after each forward pass;
- settling: from which pass on those guesses are final;
- replay: partial images on the way, drawn from the guesses.

Also times single passes. All of it happens after the comparison and is never timed with it.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from sjd2_lightning.decoding.config import DecodingConfig
from sjd2_lightning.decoding.loop import decode
from sjd2_lightning.decoding.output import Iteration
from sjd2_lightning.evaluation.prompts import PromptItem
from sjd2_lightning.evaluation.results import EvaluationResult
from sjd2_lightning.models.backbone import Backbone, ImageLayout, evaluation_mode
from sjd2_lightning.models.image_tokenizer import to_uint8
from sjd2_lightning.report.cost import PassCost, measure_pass_costs
from sjd2_lightning.report.likeness import best_known
from sjd2_lightning.run.stages import stage

OUTSIDE = -1  # guess and level of a code that a pass did not look at
MAX_FRAME_PX = 160
_CHUNK = 8  # images decoded together: bounds the memory of large image decoders
_WEBP_QUALITY = 88


@dataclass(frozen=True)
class Trajectory:
    """The model's guess for each code after each of P forward passes; C codes in raster order, no row ends.

    Attributes:
        item: the prompt.
        method: name of the method.
        guesses: (P, C) token that verification gave each code of the window; left of the window the committed
            token, right of it `OUTSIDE`.
        levels: (P, C) noise level that each draft was fed with; `OUTSIDE` outside the window.
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
        """(C,) pass, from 0, in which each code entered the window."""
        return (self.guesses != OUTSIDE).argmax(0)

    @property
    def committed(self) -> np.ndarray:
        """(C,) pass that committed each code."""
        return (self.num_committed[:, None] > np.arange(self.guesses.shape[1])).argmax(0)

    @property
    def settled(self) -> np.ndarray:
        """(C,) pass from which on the guess is final, never later than the pass that committed the code."""
        unchanged = np.logical_and.accumulate((self.guesses == self.image_ids)[::-1])
        return self.num_passes - unchanged.sum(0)

    @property
    def lead(self) -> np.ndarray:
        """(C,) passes between settling and commit."""
        return self.committed - self.settled


class Moment(NamedTuple):
    """The C codes of an image after one pass, in raster order.

    Attributes:
        guesses: (C,) as a row of `Trajectory.guesses`.
        levels: (C,) as a row of `Trajectory.levels`.
        num_committed: codes committed so far.
    """

    guesses: np.ndarray
    levels: np.ndarray
    num_committed: int


class TrajectoryObserver:
    """Observer of `decode` for one image: keeps guesses and levels of each pass, on the CPU.

    Another thread may ask for moments while passes go on.
    """

    def __init__(self, layout: ImageLayout) -> None:
        self.layout = layout
        self._codes = layout.code_slots.numpy()
        self._done: list[int] = []  # committed tokens
        self._slots: list[tuple[int, int, list[int], list[int]]] = []

    def __call__(self, iteration: Iteration) -> None:
        """Keeps what one pass did."""
        if iteration.rows.tolist() != [0]:
            raise ValueError("a trajectory shows one image; decode a single prompt")
        head, count = int(iteration.heads[0]), int(iteration.num_committed[0])
        tokens = iteration.tokens[0].tolist()
        self._done += tokens[:count]  # before the pass can be asked for
        self._slots.append((head, count, tokens, iteration.levels[0].tolist()))

    @property
    def num_passes(self) -> int:
        return len(self._slots)

    def moment(self, place: int) -> Moment:
        """The image after pass `place`, from 0."""
        head, count, tokens, noise = self._slots[place]
        guesses = np.full(self.layout.num_slots, OUTSIDE)
        levels = np.full_like(guesses, OUTSIDE)
        end = min(head + len(tokens), len(guesses))
        guesses[:head] = self._done[:head]
        guesses[head:end] = tokens[: end - head]
        levels[head:end] = noise[: end - head]
        num_committed = int((self._codes < head + count).sum())
        return Moment(guesses[self._codes], levels[self._codes], num_committed)

    def trajectory(self, item: PromptItem, method: str) -> Trajectory:
        """The trajectory of all passes so far."""
        guesses, levels, num_committed = zip(*map(self.moment, range(self.num_passes)), strict=True)
        size = (self.layout.height, self.layout.width)
        return Trajectory(item, method, np.stack(guesses), np.stack(levels), np.array(num_committed), size)


def trace(
    backbone: Backbone,
    methods: Mapping[str, DecodingConfig],
    prompts: Sequence[PromptItem],
    layout: ImageLayout,
) -> list[Trajectory]:
    """Trajectories of prompts by every method, decoded one image at a time (shown like the paper's figure 8).

    Args:
        backbone: model, in eval mode.
        methods: configuration of each method by name.
        prompts: a few prompts; each is decoded once more by every method.
        layout: image size and row ends.
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
    """How early a method's drafts are final, over all its trajectories.

    Attributes:
        mean_lead: mean number of passes between settling and commit of a code.
        first_guess: share of codes whose first guess was final.
        ahead: entry k is the share of codes that were final k passes before their commit.
    """

    mean_lead: float
    first_guess: float
    ahead: tuple[float, ...]

    def as_object(self) -> dict[str, Any]:
        """The JSON object in report.json."""
        return {"mean_lead": self.mean_lead, "first_guess": self.first_guess, "ahead": list(self.ahead)}


def settling(trajectories: Sequence[Trajectory]) -> dict[str, Settling]:
    """How early the drafts of each method are final, by its name."""
    found = {}
    for name in dict.fromkeys(trajectory.method for trajectory in trajectories):
        own = [trajectory for trajectory in trajectories if trajectory.method == name]
        lead = np.concatenate([trajectory.lead for trajectory in own])
        first = np.concatenate([trajectory.settled == trajectory.entered for trajectory in own])
        ahead = tuple(float((lead >= passes).mean()) for passes in range(int(lead.max()) + 1))
        found[name] = Settling(float(lead.mean()), float(first.mean()), ahead)
    return found


@dataclass(frozen=True)
class Replay:
    """A trajectory and its partial images.

    Attributes:
        trajectory: the decoding that is replayed.
        passes: (F,) forward passes, from 0, after which the frames were taken; the last pass is among them.
        frames: (F, h, w, 3) uint8, at most `MAX_FRAME_PX` a side.
    """

    trajectory: Trajectory
    passes: tuple[int, ...]
    frames: np.ndarray


def shown_passes(num_passes: int, num_frames: int) -> tuple[int, ...]:
    """At most `num_frames` passes, evenly spread, the first and the last among them."""
    spread = np.linspace(0, num_passes - 1, min(num_frames, num_passes)).round().astype(int)
    return tuple(dict.fromkeys(spread.tolist()))


@torch.inference_mode()
def replay(
    backbone: Backbone, trajectory: Trajectory, num_frames: int, layout: ImageLayout | None = None
) -> Replay:
    """Partial images of a trajectory; the commonest code fills what no pass has looked at yet.

    Args:
        backbone: model whose image decoder draws them.
        trajectory: a result of `trace`.
        num_frames: greatest number of images, 2 or more.
        layout: layout of the image, see `Backbone.decode_images`.
    """
    passes = shown_passes(trajectory.num_passes, num_frames)
    codes = trajectory.guesses[list(passes)]
    filler = np.bincount(trajectory.image_ids).argmax()
    grids = torch.from_numpy(np.where(codes == OUTSIDE, filler, codes)).view(-1, *trajectory.size)
    frames = [
        _small(image.numpy())
        for chunk in grids.split(_CHUNK)
        for image in to_uint8(backbone.decode_images(chunk.to(backbone.device), layout))
    ]
    return Replay(trajectory, passes, np.stack(frames))


def sprite(replay: Replay) -> tuple[bytes, int]:
    """All frames in one WebP image, row by row, and the number of frames in a row."""
    num, height, width = replay.frames.shape[:3]
    in_row = int(np.ceil(np.sqrt(num)))
    sheet = Image.new("RGB", (in_row * width, -(-num // in_row) * height))
    for place, frame in enumerate(replay.frames):
        sheet.paste(Image.fromarray(frame), (place % in_row * width, place // in_row * height))
    buffer = io.BytesIO()
    sheet.save(buffer, "WEBP", quality=_WEBP_QUALITY, method=4)
    return buffer.getvalue(), in_row


def _small(pixels: np.ndarray) -> np.ndarray:
    image = Image.fromarray(pixels)
    image.thumbnail((MAX_FRAME_PX, MAX_FRAME_PX))
    return np.asarray(image)


@dataclass(frozen=True)
class Observations:
    """Trajectories of the prompts that a report shows first, their replays, the cost of a pass by window."""

    trajectories: tuple[Trajectory, ...] = ()
    replays: tuple[Replay, ...] = ()
    pass_costs: tuple[PassCost, ...] = ()


def observe(
    backbone: Backbone,
    result: EvaluationResult,
    layout: ImageLayout,
    *,
    num_trajectories: int,
    num_frames: int,
    cost_windows: Sequence[int],
) -> Observations:
    """Decodes what a report shows first again with an observer, draws partial images, times single passes.

    Args:
        backbone: the model of the result; decodes in eval mode and gets its modes back.
        result: result of `evaluate_methods`.
        layout: image size and row ends.
        num_trajectories: prompts decoded again by every method; 0 leaves trajectories and replays out.
        num_frames: partial images of each replay, 2 or more.
        cost_windows: windows at which a pass is timed; none leaves it out.
    """
    methods = {name: method.config for name, method in result.methods.items()}
    prompts = [result.prompts[place] for place in best_known(result)[:num_trajectories]]
    with evaluation_mode(backbone):
        with stage("decoding again with an observer, for the report"):
            traced = trace(backbone, methods, prompts, layout)
        with stage("drawing partial images"):
            replays = [replay(backbone, trajectory, num_frames, layout) for trajectory in traced]
        with stage("timing single passes"):
            costs = measure_pass_costs(backbone, result, layout, cost_windows)
    return Observations(tuple(traced), tuple(replays), costs)
