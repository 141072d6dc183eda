"""The formula of the front page is the code that runs: what documents name exists, and is used."""

import ast
import importlib
import re

import pytest

from tests.tools.source import PACKAGE, REPO, modules

DOCUMENTS = ("docs/architecture.md", "docs/decoding.md")
# `module.name` or `room.module.name` in inline code, such as `noise.denoise`
NAMED = sorted(
    {
        name
        for document in DOCUMENTS
        for name in re.findall(r"`([a-z_]+(?:\.\w+)+)`", (REPO / document).read_text())
        if name not in modules()
        and not name.endswith(".py")
        and any(name.startswith(f"{module}.") for module in modules() if module)
    }
)


def home(name: str) -> tuple[str, list[str]]:
    """The module that a dotted name leads to, and the names inside it."""
    module = max((module for module in modules() if name.startswith(module + ".")), key=len)
    return module, name.removeprefix(module + ".").split(".")


def uses(name: str) -> int:
    """How often the package reads a name, its own definition and imports apart."""
    found = 0
    for path in modules().values():
        for node in ast.walk(ast.parse(path.read_text())):
            read = isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id == name
            found += read or (isinstance(node, ast.Attribute) and node.attr == name)
    return found


@pytest.mark.parametrize("name", NAMED)
def test_what_a_document_names_runs(name):
    module, names = home(name)
    value = importlib.import_module(f"{PACKAGE}.{module}")
    for part in names:
        value = getattr(value, part)
    assert uses(names[-1]) > 0, "the document names what the package does not use"


def test_the_formulas_are_named():
    assert {"noise.perturb", "noise.denoise", "noise.NoiseProcess", "decoding.loop.decode"} <= set(NAMED)


def test_what_nobody_calls_is_seen():
    assert uses("denoise") > 0
    assert uses("a_name_that_nobody_calls") == 0
