"""Pages that are made while the site is built, for mkdocs (`hooks` in mkdocs.yml)."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

_REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(_REPO))
# files of the top level that are pages too
_TOP = {"changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the files of the top level; their links to docs/ lead to pages."""
    for page, name in _TOP.items():
        text = re.sub(r"\]\(docs/", "](", (_REPO / name).read_text(encoding="utf-8"))
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Adds to the pages of references what is made of code and `conf/`."""
    from docs.site import commands, configuration

    made = {"reference/configuration.md": configuration.page, "reference/commands.md": commands.page}
    make = made.get(page.file.src_uri)
    return markdown if make is None else f"{markdown}\n\n{make()}"
