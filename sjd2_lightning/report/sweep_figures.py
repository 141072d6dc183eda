"""Figures of a sweep: maps over window and noise levels, and quality against speed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
    "cmmd": ("CMMD", True),
    "pick_score": ("PickScore", False),
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


@dataclass(frozen=True)
class Cell:
    """A number of a map and its interval; infinite ends where it has none."""

    value: float
    low: float = -np.inf
    high: float = np.inf

    def overlaps(self, other: Cell) -> bool:
        """Whether both have intervals, and these share a value."""
        return (
            bool(np.isfinite([self.low, other.low]).all())
            and self.low <= other.high
            and other.low <= self.high
        )


Cells = Mapping[tuple[Any, Any], Cell]  # by line and column


def sweep_cells(rows: Sequence[SweepRow], key: str) -> dict[str, Cells]:
    """A number of each method that drafts by (levels, window), where it differs between settings.

    Runs that share a cell are averaged, and have no interval.
    """
    runs: dict[str, dict[tuple[int, int], list[Cell]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row.method != BASELINE and key in row.measured:
            ends = (row.measured.get(f"{key}_low", -np.inf), row.measured.get(f"{key}_high", np.inf))
            runs[row.method][row.num_levels, row.window].append(Cell(row.measured[key], *ends))
    cells = {method: {place: _mean(own) for place, own in found.items()} for method, found in runs.items()}
    return {method: found for method, found in cells.items() if differ(found)}


def _mean(cells: Sequence[Cell]) -> Cell:
    return cells[0] if len(cells) == 1 else Cell(float(np.mean([cell.value for cell in cells])))


def differ(cells: Cells) -> bool:
    """Whether some cell's number is not that of the others."""
    return len({cell.value for cell in cells.values()}) > 1


def cell_map(
    panels: Mapping[str, Cells],
    title: str,
    less_is_better: bool,
    axes: tuple[str, str] = ("levels", "window"),
) -> Figure | None:
    """A number over two swept keys, a panel for each method; see `frame_of` for the frame.

    Args:
        panels: cells of each method.
        title: what the number is.
        less_is_better: whether the least cell is framed, not the greatest.
        axes: names of lines and columns.

    Returns:
        None where there is no panel.
    """
    if not panels:
        return None
    values = np.array([cell.value for found in panels.values() for cell in found.values()])
    span = (float(values.min()), float(values.max()))
    heights = [len({line for line, _ in found}) for found in panels.values()]
    widest = max(len({column for _, column in found}) for found in panels.values())
    figure = Figure(
        figsize=(max(3.6, 0.95 * widest + 1.6), 0.5 * sum(heights) + 0.75 * len(panels) + 0.4),
        dpi=150,
        layout="constrained",
    )
    figure.suptitle(title, fontsize=9)
    drawn = figure.subplots(len(panels), 1, squeeze=False, height_ratios=[h + 0.01 for h in heights])[:, 0]
    for axis, (method, found) in zip(drawn, panels.items(), strict=True):
        _map_panel(axis, found, span, less_is_better)
        axis.set_ylabel(axes[0], fontsize=7)
        axis.set_title(method, fontsize=8, loc="left")
    drawn[-1].set_xlabel(axes[1], fontsize=8)
    return figure


def frame_of(cells: Cells, less_is_better: bool) -> tuple[tuple[Any, Any], bool] | None:
    """The best cell, and whether its interval is clear of all others'.

    None for a tie: another cell shows the same two decimals.
    """
    best = (min if less_is_better else max)(cells, key=lambda place: cells[place].value)
    others = [cell for place, cell in cells.items() if place != best]
    if any(f"{cell.value:.2f}" == f"{cells[best].value:.2f}" for cell in others):
        return None
    return best, not any(cell.overlaps(cells[best]) for cell in others)


def _map_panel(axis: Axes, cells: Cells, span: tuple[float, float], less_is_better: bool) -> None:
    lines, columns = (sorted(set(names), key=_in_order) for names in zip(*cells, strict=True))
    grid = np.full((len(lines), len(columns)), np.nan)
    middle = sum(span) / 2
    for (line, column), cell in cells.items():
        place = columns.index(column), lines.index(line)
        grid[place[::-1]] = cell.value
        interval = f"\n[{cell.low:.2f}, {cell.high:.2f}]" if np.isfinite(cell.low) else ""
        colour = "black" if cell.value > middle else "white"
        axis.text(*place, f"{cell.value:.2f}{interval}", ha="center", va="center", fontsize=6, color=colour)
    axis.imshow(grid, cmap="viridis", vmin=span[0], vmax=span[1], aspect="auto")
    if (framed := frame_of(cells, less_is_better)) is not None:
        (line, column), is_clear = framed
        corner = (columns.index(column) - 0.5, lines.index(line) - 0.5)
        style = "-" if is_clear else ":"
        frame = Rectangle(corner, 1, 1, fill=False, edgecolor="#e45756", linewidth=2, linestyle=style)
        frame.set_clip_on(False)
        axis.add_patch(frame)
    axis.set_xticks(range(len(columns)), [str(name) for name in columns], fontsize=7)
    axis.set_yticks(range(len(lines)), [str(name) for name in lines], fontsize=7)


def _in_order(name: Any) -> tuple[bool, float, str]:
    """Numbers by their size, then words."""
    try:
        return False, float(name), ""
    except ValueError:
        return True, 0.0, str(name)


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
        None without a speedup and a quality metric, with fewer than three rows, or where quality is the same.
    """
    key = next((key for key in QUALITY if any(key in row.measured for row in rows)), None)
    shown = [row for row in rows if key is not None and key in row.measured and "speedup" in row.measured]
    if key is None or len(shown) < 3 or len({row.measured[key] for row in shown}) == 1:
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
