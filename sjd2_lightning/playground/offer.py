"""What a visitor can ask for, and the methods and the layout that this becomes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from sjd2_lightning.decoding.config import BASELINE, NOISY, DecodingConfig
from sjd2_lightning.evaluation.prompts import PromptItem, seed_of
from sjd2_lightning.models.backbone import Backbone, ImageLayout

MOST_PROMPTS = 64  # of one comparison
_SIZE = re.compile(r"(\d+) *[x×*] *(\d+)")
_SHAPES = ((1.0, 1.0), (0.75, 1.5), (1.5, 0.75))  # height and width, as shares of the model's own


@dataclass(frozen=True)
class Wish:
    """What is asked for, besides the prompt.

    Attributes:
        size: size of the image in pixels, such as "64 x 96": height, then width.
        seed: seed of the image.
        temperature, guidance: sampling, the same for all methods.
    """

    size: str
    seed: int
    temperature: float
    guidance: float


@dataclass(frozen=True)
class Offer:
    """A model and the methods to draw with.

    Attributes:
        backbone: the model, in eval mode.
        name: what the page calls the model.
        methods: methods by name, the baseline among them; every window is a number.
        preferred: the method that is chosen at first.
        pixels: (height, width) that the model draws best.
        prompts: prompts to begin with.
    """

    backbone: Backbone
    name: str
    methods: Mapping[str, DecodingConfig]
    preferred: str
    pixels: tuple[int, int]
    prompts: Sequence[str]

    @property
    def others(self) -> list[str]:
        """Names of all methods but the baseline."""
        return [name for name in self.methods if name != BASELINE]

    def sizes(self) -> list[str]:
        """Sizes that the model can draw: its own, a wide and a tall one."""
        height, width = self.pixels
        shapes = [(round(height * high), round(width * wide)) for high, wide in _SHAPES]
        return [f"{high} x {wide}" for high, wide in shapes if self._draws(high, wide)]

    def has_levels(self, name: str) -> bool:
        """Whether a method knows noise levels."""
        return self.methods[name].method in NOISY

    def method(
        self, name: str, wish: Wish, window: int | None = None, num_levels: int | None = None
    ) -> DecodingConfig:
        """A method with what is asked for.

        Args:
            name: its name.
            wish: sampling.
            window, num_levels: in place of the method's own; None keeps those.

        Raises:
            ValueError: a value that the method cannot have.
        """
        own = self.methods[name]
        sampling = replace(own.sampling, temperature=wish.temperature, guidance_scale=wish.guidance)
        config = replace(own, sampling=sampling)
        if name != BASELINE and window is not None:
            config = replace(config, window=window)
        if self.has_levels(name) and num_levels is not None:
            config = replace(config, num_levels=num_levels)
        config.check()
        return config

    def layout(self, wish: Wish) -> ImageLayout:
        """The layout of the wished size; raises ValueError for one that the model cannot draw."""
        found = _SIZE.fullmatch(wish.size.strip())
        if found is None:
            raise ValueError(f"size {wish.size!r}: write height x width in pixels, such as {self.sizes()[0]}")
        return self.backbone.layout(int(found[1]), int(found[2]))

    def _draws(self, height: int, width: int) -> bool:
        try:
            self.backbone.layout(height, width)
        except ValueError:
            return False
        return True


def single(prompt: str, seed: int) -> PromptItem:
    """The prompt of one image; raises ValueError if it is empty or the seed is none."""
    if not prompt.strip():
        raise ValueError("Type what is to be drawn, at least one word.")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed {seed}: must be 0 or a positive 63-bit number")
    return PromptItem("prompt", prompt.strip(), seed)


def several(text: str, seed: int) -> list[PromptItem]:
    """Prompts, one a line, with a seed each from the common one.

    Raises:
        ValueError: there is none, or more than `MOST_PROMPTS`.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not 0 < len(lines) <= MOST_PROMPTS:
        raise ValueError(f"Give 1 to {MOST_PROMPTS} prompts, one a line; these are {len(lines)}.")
    return [
        PromptItem(f"prompt-{place:05d}", line, seed_of(f"prompt-{place:05d}", seed))
        for place, line in enumerate(lines)
    ]
