"""The page of every command: what `sjd2 COMMAND --help` prints."""

from __future__ import annotations

import importlib
import io
import os
from contextlib import redirect_stdout, suppress
from unittest import mock

import yaml

from sjd2_lightning import __main__ as table
from sjd2_lightning.config.reading import conf_dir


def page() -> str:
    """What stands below the head of docs/reference/commands.md, in Markdown."""
    lines = fenced(table.usage())
    for name in table.COMMANDS:
        lines += [f"## sjd2 {name}", "", *fenced(help_of(name))]
    return "\n".join(lines)


def help_of(name: str) -> str:
    """What a command's --help prints on a terminal of 80 columns."""
    own = conf_dir() / "hydra" / "help" / f"{name}.yaml"
    if own.is_file():  # Hydra prints this text
        return str(yaml.safe_load(own.read_text())["template"])
    module = importlib.import_module(f"sjd2_lightning.{table.COMMANDS[name][0]}")
    shown = io.StringIO()
    with mock.patch.dict(os.environ, COLUMNS="80"), redirect_stdout(shown), suppress(SystemExit):
        module.main(["--help"])
    return shown.getvalue()


def fenced(text: str) -> list[str]:
    """A block of plain text."""
    return ["```text", text.rstrip(), "```", ""]
