"""The picture on its way, under the bar of `sjd2 generate`: half blocks, two pixels a character.

Only in a terminal that has the colours and the room; elsewhere nothing is drawn, and no pass waits for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from rich.color import Color
from rich.console import Console, RenderableType
from rich.progress import Progress
from rich.segment import Segment, Segments
from rich.style import Style

if TYPE_CHECKING:
    from sjd2_lightning.decoding import Iteration
    from sjd2_lightning.models.backbone import Backbone, ImageLayout

_COLOURS = ("truecolor", "256")  # what `Console.color_system` must be
_SMALLEST = (32, 16)  # columns and lines of the terminal
_BESIDE = 3  # lines for the bar and the line that the shell writes next
_LARGEST = 64  # pixels of the longer side
_EVERY = 0.2  # seconds from frame to frame
_GROUND = 255  # what shows through faint drafts


class PictureProgress(Progress):
    """A bar, with a picture under it where the console can show one.

    Args:
        console: where it is drawn; a file or pipe gets nothing, not even the bar.
    """

    def __init__(self, console: Console) -> None:
        self.picture: Segments | None = None
        wide, high = console.size
        fits = wide >= _SMALLEST[0] and high >= _SMALLEST[1]
        # whether the terminal has the colours and the size for a picture
        self.has_room = console.is_terminal and fits and console.color_system in _COLOURS
        # a thread that drew a picture of a thousand characters ten times a second would slow the decoding
        super().__init__(
            console=console,
            transient=True,
            disable=not console.is_terminal,
            auto_refresh=not self.has_room,
        )

    def show(self, picture: np.ndarray) -> None:
        """Puts a picture (h, w, 4) uint8 under the bar, and draws both."""
        wide, high = self.console.size
        self.picture = half_blocks(picture, wide, 2 * (high - _BESIDE))
        self.refresh()

    def get_renderables(self) -> Iterable[RenderableType]:
        """What Rich draws."""
        yield from super().get_renderables()
        if self.picture is not None:
            yield self.picture


class Preview:
    """Observer of `decode` for one image: shows it on the way, now and then.

    Args:
        progress: where it is shown.
        backbone: model, whose image decoder draws.
        layout: layout of the image.
        clock: seconds.

    Attributes:
        seconds: time that showing took, which is none of the decoding's.
    """

    def __init__(
        self,
        progress: PictureProgress,
        backbone: Backbone,
        layout: ImageLayout,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        from sjd2_lightning.report.observe import TrajectoryObserver  # seconds of libraries

        self.progress, self.backbone, self.clock = progress, backbone, clock
        self.seen = TrajectoryObserver(layout)
        self.seconds = 0.0
        self._next = 0.0

    def __call__(self, iteration: Iteration) -> None:
        """Notes the pass, and draws if the last frame is old enough."""
        from sjd2_lightning.playground.frames import draw

        start = self.clock()
        self.seen(iteration)
        if start >= self._next:
            moment = self.seen.moment(self.seen.num_passes - 1)
            [picture] = draw(self.backbone, [moment], self.seen.layout)
            self.progress.show(picture)
            # a slow image decoder draws less often: a fifth of the time at most
            self._next = start + max(_EVERY, 5 * (self.clock() - start))
        self.seconds += self.clock() - start


def half_blocks(picture: np.ndarray, most_wide: int, most_high: int) -> Segments:
    """A picture as characters, each the upper of two pixels in its colour on that of the lower one.

    Args:
        picture: (h, w, 4) uint8; what is not opaque lies on white.
        most_wide, most_high: most pixels, of which a line of characters shows two in height.
    """
    image = Image.fromarray(picture)
    ground = Image.new("RGBA", image.size, (_GROUND,) * 4)
    image = Image.alpha_composite(ground, image).convert("RGB")
    image.thumbnail((min(most_wide, _LARGEST), min(most_high, _LARGEST)))
    pixels = np.asarray(image)[: image.height // 2 * 2]
    found = []
    for upper, lower in zip(pixels[::2], pixels[1::2], strict=True):
        for above, below in zip(upper.tolist(), lower.tolist(), strict=True):
            found.append(Segment("▀", Style(color=Color.from_rgb(*above), bgcolor=Color.from_rgb(*below))))
        found.append(Segment.line())
    return Segments(found)
