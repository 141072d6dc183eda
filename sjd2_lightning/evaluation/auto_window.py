"""`window=auto`: the window that commits most slots a second, from the cost of a pass and runs seen.

A longer window commits more slots a pass and makes a pass dearer; how much dearer is a property of the
device, the batch and the prefix. So both are measured, here and now: passes are timed, and one batch is
decoded with each window. Acceptance is not read off the longest window alone: cutting its runs to a shorter
window overstates that one by up to a half, since its drafts have had fewer passes to settle (docs/LOG.md).

    >>> choice = choose_window(backbone, config, prompts, seeds, layout)
    >>> output = decode(backbone, prompts, seeds, replace(config, window=choice.window), layout)

Decoding itself looks at no clock and keeps the window that it was given.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sjd2_lightning.decoding.config import DecodingConfig
from sjd2_lightning.decoding.engine import Engine
from sjd2_lightning.decoding.loop import decode, decoder_of, iterate
from sjd2_lightning.evaluation.prompts import PromptItem
from sjd2_lightning.fixed_point import DecodeStats
from sjd2_lightning.metrics.efficiency import timed
from sjd2_lightning.models.backbone import Backbone, ImageLayout
from sjd2_lightning.run.files import sha256_of_json, write_whole
from sjd2_lightning.run.processes import from_rank_zero
from sjd2_lightning.run.stages import stage

log = logging.getLogger(__name__)

WINDOWS = (4, 8, 16, 32, 64)
CHOICES_FILE = "windows.json"


@dataclass(frozen=True)
class WindowChoice:
    """What is known of some windows, and the best of them.

    Attributes:
        seconds: seconds of a pass, by window.
        slots: slots that passes committed in all rows, by window.
        passes: number of these passes, by window.
    """

    seconds: Mapping[int, float]
    slots: Mapping[int, int]
    passes: Mapping[int, int]

    def __post_init__(self) -> None:
        if not self.seconds or not all(self.passes.get(window) for window in self.seconds):
            raise ValueError(
                "a window is chosen from at least one, with a cost and at least one pass of each"
            )

    @property
    def committed(self) -> dict[int, float]:
        """Slots a pass and row, by window."""
        return {window: self.slots[window] / self.passes[window] for window in sorted(self.seconds)}

    @property
    def slots_per_second(self) -> dict[int, float]:
        """Slots committed a second in each row, by window."""
        return {window: committed / self.seconds[window] for window, committed in self.committed.items()}

    @property
    def window(self) -> int:
        """The window of most slots a second; of equals the shortest."""
        return max(self.slots_per_second.items(), key=lambda entry: entry[1])[0]

    def summary(self) -> dict[str, Any]:
        """The choice and its curve as a JSON object."""
        names = ("seconds", "slots", "passes", "committed", "slots_per_second")
        curve = {name: {str(size): value for size, value in getattr(self, name).items()} for name in names}
        return {"window": self.window, **curve}

    @classmethod
    def from_summary(cls, summary: Mapping[str, Mapping[str, Any]]) -> WindowChoice:
        """The choice that `summary` describes."""
        names = ("seconds", "slots", "passes")
        return cls(*({int(size): value for size, value in summary[name].items()} for name in names))

    def __str__(self) -> str:
        committed = self.committed
        parts = [
            f"{size}: {1000 * self.seconds[size]:.1f} ms, {committed[size]:.2f} slots" for size in committed
        ]
        return f"window {self.window} (a pass of {'; '.join(parts)})"


def runs_of(stats: DecodeStats) -> list[int]:
    """Slots committed by each pass, without the last pass of an image, which the image's end cuts short."""
    return [num for passes in stats.accepted for num in (passes[:-1] or passes)]


@torch.inference_mode()
def pass_seconds(
    backbone: Backbone,
    config: DecodingConfig,
    prompts: Sequence[str],
    layout: ImageLayout,
    windows: Sequence[int] = WINDOWS,
    repeats: int = 5,
) -> dict[int, float]:
    """Median seconds of an iteration in the middle of an image, by window.

    The iteration is the engine's own, with these prompts, their empty twins, cache and timestep tokens. Rows
    of a batch stand apart, as they do while decoding. Windows take turns, so that drift hits all.

    Args:
        backbone: the model, in eval mode.
        config: the method; its own window plays no part.
        prompts: texts, one a row.
        layout: layout of the images.
        windows: windows whose passes are timed.
        repeats: number of timed passes of each.
    """
    calls = {window: one_pass(backbone, config, prompts, layout, window) for window in windows}
    for call in calls.values():
        call()  # not timed: allocator, kernel choice and compiler settle here,
        call()  # and a graph is captured
    taken = [
        {window: timed(call, backbone.device)[1] for window, call in calls.items()} for _ in range(repeats)
    ]
    return {window: float(np.median([turn[window] for turn in taken])) for window in windows}


def one_pass(
    backbone: Backbone,
    config: DecodingConfig,
    prompts: Sequence[str],
    layout: ImageLayout,
    window: int,
    slot: int | None = None,
) -> Callable[[], None]:
    """One iteration of a window, to be called again and again: it starts from the same slots each time.

    Args:
        backbone: the model, in eval mode.
        config: the method; its own window plays no part.
        prompts: texts, one a row.
        layout: layout of the images.
        window: number of slots W.
        slot: first slot of the window in the first row, one further in each next row; by default, the middle
            of the image.
    """
    config = replace(config, window=window)
    engine = Engine.of(config, backbone.device)
    layouts = [layout] * len(prompts)
    batch = decoder_of(backbone).begin(prompts, range(len(prompts)), config, layouts, engine)
    slot = layout.num_slots // 2 if slot is None else slot
    heads = torch.tensor([(slot + row) % layout.num_slots for row in range(len(prompts))])
    batch.progress.heads = heads.tolist()
    shape, heads = batch.shape(), heads.to(backbone.device)

    def call() -> None:
        batch.state.head.copy_(heads)
        batch.state.iteration.zero_()
        batch.run(partial(iterate, batch), shape)

    return torch.inference_mode()(call)


def choose_window(
    backbone: Backbone,
    config: DecodingConfig,
    prompts: Sequence[str],
    seeds: Sequence[int],
    layout: ImageLayout,
    windows: Sequence[int] = WINDOWS,
    repeats: int = 5,
) -> WindowChoice:
    """The best window for a batch: its passes are timed, and it is decoded once with each window.

    Args:
        backbone: the model, in eval mode.
        config: the method; its own window plays no part.
        prompts, seeds, layout: arguments of `decode`.
        windows: windows to choose from; those longer than the image are left out.
        repeats: number of timed passes of each.
    """
    fitting = [window for window in windows if window <= layout.num_slots] or [min(windows)]
    seconds = pass_seconds(backbone, config, prompts, layout, fitting, repeats)
    runs = {
        window: runs_of(decode(backbone, prompts, seeds, replace(config, window=window), layout).stats)
        for window in fitting
    }
    slots = {window: sum(found) for window, found in runs.items()}
    return WindowChoice(seconds, slots, {window: len(found) for window, found in runs.items()})


def resolve_windows(
    backbone: Backbone,
    methods: Mapping[str, DecodingConfig],
    prompts: Sequence[PromptItem],
    layout: ImageLayout,
    *,
    windows: Sequence[int] = WINDOWS,
    repeats: int = 5,
    folder: str | Path | None = None,
) -> tuple[dict[str, DecodingConfig], dict[str, WindowChoice]]:
    """Methods with a number for a window each, and the choices made for those whose window is "auto".

    Every rank looks, rank 0's choice holds. A folder keeps the choices: a run that is continued must not
    choose again, since its images belong to one window.

    Args:
        backbone: the model, in eval mode.
        methods: methods by name.
        prompts: prompts of one batch.
        layout: layout of the images.
        windows, repeats: arguments of `choose_window`.
        folder: folder that keeps `windows.json`; None keeps nothing.
    """
    names = [name for name, method in methods.items() if method.window == "auto"]
    if not names:
        return dict(methods), {}
    texts, seeds = [item.prompt for item in prompts], [item.seed for item in prompts]
    asked = sha256_of_json(
        [
            {name: str(methods[name]) for name in names},
            texts,
            layout.pixels,
            list(windows),
            str(backbone.device),
        ]
    )
    choices = _read_choices(folder, asked)
    if choices is None:
        choices = {}
        for name in names:
            with stage(f"choosing the window of {name}"):
                choices[name] = choose_window(backbone, methods[name], texts, seeds, layout, windows, repeats)
    choices = from_rank_zero(choices)
    for name, choice in choices.items():
        log.info("%s: %s", name, choice)
    if folder is not None:
        found = {name: choice.summary() for name, choice in choices.items()}
        write_whole(Path(folder) / CHOICES_FILE, json.dumps({"asked": asked, "choices": found}, indent=1))
    return with_windows(methods, choices), choices


def with_windows(
    methods: Mapping[str, DecodingConfig], choices: Mapping[str, WindowChoice]
) -> dict[str, DecodingConfig]:
    """The methods, each that a choice was made for with its window."""
    return {
        name: replace(config, window=choices[name].window) if name in choices else config
        for name, config in methods.items()
    }


def _read_choices(folder: str | Path | None, asked: str) -> dict[str, WindowChoice] | None:
    """Choices that a run in this folder made of the same question."""
    path = None if folder is None else Path(folder) / CHOICES_FILE
    if path is None or not path.is_file():
        return None
    held = json.loads(path.read_text())
    if held.get("asked") != asked:
        return None
    return {name: WindowChoice.from_summary(entry) for name, entry in held["choices"].items()}
