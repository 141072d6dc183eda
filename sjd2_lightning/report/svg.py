"""Matplotlib figures as SVG that follows the page: its colours are CSS variables, its text is the page's.

Source: ours.
"""

from __future__ import annotations

import io
import re
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

# Colours that figures are drawn with, and the page's variables (templates/base.css) that stand for them.
METHOD_COLOURS = (
    "#7a7f87", "#4c78a8", "#f58518", "#54a24b", "#b279a2", "#d6575a", "#3fa7a0", "#9d755d", "#c5a020"
)  # fmt: skip
TEXT, QUIET, LINE = "#000000", "#61666d", "#d9dce0"
_VARIABLES = {TEXT: "--text", QUIET: "--quiet", LINE: "--line"} | {
    colour: f"--method-{place}" for place, colour in enumerate(METHOD_COLOURS)
}
_STYLE: dict[Any, str] = {"svg.fonttype": "none", "font.family": "sans-serif", "svg.hashsalt": "report"}
_DROPPED = re.compile(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>|<!--.*?-->", re.DOTALL)
_ID = re.compile(r"(\bid=\"|href=\"#|url\(#)")
_FONT = re.compile(r"font: ([\d.]+)px [^;\"]*")
_SIZE = re.compile(r"<svg [^>]*?viewBox=\"([^\"]+)\"[^>]*>")


def method_colour(place: int) -> str:
    """Colour of the method at this place of the comparison, in every figure."""
    return METHOD_COLOURS[place % len(METHOD_COLOURS)]


def figure_svg(figure: Figure, name: str, label: str) -> str:
    """A figure as an `<svg>` element without style sheet, colours or fonts of its own.

    Args:
        figure: drawn in the colours of this module.
        name: unique on the page; goes in front of every id.
        label: what it shows, for readers that cannot see it.
    """
    buffer = io.StringIO()
    with rc_context(_STYLE):
        figure.savefig(buffer, format="svg", transparent=True)
    text = buffer.getvalue()
    text = _DROPPED.sub("", text[text.index("<svg") :])
    text = _ID.sub(rf"\g<1>{name}-", text)
    text = _FONT.sub(r"font-size: \1px", text)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    label = label.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    head = rf'<svg viewBox="\1" role="img" aria-label="{label}" fill="var(--text)" stroke-linejoin="round">'
    return re.sub(r"\s*\n\s*", " ", _SIZE.sub(lambda found: found.expand(head), text, count=1))
