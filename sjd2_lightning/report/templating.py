"""Pages from templates: strict, escaped, with one script that the page itself allows.

Source: ours.
"""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

_TEMPLATES = Path(__file__).parent / "templates"


def render(template: str, title: str, **values: Any) -> str:
    """A page as text; `templates/<stem>.css` and `.js` become part of it where they exist.

    Args:
        template: its file name.
        title: of the page.
        values: what the template names; one that is missing raises jinja2.UndefinedError.
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
            # nothing from elsewhere, and no script but the one whose hash this is
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
