"""What a page is made of: templates, figures as inline SVG, embedded images. Nothing comes from elsewhere.

Templates are strict and escaped. A page allows one script, its own, by the hash in its policy.
"""

from __future__ import annotations

import base64
import hashlib
import io
import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib import rc_context
from matplotlib.figure import Figure
from PIL import Image

from sjd2_lightning.data.pictures import png_bytes

# Colours that figures are drawn with; templates/base.css has a variable for each.
METHOD_COLOURS = (
    "#7a7f87", "#4c78a8", "#f58518", "#54a24b", "#b279a2", "#d6575a", "#3fa7a0", "#9d755d", "#c5a020"
)  # fmt: skip
TEXT, QUIET, LINE = "#000000", "#61666d", "#d9dce0"

# A page holds an image of up to LOSSLESS_PX a side as it is, a larger one as WebP of at most MAX_PX a side.
LOSSLESS_PX, MAX_PX = 256, 512
_WEBP_QUALITY = 88

_TEMPLATES = Path(__file__).parent / "templates"
_VARIABLES = {TEXT: "--text", QUIET: "--quiet", LINE: "--line"} | {
    colour: f"--method-{place}" for place, colour in enumerate(METHOD_COLOURS)
}
_STYLE: dict[Any, str] = {"svg.fonttype": "none", "font.family": "sans-serif", "svg.hashsalt": "report"}
_DROPPED = re.compile(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>|<!--.*?-->", re.DOTALL)
_ID = re.compile(r"(\bid=\"|href=\"#|url\(#)")
_FONT = re.compile(r"font: ([\d.]+)px [^;\"]*")
_SIZE = re.compile(r"<svg [^>]*?viewBox=\"([^\"]+)\"[^>]*>")


def render(template: str, title: str, **values: Any) -> str:
    """A page as text; `templates/<stem>.css` and `.js` become part of it where they exist.

    Args:
        template: file name of the template.
        title: title of the page.
        values: values that the template names; a missing one raises jinja2.UndefinedError.
    """
    stem = template.removesuffix(".html")
    style = _text("base.css") + _text(f"{stem}.css")
    script = _text(f"{stem}.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        _environment()
        .get_template(template)
        .render(
            title=title,
            style=style,
            script=script,
            # nothing from elsewhere, and no script but the one with this hash
            policy="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src "
            + (f"'sha256-{digest}'" if script else "'none'"),
            **values,
        )
    )


@cache
def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _text(name: str) -> str:
    path = _TEMPLATES / name
    return path.read_text() if path.is_file() else ""


def method_colour(place: int) -> str:
    """Colour of the method at this place of the comparison, the same in every figure."""
    return METHOD_COLOURS[place % len(METHOD_COLOURS)]


def figure_svg(figure: Figure, name: str, label: str) -> str:
    """A figure as an `<svg>` element without style sheet, colours or fonts of its own.

    Args:
        figure: a figure in the colours of this module.
        name: unique name on the page; goes in front of every id.
        label: what the figure shows, for readers who cannot see it.
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


def data_uri(data: bytes, kind: str = "png") -> str:
    """Bytes of an image file as a data URI."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def embedded_image(path: Path) -> str:
    """A PNG as data URI: unchanged up to `LOSSLESS_PX` a side, else as WebP of at most `MAX_PX`."""
    with Image.open(path) as image:
        if max(image.size) <= LOSSLESS_PX:
            return data_uri(path.read_bytes())
        return _embedded_small(image.convert("RGB"))


def embedded_pixels(pixels: np.ndarray) -> str:
    """Pixels (h, w, 3) uint8 as data URI, as `embedded_image` has them."""
    if max(pixels.shape[:2]) <= LOSSLESS_PX:
        return data_uri(png_bytes(pixels))
    return _embedded_small(Image.fromarray(pixels))


def _embedded_small(image: Image.Image) -> str:
    image.thumbnail((MAX_PX, MAX_PX))
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=_WEBP_QUALITY)
    return data_uri(buffer.getvalue(), "webp")
