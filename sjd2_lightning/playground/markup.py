"""Frames as HTML: no element takes text from a visitor unescaped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from sjd2_lightning.evaluation.prompts import PromptItem
from sjd2_lightning.playground.frames import SMALL_PX, Side
from sjd2_lightning.playground.player import Frame

_WORDS = {"drawing": "Drawing ...", "stopped": "Stopped."}


@dataclass(frozen=True)
class Row:
    """A prompt that two methods have drawn.

    Attributes:
        item: the prompt.
        frame: the last frame of its race.
    """

    item: PromptItem
    frame: Frame

    @property
    def same(self) -> bool:
        """Whether both images were found equal."""
        return self.frame.verdict is not None and self.frame.verdict.startswith("Same image")


def pair(sides: Sequence[Side]) -> str:
    """Pictures side by side, with passes, seconds and how far they are."""
    return f'<div class="pair">{"".join(map(_figure, sides))}</div>'


def line(text: str, kind: str = "") -> str:
    """A line of text under the pictures.

    Args:
        text: the text.
        kind: "same", "problem" or "".
    """
    return f'<p class="line {kind}" role="status">{escape(text)}</p>'


def status(frame: Frame) -> str:
    """What a race has come to."""
    if frame.verdict is not None:
        first, second = frame.sides
        times = f" {_ratio(first, second)}" if second.seconds else ""
        return line(frame.verdict + times, "same" if frame.verdict.startswith("Same image") else "")
    return line(_WORDS.get(frame.state, ""))


def moment(sides: Sequence[Side], place: int, most: int) -> str:
    """A finished decoding after some pass."""
    return pair(sides) + line(f"After pass {place} of {most}.")


def gallery(rows: Sequence[Row]) -> str:
    """All pairs so far."""
    return f'<div class="gallery">{"".join(map(_row, rows))}</div>'


def summary(rows: Sequence[Row], num_prompts: int) -> str:
    """Passes and seconds of both methods over all pairs so far."""
    if not rows:
        return line(f"0 of {num_prompts} prompts.")
    firsts, seconds = zip(*(row.frame.sides for row in rows), strict=True)
    totals = [
        (sum(side.passes for side in own), sum(side.seconds for side in own)) for own in (firsts, seconds)
    ]
    names = firsts[0].name, seconds[0].name
    parts = [
        f"{name}: {passes / len(rows):.1f} passes and {taken / len(rows):.2f} s an image"
        for name, (passes, taken) in zip(names, totals, strict=True)
    ]
    num_same = sum(row.same for row in rows)
    text = f"{len(rows)} of {num_prompts} prompts. {'; '.join(parts)}. Same image: {num_same} of {len(rows)}."
    return line(text, "same" if num_same == len(rows) else "")


def _figure(side: Side) -> str:
    height, width = side.size
    kind = "small" if max(side.size) <= SMALL_PX else ""
    far = "done in " if side.done else ""
    passes = "pass" if side.passes == 1 else "passes"
    return (
        f'<figure data-passes="{side.passes}" data-done="{int(side.done)}">'
        f'<div class="picture {kind}" style="aspect-ratio: {width} / {height}">'
        f'<img decoding="sync" alt="what {escape(side.name)} has drawn so far" src="{side.picture}"></div>'
        f'<div class="bar"><i style="width: {100 * side.committed:.1f}%"></i></div>'
        f"<figcaption><b>{escape(side.name)}</b><span>{far}<em>{side.passes}</em> {passes}, "
        f"<em>{side.seconds:.2f}</em> s</span></figcaption></figure>"
    )


def _row(row: Row) -> str:
    cells = "".join(
        f'<figure><div class="picture {"small" if max(side.size) <= SMALL_PX else ""}" '
        f'style="aspect-ratio: {side.size[1]} / {side.size[0]}">'
        f'<img alt="{escape(row.item.prompt)}, by {escape(side.name)}" src="{side.picture}"></div>'
        f"<figcaption>{escape(side.name)}<span>{side.passes} passes, {side.seconds:.2f} s</span>"
        "</figcaption></figure>"
        for side in row.frame.sides
    )
    mark = '<b class="same">same image</b>' if row.same else ""
    return f'<section><h3>{escape(row.item.prompt)} {mark}</h3><div class="pair">{cells}</div></section>'


def _ratio(first: Side, second: Side) -> str:
    return (
        f"{second.name} took {second.passes} passes in place of {first.passes}, and "
        f"{second.seconds:.2f} s in place of {first.seconds:.2f} s."
    )
