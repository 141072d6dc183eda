"""Figures of an evaluation: image grid, acceptance histogram, and which forward pass committed each code.

Drawn on matplotlib's Figure without pyplot: no global state, no display, safe inside a training process.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image
from torch import Tensor

from sjd2_lightning.comparison import EvaluationResult, MethodResult
from sjd2_lightning.records import ImageRecord, write_atomic
from sjd2_lightning.report.svg import method_colour

_IMAGE_INCHES = 1.15
# In units of one image: distance between images, room for a caption, room for the names of the lines.
_CELL, _CAPTION, _MARGIN = 1.06, 0.36, 0.85


def image_grid(result: EvaluationResult, num_prompts: int = 8, prompts_per_row: int = 8) -> Figure:
    """The first prompts by every method: one column a prompt, one line a method.

    Args:
        result: of an evaluation.
        num_prompts: prompts shown, from the front of the list.
        prompts_per_row: prompts beside each other before a new block begins.
    """
    methods = list(result.methods.values())
    shown = [method.records[:num_prompts] for method in methods]
    images = [result.store.images(records) for records in shown]
    captions = [record.prompt for record in shown[0]]
    return grid_figure([method.name for method in methods], images, captions, prompts_per_row)


def grid_figure(
    names: Sequence[str],
    images: Sequence[Sequence[Tensor]],
    captions: Sequence[str],
    prompts_per_row: int = 8,
) -> Figure:
    """Images (h, w, 3) uint8, `images[line][prompt]`, with line names at the left and captions on top."""
    width = min(prompts_per_row, len(captions))
    num_blocks = -(-len(captions) // width)
    block_height = len(names) * _CELL + _CAPTION
    figure, axis = _canvas(width * _CELL, num_blocks * block_height)
    for prompt, caption in enumerate(captions):
        block, column = divmod(prompt, width)
        left, top = column * _CELL, block * block_height + _CAPTION
        axis.text(left + 0.5, top - 0.06, _wrapped(caption), ha="center", va="bottom", fontsize=6)
        for line in range(len(names)):
            _place(axis, images[line][prompt].numpy(), left, top + line * _CELL)
    for block in range(num_blocks):
        for line, name in enumerate(names):
            _line_name(axis, name, block * block_height + _CAPTION + line * _CELL)
    return figure


def acceptance_histogram(methods: Sequence[MethodResult]) -> Figure:
    """Share of forward passes that committed n slots, a panel for each method."""
    figure = Figure(figsize=(6.4, 1.1 * len(methods) + 0.7), dpi=150, layout="constrained")
    panels = figure.subplots(len(methods), 1, sharex=True, squeeze=False)[:, 0]
    for place, (axis, method) in enumerate(zip(panels, methods, strict=True)):
        counts = np.array(method.acceptance_counts)
        axis.bar(np.arange(len(counts)), counts / max(counts.sum(), 1), color=method_colour(place))
        mean = method.figures["step_compression"].value
        axis.axvline(mean, color="black", linewidth=0.8, linestyle=":")
        axis.set_title(f"{method.name}: {mean:.2f} slots a pass", fontsize=8, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=7)
    panels[-1].set_xlim(left=0.4)
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[-1].set_xlabel("slots committed by one forward pass", fontsize=8)
    figure.supylabel("share of passes", fontsize=8)
    return figure


def acceptance_maps(result: EvaluationResult, num_prompts: int = 4) -> Figure:
    """For the first prompts, which forward pass committed each code: one column a prompt, one line a method.

    Each map runs from its first pass (dark) to its last (bright); their number stands above it. Lines along
    the rows are what plain autoregression gives; patches of one colour were committed together.
    """
    methods = list(result.methods.values())
    width = min(num_prompts, len(result.prompts))
    height = _CELL + 0.16
    figure, axis = _canvas(width * _CELL, len(methods) * height + _CAPTION)
    for column, item in enumerate(result.prompts[:width]):
        axis.text(
            column * _CELL + 0.5, _CAPTION - 0.06, _wrapped(item.prompt), ha="center", va="bottom", fontsize=6
        )
    for line, method in enumerate(methods):
        top = _CAPTION + line * height + 0.16
        _line_name(axis, method.name, top)
        for column, record in enumerate(method.records[:width]):
            colours = colormaps["viridis"](settled_map(record) / max(record.nfe - 1, 1))
            _place(axis, colours, column * _CELL, top)
            axis.text(column * _CELL + 0.5, top - 0.03, f"{record.nfe} passes", ha="center", fontsize=6)
    return figure


def settled_map(record: ImageRecord) -> np.ndarray:
    """(height, width) number of the pass that committed each code."""
    return np.array(record.settled_iteration).reshape(record.size)


def figure_png(figure: Figure) -> bytes:
    """A figure as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor="white")
    return buffer.getvalue()


def figure_pixels(figure: Figure) -> np.ndarray:
    """A figure as uint8 (h, w, 3)."""
    return np.asarray(Image.open(io.BytesIO(figure_png(figure))).convert("RGB"))


def save_figure(figure: Figure, path: Path) -> Path:
    """Writes a figure as PNG, whole or not at all."""
    write_atomic(path, figure_png(figure))
    return path


def _canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of one invisible axes in units of images, y downwards, with a margin for names at the left."""
    size = ((width + _MARGIN) * _IMAGE_INCHES, height * _IMAGE_INCHES)
    figure = Figure(figsize=size, dpi=150)
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set_axis_off()
    axis.set_xlim(-_MARGIN, width)
    axis.set_ylim(height, 0)
    axis.set_autoscale_on(False)
    return figure, axis


def _place(axis: Axes, pixels: np.ndarray, left: float, top: float) -> None:
    axis.imshow(pixels, extent=(left, left + 1, top + 1, top), interpolation="nearest", aspect="auto")


def _line_name(axis: Axes, name: str, top: float) -> None:
    axis.text(-0.08, top + 0.5, name, ha="right", va="center", fontsize=7)


def _wrapped(caption: str) -> str:
    return "\n".join(textwrap.wrap(caption, width=18, max_lines=2, placeholder=" …"))
