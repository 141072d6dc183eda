"""The table of an evaluation, on a console and in Markdown, and its headline: the fastest lossless method."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from sjd2_lightning.decoding.config import BASELINE
from sjd2_lightning.evaluation.quality import judge_key
from sjd2_lightning.evaluation.results import EvaluationResult, MethodResult
from sjd2_lightning.metrics.bootstrap import MetricResult
from sjd2_lightning.metrics.fidelity import MANIFOLD
from sjd2_lightning.metrics.judge import NAMES

MISSING = "–"


LEAST_IMAGES = 8  # of a headline: intervals of fewer are too wide to say anything


@dataclass(frozen=True)
class Column:
    """One column of the table.

    Attributes:
        key: key of its number.
        heading: what it is, with the extractor or scorer of a quality metric.
        decimals: number of decimals.
        short: the same where room is scarce.
        is_first: whether it is shown before anybody asks for more.
    """

    key: str
    heading: str
    decimals: int
    short: str
    is_first: bool = False


@dataclass(frozen=True)
class Cell:
    """A value and its interval as text; "" where there is no interval."""

    value: str
    interval: str = ""


@dataclass(frozen=True)
class Row:
    """One line of the table: a method, or a set of real images."""

    name: str
    kind: str
    equal: str
    num_images: int
    cells: tuple[Cell, ...]
    is_reference: bool


_CATEGORIES = ("single", "two", "three", "counting", "position", "ground", "size")
_SPEED = (
    Column("nfe", "passes", 1, "passes", True),
    Column("step_compression", "tokens / pass", 2, "tokens / pass", True),
    Column("speedup", "speedup", 2, "speedup", True),
    Column("seconds_per_image", "s / image", 2, "s / image", True),
    Column("chunk_passes", "passes / chunk", 1, "passes / chunk"),
    Column("chunk_ms_p95", "p95 ms / chunk", 1, "p95 ms / chunk"),
    Column("peak_memory_gib", "GiB", 1, "GiB"),
)
_QUALITY = (
    ("accuracy", 3),
    ("success", 3),
    ("success_minus_ar", 3),
    ("judge", 2),
    ("geneval", 3),
    ("dpg", 2),
    ("geneval2", 2),
    ("geneval2_am", 2),
    ("clip_score", 2),
    ("clip_gain", 2),
    ("pick_score", 2),
    ("pick_score_minus_ar", 3),
    ("fd", 1),
    ("kid", 3),
    ("cmmd", 3),
    *((name, 2) for name in MANIFOLD),
)
_DISTANCES = {"fd_": 1, "kid_": 3, **{f"{name}_": 2 for name in MANIFOLD}}  # of further extractors
# The one quality that is shown first: a distance sees the layout of a picture, a CLIP score may not.
_FIRST_QUALITY = ("accuracy", "success", "judge", "kid", "fd", "clip_gain", "clip_score")
_SAID_TWICE = ("nfe", "seconds_per_image")  # whose intervals tokens a pass and speedup show as well
_SHORT = {"judge": "right", "fd": "FD", "kid": "KID", "clip_score": "CLIP score", "clip_gain": "CLIP gain"}
_SHORT |= {"cmmd": "CMMD", "pick_score": "PickScore", "pick_score_minus_ar": f"PickScore\nless {BASELINE}"}


def columns(result: EvaluationResult) -> tuple[Column, ...]:
    """Columns that hold at least one number, those first that are shown first; quality metrics are headed by
    their full names."""
    names: dict[str, str] = {}
    for measured in _all_measured(result):
        names |= {key: measure.name for key, measure in measured.items() if key not in names}
    names["clip_gain"] = "CLIP gain" if "clip_gain" in names else ""
    names["judge"] = "judged right" if "judge" in names else ""
    names["pick_score_minus_ar"] = f"PickScore less {BASELINE}" if "pick_score_minus_ar" in names else ""
    first = next((key for key in _FIRST_QUALITY if names.get(key)), None)
    quality = [
        Column(key, names[key], decimals, _SHORT.get(key, key), key == first)
        for key, decimals in _QUALITY
        if names.get(key)
    ]
    quality += [
        Column(key, name, decimals, name.replace("_", " ", 1))
        for key, name in names.items()
        for prefix, decimals in _DISTANCES.items()
        if key.startswith(prefix)
    ]
    found = [*(column for column in _SPEED if column.key in names), *quality]
    return tuple(sorted(found, key=lambda column: not column.is_first))  # sorting keeps the order else


def rows(result: EvaluationResult) -> list[Row]:
    """Methods in the order given, then the reference rows."""
    shown = columns(result)
    found = []
    for name, method in result.methods.items():
        cells = tuple(cell(method.measured, column) for column in shown)
        found.append(Row(name, acceptance_text(method), equal_text(method), method.num_images, cells, False))
    for name, (count, quality) in result.references.items():
        cells = tuple(cell(quality.measured, column) for column in shown)
        found.append(Row(_title(name), MISSING, MISSING, count, cells, True))
    return found


def cell(measured: Mapping[str, MetricResult], column: Column) -> Cell:
    """The text of one number."""
    measure = measured.get(column.key)
    if measure is None:
        return Cell(MISSING)
    digits = column.decimals
    interval = ""
    if measure.interval is not None:
        low, high = measure.interval
        interval = f"[{low:.{digits}f}, {high:.{digits}f}]"
    return Cell(f"{measure.value:.{digits}f}", interval)


def judge_columns(result: EvaluationResult) -> tuple[Column, ...]:
    """Columns of the judge's table: each category, all but names, and that less the baseline's."""
    keys = {key for measured in _all_measured(result) for key in measured}
    order = [judge_key(name) for name in (*_CATEGORIES, NAMES, "overall")]
    names = {key: key.removeprefix("judge_") for key in order if key in keys}
    found = [Column(key, name, 2, name) for key, name in names.items()]
    found = [column if column.key != "judge" else replace(column, heading="overall") for column in found]
    less = Column("judge_minus_ar", f"overall less {BASELINE}", 2, f"less {BASELINE}")
    return (*found, *([less] if less.key in keys else []))


def judge_rows(result: EvaluationResult) -> list[tuple[str, tuple[Cell, ...]]]:
    """Names of methods and real sets, and their cells under `judge_columns`; nothing without a judge."""
    shown = judge_columns(result)
    measured = {name: method.measured for name, method in result.methods.items()}
    measured |= {_title(name): quality.measured for name, (_, quality) in result.references.items()}
    return [(name, tuple(cell(own, column) for column in shown)) for name, own in measured.items() if shown]


def _title(name: str) -> str:
    """What a set of real images is called."""
    return "real" if name == "real" else f"real, {name.replace('_', ' ')}"


def acceptance_text(method: MethodResult) -> str:
    """Acceptance mode of a method; "(lossy)" where it changes the law of the samples."""
    return method.config.acceptance if method.config.lossless else f"{method.config.acceptance} (lossy)"


def equal_text(method: MethodResult) -> str:
    """Share of images that equal the baseline's, never rounded up to all."""
    if method.equal_to_ar is None or method.name == BASELINE:
        return MISSING
    return f"{math.floor(100 * method.equal_to_ar)} %"


def baseline_note(result: EvaluationResult) -> str:
    """What the column "= ar" compares with, where that is not plain decoding in its own fastest passes."""
    if BASELINE not in result.methods:
        return ""
    config = result.methods[BASELINE].config
    notes = []
    if config.window_shape > 1:
        notes.append(f"commits one token of each pass, and passes are shaped for {config.window_shape} slots")
    if config.invariant:
        notes.append("computes by batch-invariant arithmetic, as all methods here do")
    return f"{BASELINE} {' and '.join(notes)}" if notes else ""


def control_notes(result: EvaluationResult) -> list[str]:
    """What the metrics that are shown have shown on real images."""
    return [control.sentence for control in result.controls if control.passed]


def console_table(result: EvaluationResult, width: int = 80) -> Table:
    """The table for rich's console: what matters first, and as many columns as fit.

    Args:
        result: result of an evaluation.
        width: columns of the terminal.
    """
    shown, ruler = columns(result), Console(width=10_000)
    for count in range(len(shown), 0, -1):
        table = _console_columns(result, count)
        if ruler.measure(table).maximum <= width:
            break
    images = " or ".join(map(str, sorted({row.num_images for row in rows(result)})))
    caption = f"{images} images a row; in brackets: 95 % bootstrap intervals"
    left_out = "; more on the page" if count < len(shown) else ""
    notes = [f"{caption}{left_out}", baseline_note(result), *control_notes(result)]
    table.caption = "\n".join(filter(None, notes))
    return table


def _console_columns(result: EvaluationResult, count: int) -> Table:
    """The first columns: value, and its interval on the line below; acceptance below the method."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, padding=0)
    table.add_column("method", overflow="fold")
    table.add_column("= ar", justify="right")
    for column in columns(result)[:count]:
        table.add_column(column.short.replace(" / ", "\n/ "), justify="right")
    previous: Row | None = None
    for row in rows(result):
        if previous is not None and row.is_reference and not previous.is_reference:
            table.add_section()
        texts = [
            f"{c.value}\n[dim]\\{c.interval}[/dim]"
            if c.interval and column.key not in _SAID_TWICE
            else c.value
            for column, c in zip(columns(result), row.cells[:count], strict=False)
        ]
        name = row.name.removeprefix("real, ") if row.is_reference else f"{row.name}\n[dim]{row.kind}[/dim]"
        table.add_row(name, row.equal, *texts, style="dim" if row.is_reference else "")
        previous = row
    return table


def markdown_table(result: EvaluationResult) -> str:
    """The table in Markdown, intervals in brackets behind the values."""
    headings = ["method", "acceptance", "= ar", *(column.heading for column in columns(result)), "N"]
    lines = []
    for row in rows(result):
        cells = [f"{c.value} {c.interval}".strip() for c in row.cells]
        lines.append([row.name, row.kind, row.equal, *cells, str(row.num_images)])
    note = baseline_note(result)
    return (
        "\n".join([*markdown_lines(headings, lines, num_texts=2), *(["", f"{note}."] if note else [])]) + "\n"
    )


def markdown_lines(headings: Sequence[str], cells: Sequence[Sequence[str]], num_texts: int = 1) -> list[str]:
    """Lines of a Markdown table: `num_texts` columns of text, then numbers, which are aligned right."""
    rule = ["---"] * num_texts + ["---:"] * (len(headings) - num_texts)
    table = (headings, rule, *cells)
    return ["| " + " | ".join(text.replace("|", "\\|") for text in line) + " |" for line in table]


def _all_measured(result: EvaluationResult) -> list[Mapping[str, MetricResult]]:
    return [
        *(method.measured for method in result.methods.values()),
        *(quality.measured for _, quality in result.references.values()),
    ]


@dataclass(frozen=True)
class Number:
    """One number of the headline, its unit, and its interval as text ("" where there is none)."""

    value: str
    unit: str
    interval: str = ""


@dataclass(frozen=True)
class Headline:
    """The fastest lossless method.

    Attributes:
        method: name of the method.
        sentence: what it does and promises.
        numbers: speedup, tokens a pass and passes.
    """

    method: str
    sentence: str
    numbers: tuple[Number, ...]

    @property
    def numbers_line(self) -> str:
        """The numbers as a sentence."""
        texts = [f"{n.value} {n.interval} {n.unit}".replace("  ", " ") for n in self.numbers]
        return f"{'; '.join(texts)}."


def headline(result: EvaluationResult) -> Headline | None:
    """The fastest lossless method beside the baseline.

    None where there is none, or no baseline, or fewer than `LEAST_IMAGES` images.
    """
    drafting = [
        method
        for name, method in result.methods.items()
        if name != BASELINE and method.config.lossless and "speedup" in method.measured
    ]
    if not drafting or len(result.prompts) < LEAST_IMAGES:
        return None
    best = max(drafting, key=lambda method: method.measured["speedup"].value)
    speed, tokens = (cell(best.measured, Column(key, "", 2, "")) for key in ("speedup", "step_compression"))
    numbers = (
        Number(f"{speed.value}×", "speedup, wall clock", speed.interval),
        Number(tokens.value, "tokens a pass", tokens.interval),
        Number(f"{best.measured['nfe'].value:.0f}", f"passes an image{_of_baseline(result)}"),
    )
    return Headline(best.name, f"{best.name} is the fastest lossless method here{_promise(best)}.", numbers)


def headline_missing(result: EvaluationResult) -> str:
    """Why there is no headline, where that is for want of images; else ""."""
    count = len(result.prompts)
    if count >= LEAST_IMAGES:
        return ""
    return f"{count} images are too few to name a fastest method: {LEAST_IMAGES} are needed for a headline."


def _promise(best: MethodResult) -> str:
    if best.equal_to_ar == 1:
        return f": its images are those of plain decoding, {best.records[0].SAME}"
    if best.config.acceptance in ("replay", "tolerance"):
        return ""
    return ": it draws other images than plain decoding, by the same law"


def _of_baseline(result: EvaluationResult) -> str:
    return f", plain decoding {result.methods[BASELINE].measured['nfe'].value:.0f}"
