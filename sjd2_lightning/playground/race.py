"""One image by several methods, pass by pass, and whether the results are the same.

The method that has spent least time takes the next pass. So on one device each goes on as it would alone, at
the same share of the clock, and both can be watched.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch

from sjd2_lightning.decoding.config import DecodingConfig
from sjd2_lightning.decoding.drawing import Batch
from sjd2_lightning.decoding.engine import Engine
from sjd2_lightning.decoding.loop import decoder_of, start_iteration
from sjd2_lightning.evaluation.prompts import PromptItem
from sjd2_lightning.models.backbone import Backbone, ImageLayout
from sjd2_lightning.report.observe import TrajectoryObserver


class StoppedError(Exception):
    """A race that was stopped."""


class Runner:
    """One method's way through one image.

    Attributes:
        clock: seconds that it has taken, before its first pass (the prompt) and after each.
        seen: its passes so far.
        image_ids: (C,) codes of the finished image; None before.
    """

    def __init__(self, name: str, config: DecodingConfig, layout: ImageLayout) -> None:
        self.name, self.config, self.layout = name, config, layout
        self.clock = [0.0]
        self.seen = TrajectoryObserver(layout)
        self.image_ids: tuple[int, ...] | None = None
        self._batch: Batch | None = None

    def start(self, backbone: Backbone, item: PromptItem) -> None:
        """Reads the prompt."""
        start = time.perf_counter()
        engine = Engine.of(self.config, backbone.device).watched()
        self._batch = decoder_of(backbone).begin(
            [item.prompt], [item.seed], self.config, [self.layout], engine
        )
        self.clock = [time.perf_counter() - start]

    def step(self) -> None:
        """One pass."""
        assert self._batch is not None, "`start` comes first"
        start = time.perf_counter()
        start_iteration(self._batch, self.seen)
        going = self._batch.drop_finished()
        self.clock.append(self.clock[-1] + time.perf_counter() - start)
        if not going:
            self.image_ids = tuple(self._batch.output().image_ids.flatten().tolist())
            self._batch = None

    def release(self) -> None:
        """Gives the cache and all other buffers back; what was seen stays."""
        self._batch = None


class Race:
    """One image by several methods.

    Args:
        backbone: the model, in eval mode.
        item: the prompt.
        methods: methods by the names that they are shown under.
        layout: layout of the image.
    """

    def __init__(
        self, backbone: Backbone, item: PromptItem, methods: Mapping[str, DecodingConfig], layout: ImageLayout
    ) -> None:
        self.backbone, self.item, self.layout = backbone, item, layout
        self.runners = [Runner(name, config, layout) for name, config in methods.items()]

    @torch.inference_mode()
    def run(self, stopped: Callable[[], bool]) -> None:
        """Decodes until all are done; buffers are free afterwards, whatever happened.

        Args:
            stopped: asked before each pass whether to go on.

        Raises:
            StoppedError: the answer was not to.
            ValueError: the prompt, or the image in memory, does not fit.
        """
        try:
            for runner in self.runners:
                if stopped():
                    raise StoppedError
                runner.start(self.backbone, self.item)
            while going := [runner for runner in self.runners if runner.image_ids is None]:
                if stopped():
                    raise StoppedError
                min(going, key=lambda runner: runner.clock[-1]).step()
        finally:
            for runner in self.runners:
                runner.release()

    @property
    def done(self) -> bool:
        return all(runner.image_ids is not None for runner in self.runners)

    def share_equal(self) -> float | None:
        """Share of the codes that the first two methods drew alike; None while it is not known."""
        first, second = (runner.image_ids for runner in self.runners[:2])
        if first is None or second is None:
            return None
        return sum(a == b for a, b in zip(first, second, strict=True)) / len(first)

    def verdict(self) -> str | None:
        """What the finished images have in common, compared code by code; None before."""
        share = self.share_equal()
        if share is None:
            return None
        if share == 1:
            return f"Same image: all {len(self.layout.code_slots)} tokens are equal."
        equal = f"{100 * share:.0f} % of the tokens are equal."
        configs = [runner.config for runner in self.runners[:2]]
        if all(config.acceptance == "replay" for config in configs):
            return f"Not the same image, though both replay: {equal} Rounding decides near ties."
        if all(config.lossless for config in configs):
            return f"Another image of the same law, as another seed would give: {equal}"
        return f"Another image, and of another law: {equal}"
