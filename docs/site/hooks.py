"""Pages that are made while the site is built, for mkdocs (`hooks` in mkdocs.yml)."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

_REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(_REPO))
# files of the top level that are pages too
_TOP = {"changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the generated pages."""
    from docs.site import commands, configuration

    made = {"reference/configuration.md": configuration.page(), "reference/commands.md": commands.page()}
    made |= {page: as_page((_REPO / name).read_text(encoding="utf-8")) for page, name in _TOP.items()}
    for page, text in made.items():
        files.append(File.generated(config, page, content=text))
    return files


def as_page(text: str) -> str:
    """A file of the top level as a page of docs/: its links to docs/ lead to their pages."""
    return re.sub(r"\]\(docs/", "](", text)
