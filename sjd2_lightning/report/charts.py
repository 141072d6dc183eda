"""Charts of observations: how drafts settle, and what a pass costs.

Source: ours; the map of settling follows the paper's figure 8.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator, PercentFormatter

from sjd2_lightning.comparison import BASELINE
from sjd2_lightning.report.cost import MethodCost, PassCost
from sjd2_lightning.report.svg import LINE, QUIET, method_colour
from sjd2_lightning.report.trajectory import Settling, Trajectory

_MAX_PASSES = 24  # of the curve; what lies behind is nearly always empty


def settling_map(trajectory: Trajectory, colour: str) -> Figure:
    """One image: for each token the passes between its final guess (bar's lower end) and its commit (upper).

    Args:
        trajectory: of `trace`.
        colour: of the method.
    """
    figure, axis = _canvas(3.6, 2.4)
    tokens = np.arange(len(trajectory.image_ids))
    settled, committed = trajectory.settled + 1, trajectory.committed + 1
    ends = np.stack([np.stack([tokens, settled], 1), np.stack([tokens, committed], 1)], 1).reshape(-1, 2)
    bars = Path(ends, np.tile([Path.MOVETO, Path.LINETO], len(tokens)))
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
        found: of `settling`.
        places: of the methods in the comparison, which give the colours.
        legend: names the lines; the page has a table beside it that does.
    """
    figure, axis = _canvas(5.4 if legend else 4.4, 2.7)
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
    """Milliseconds of a pass over the window: trunk and head alone (line), and of each method (points).

    Args:
        passes: of `measure_pass_costs`; may be empty.
        methods: of `method_costs`.
        places: of the methods in the comparison, which give the colours.
        legend: names the points; the page has a table beside it that does.
    """
    figure, axis = _canvas(5.4 if legend else 4.4, 2.7)
    if passes:
        windows, seconds = zip(*((cost.window, 1000 * cost.seconds) for cost in passes), strict=True)
        axis.plot(
            windows, seconds, color=QUIET, marker="o", markersize=3, linewidth=1.2, label="trunk and head"
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


def _canvas(width: float, height: float) -> tuple[Figure, Axes]:
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
