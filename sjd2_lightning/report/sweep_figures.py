"""Figures of a sweep: maps over window and noise levels, and quality against speed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from sjd2_lightning.decoding.config import BASELINE

# key of a quality metric -> (title, whether less is better); figures use the first one that a sweep has
QUALITY = {
    "clip_gain": ("CLIP gain over other prompts", False),
    "clip_score": ("CLIP score", False),
    "kid": ("kernel distance", True),
    "fd": ("Fréchet distance", True),
}


@dataclass(frozen=True)
class SweepRow:
    """One method in one run of a sweep.

    Attributes:
        job: name of the run.
        method: name of the method in the report.
        acceptance, lossless: what the method promises.
        measured: numbers by name, `window` and `num_levels` among them; what was not measured is absent.
    """

    job: str
    method: str
    acceptance: str
    lossless: bool
    measured: Mapping[str, float]

    @property
    def window(self) -> int:
        return int(self.measured["window"])

    @property
    def num_levels(self) -> int:
        return int(self.measured["num_levels"])

    @property
    def setting(self) -> str:
        """Window and levels in short."""
        return f"{self.window} / {self.num_levels}"


def sweep_map(rows: Sequence[SweepRow], key: str, title: str, less_is_better: bool) -> Figure | None:
    """A number over window (columns) and levels (lines), a panel for each method, the best cell framed.

    Runs that share a cell are averaged.

    Args:
        rows: rows of the sweep, from `sweep_rows`.
        key: key of the number.
        title: what the number is.
        less_is_better: whether the least cell is framed, not the greatest.

    Returns:
        None where no method that drafts has the number at two settings.
    """
    cells: dict[str, dict[tuple[int, int], list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row.method != BASELINE and key in row.measured:
            cells[row.method][row.num_levels, row.window].append(row.measured[key])
    shown = {method: found for method, found in cells.items() if len(found) > 1}
    if not shown:
        return None
    values = np.array([np.mean(v) for found in shown.values() for v in found.values()])
    span = (float(values.min()), float(values.max()))
    heights = [len({level for level, _ in found}) for found in shown.values()]
    widest = max(len({window for _, window in found}) for found in shown.values())
    figure = Figure(
        figsize=(max(3.6, 0.8 * widest + 1.6), 0.42 * sum(heights) + 0.75 * len(shown) + 0.4),
        dpi=150,
        layout="constrained",
    )
    figure.suptitle(title, fontsize=9)
    panels = figure.subplots(len(shown), 1, squeeze=False, height_ratios=[h + 0.01 for h in heights])[:, 0]
    for axis, (method, found) in zip(panels, shown.items(), strict=True):
        _map_panel(axis, {cell: float(np.mean(v)) for cell, v in found.items()}, span, less_is_better)
        axis.set_title(method, fontsize=8, loc="left")
    panels[-1].set_xlabel("window", fontsize=8)
    return figure


def _map_panel(
    axis: Axes, cells: Mapping[tuple[int, int], float], span: tuple[float, float], less_is_better: bool
) -> None:
    levels, windows = (sorted(set(axis_values)) for axis_values in zip(*cells, strict=True))
    grid = np.full((len(levels), len(windows)), np.nan)
    for (level, window), value in cells.items():
        grid[levels.index(level), windows.index(window)] = value
    axis.imshow(grid, cmap="viridis", vmin=span[0], vmax=span[1], aspect="auto")
    middle = sum(span) / 2
    for (line, column), value in np.ndenumerate(grid):
        if np.isfinite(value):
            colour = "black" if value > middle else "white"
            axis.text(column, line, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)
    best = np.nanargmin(grid) if less_is_better else np.nanargmax(grid)
    line, column = np.unravel_index(best, grid.shape)
    frame = Rectangle((column - 0.5, line - 0.5), 1, 1, fill=False, edgecolor="#e45756", linewidth=2)
    frame.set_clip_on(False)
    axis.add_patch(frame)
    axis.set_xticks(range(len(windows)), [str(window) for window in windows], fontsize=7)
    axis.set_yticks(range(len(levels)), [str(level) for level in levels], fontsize=7)
    axis.set_ylabel("levels", fontsize=7)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points (x, y), by rising x, that no other point beats in both; larger is better."""
    front: list[int] = []
    best = -np.inf
    for index in sorted(range(len(points)), key=lambda i: (-points[i][0], -points[i][1])):
        if points[index][1] > best:
            best = points[index][1]
            front.append(index)
    return front[::-1]


def pareto_figure(rows: Sequence[SweepRow]) -> Figure | None:
    """Quality against speedup, a mark for each row, with a line through the Pareto front.

    Returns:
        None without a speedup and a quality metric, or with fewer than three rows.
    """
    key = next((key for key in QUALITY if any(key in row.measured for row in rows)), None)
    shown = [row for row in rows if key is not None and key in row.measured and "speedup" in row.measured]
    if key is None or len(shown) < 3:
        return None
    title, less_is_better = QUALITY[key]
    figure = Figure(figsize=(5.6, 3.8), dpi=150, layout="constrained")
    axis = figure.subplots()
    for method in dict.fromkeys(row.method for row in shown):
        own = [row for row in shown if row.method == method]
        axis.scatter(
            [row.measured["speedup"] for row in own],
            [row.measured[key] for row in own],
            s=18,
            label=method,
            marker="o" if own[0].lossless else "x",
        )
    sign = -1 if less_is_better else 1
    points = [(row.measured["speedup"], sign * row.measured[key]) for row in shown]
    front = [shown[index] for index in pareto_front(points)]
    axis.plot(
        [row.measured["speedup"] for row in front],
        [row.measured[key] for row in front],
        color="black",
        linewidth=0.8,
        linestyle=":",
    )
    for row in front:
        place = (row.measured["speedup"], row.measured[key])
        axis.annotate(row.setting, place, fontsize=6, xytext=(3, 3), textcoords="offset points")
    if less_is_better:
        axis.invert_yaxis()
    axis.set_xlabel("speedup (wall clock)", fontsize=8)
    axis.set_ylabel(f"{title}{', better upwards' if less_is_better else ''}", fontsize=8)
    axis.tick_params(labelsize=7)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=7, frameon=False, title="dots: lossless, crosses: lossy", title_fontsize=6)
    return figure
