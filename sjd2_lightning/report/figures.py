"""Figures of an evaluation: images, acceptance, order of commits, settling and cost of a pass.

Drawn on matplotlib's Figure without pyplot: no global state, no display, safe inside a training process.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path as Outline
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator, PercentFormatter
from PIL import Image
from torch import Tensor

from sjd2_lightning.data.pictures import png_bytes
from sjd2_lightning.decoding.config import BASELINE
from sjd2_lightning.evaluation.results import EvaluationResult, MethodResult
from sjd2_lightning.evaluation.store import Record
from sjd2_lightning.report.cost import MethodCost, PassCost
from sjd2_lightning.report.html import LINE, QUIET, method_colour
from sjd2_lightning.report.observe import Settling, Trajectory
from sjd2_lightning.run.files import write_whole

_IMAGE_INCHES = 1.15
# In units of one image: distance between images, room for a caption, room for the names of the lines.
_CELL, _CAPTION, _MARGIN = 1.06, 0.36, 0.85
_MAX_PASSES = 24  # end of the settling curve; what lies behind is nearly always empty


def image_grid(result: EvaluationResult, num_prompts: int = 8, prompts_per_row: int = 8) -> Figure:
    """The first prompts by every method: one column a prompt, one line a method.

    Args:
        result: result of an evaluation.
        num_prompts: number of prompts shown, from the front of the list.
        prompts_per_row: number of prompts beside each other before a new block begins.
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
    """Images (h, w, 3) uint8, `images[line][prompt]`, names of the lines at the left, captions on top."""
    width = min(prompts_per_row, len(captions))
    num_blocks = -(-len(captions) // width)
    block_height = len(names) * _CELL + _CAPTION
    figure, axis = _picture_canvas(width * _CELL, num_blocks * block_height)
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
        mean = method.measured["step_compression"].value
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

    Each map runs from its first pass (dark) to its last (bright), with the number of passes above. Plain
    autoregression colours row by row; a patch of one colour was committed in one pass.
    """
    methods = list(result.methods.values())
    width = min(num_prompts, len(result.prompts))
    height = _CELL + 0.16
    figure, axis = _picture_canvas(width * _CELL, len(methods) * height + _CAPTION)
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


def settled_map(record: Record) -> np.ndarray:
    """(height, width) pass, from 0, that committed each code or patch."""
    return np.array(record.settled_iteration).reshape(record.size)


def heat_map_png(record: Record) -> bytes:
    """`settled_map` as PNG, one pixel a code: dark ones were committed first, bright ones last."""
    passes = settled_map(record)
    colours = colormaps["viridis"](passes / max(record.nfe - 1, 1))[..., :3]
    return png_bytes((colours * 255).round().astype(np.uint8))


def settling_map(trajectory: Trajectory, colour: str) -> Figure:
    """For each token of one image a bar from the pass of its final guess up to the pass of its commit.

    Args:
        trajectory: a result of `trace`.
        colour: colour of the method.
    """
    figure, axis = _chart(3.6, 2.4)
    tokens = np.arange(len(trajectory.image_ids))
    settled, committed = trajectory.settled + 1, trajectory.committed + 1
    ends = np.stack([np.stack([tokens, settled], 1), np.stack([tokens, committed], 1)], 1).reshape(-1, 2)
    bars = Outline(ends, np.tile([Outline.MOVETO, Outline.LINETO], len(tokens)))
    width = max(0.4, 200 / len(tokens))
    axis.add_patch(PathPatch(bars, facecolor="none", edgecolor=colour, linewidth=width))
    axis.step(tokens, committed, color=colour, linewidth=1.2, where="mid")
    axis.set_xlim(0, len(tokens))
    axis.set_ylim(0, trajectory.num_passes * 1.03)
    axis.set_xlabel("token, in raster order")
    axis.set_ylabel("forward pass")
    return figure


def settling_curve(found: Mapping[str, Settling], places: Mapping[str, int], legend: bool = True) -> Figure:
    """Share of tokens whose draft had its final value k passes before it was committed, a line a method.

    Args:
        found: result of `settling`.
        places: place of each method in the comparison, which gives its colour.
        legend: whether to name the lines; the page names them in a table beside the figure.
    """
    figure, axis = _chart(5.4 if legend else 4.4, 2.7)
    for name, settling in found.items():
        if name == BASELINE:
            continue  # it drafts nothing
        shares = settling.ahead[: _MAX_PASSES + 1]
        axis.plot(range(len(shares)), shares, color=method_colour(places[name]), label=name, linewidth=1.6)
    axis.set_xlim(0)
    axis.set_ylim(0, 1.02)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axis.set_xlabel("passes before the commit")
    axis.set_ylabel("tokens already final")
    if legend:
        _legend(axis)
    return figure


def cost_chart(
    passes: Sequence[PassCost], methods: Sequence[MethodCost], places: Mapping[str, int], legend: bool = True
) -> Figure:
    """Milliseconds of a pass over the window: a pass alone (line), and of each method (points).

    Args:
        passes: result of `measure_pass_costs`; may be empty.
        methods: result of `method_costs`.
        places: place of each method in the comparison, which gives its colour.
        legend: whether to name the points; the page names them in a table beside the figure.
    """
    figure, axis = _chart(5.4 if legend else 4.4, 2.7)
    if passes:
        windows, seconds = zip(*((cost.window, 1000 * cost.seconds) for cost in passes), strict=True)
        axis.plot(
            windows, seconds, color=QUIET, marker="o", markersize=3, linewidth=1.2, label="a pass alone"
        )
    for cost in methods:
        colour = method_colour(places[cost.method])
        axis.plot(cost.window, 1000 * cost.seconds, "D", color=colour, markersize=6, label=cost.method)
    ticks = sorted({cost.window for cost in passes} | {cost.window for cost in methods})
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_locator(FixedLocator(ticks))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda window, _: f"{window:.0f}"))
    axis.set_ylim(0)
    axis.set_xlabel("window")
    axis.set_ylabel("ms a pass")
    if legend:
        _legend(axis)
    return figure


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
    write_whole(path, figure_png(figure))
    return path


def _picture_canvas(width: float, height: float) -> tuple[Figure, Axes]:
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


def _chart(width: float, height: float) -> tuple[Figure, Axes]:
    """A chart of one axes: quiet lines, no frame, a horizontal grid."""
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    axis = figure.add_subplot()
    axis.spines[["top", "right"]].set_visible(False)
    for side in ("left", "bottom"):
        axis.spines[side].set_color(LINE)
    axis.tick_params(labelsize=8, color=LINE, labelcolor=QUIET)
    axis.xaxis.label.set_fontsize(8)
    axis.yaxis.label.set_fontsize(8)
    axis.grid(axis="y", color=LINE, linewidth=0.6)
    axis.set_axisbelow(True)
    return figure, axis


def _legend(axis: Axes) -> None:
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
