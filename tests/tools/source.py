"""Reads modules, their imports, and what nothing uses out of the source, for the tests of the house rules."""

import ast
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

PACKAGE = "sjd2_lightning"
REPO = Path(__file__).resolve().parent.parent.parent


@cache
def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name inside it ("" is the package itself)."""
    root = REPO / PACKAGE
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported_names(source: str, package: str = "") -> set[str]:
    """Absolute dotted names that a source imports, at the top or inside functions.

    `from a import b` yields `a.b`, since b may be a module; `package` is the dotted name of the package the
    source lies in, for relative imports.
    """
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base] if base else parents)
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def to_module(name: str) -> str | None:
    """The module of the package that an absolute dotted name leads to; None when it leads elsewhere."""
    if name.split(".")[0] != PACKAGE:
        return None
    inner = name.split(".")[1:]
    while inner and ".".join(inner) not in modules():
        inner.pop()
    return ".".join(inner)


@cache
def imports(module: str) -> tuple[frozenset[str], frozenset[str]]:
    """Modules of the package, and third-party distributions' top names, that a module imports."""
    path = modules()[module]
    package = ".".join([PACKAGE, *path.relative_to(REPO / PACKAGE).parent.parts])
    inner, outer = set(), set()
    for name in imported_names(path.read_text(), package):
        target = to_module(name)
        if target is not None:
            inner.add(target)
        elif name.split(".")[0] not in sys.stdlib_module_names:
            outer.add(name.split(".")[0])
    return frozenset(inner - {module}), frozenset(outer)


def closure(module: str) -> set[str]:
    """All modules of the package that run when a module is imported: what it imports, and their packages."""
    seen, waiting = set(), [module]
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        waiting.extend(imports(name)[0])
        while "." in name:
            name = name.rpartition(".")[0]
            waiting.append(name)
    return seen


def cycle() -> list[str]:
    """Modules that import each other in a circle; empty when there is none."""
    done: set[str] = set()

    def walk(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for target in sorted(imports(module)[0]):
            if found := walk(target, [*path, module]):
                return found
        done.add(module)
        return []

    for name in modules():
        if found := walk(name, []):
            return found
    return []


def definitions(tree: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """Functions, classes and methods of a module by qualified name; those inside functions are left out."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name, node
        if isinstance(node, ast.ClassDef):
            yield from ((f"{node.name}.{name}", inner) for name, inner in definitions(node))


def used_words(node: ast.AST) -> Counter[str]:
    """Identifiers that code reads as names or attributes; imports count only where they rename."""
    words: Counter[str] = Counter()
    for inner in ast.walk(node):
        if isinstance(inner, ast.Name):
            words[inner.id] += 1
        elif isinstance(inner, ast.Attribute):
            words[inner.attr] += 1
        elif isinstance(inner, ast.alias) and inner.asname not in (None, inner.name):
            words[inner.name] += 1
    return words


def unused(sources: Mapping[str, str], others: str = "") -> list[str]:
    """Functions, classes and methods that nothing reads outside their own body, as `module: name`.

    Names are compared as words, so two things of one name count as used together. Special methods are left
    out.

    Args:
        sources: source of every module by its name.
        others: text of templates and configuration, whose words count as uses.
    """
    trees = {name: ast.parse(source) for name, source in sources.items()}
    words = sum(map(used_words, trees.values()), Counter(re.findall(r"\w+", others)))
    found = []
    for module, tree in trees.items():
        for qualified, node in definitions(tree):
            name = qualified.rpartition(".")[2]
            if not name.startswith("__") and words[name] <= used_words(node)[name]:
                found.append(f"{module}: {qualified}")
    return sorted(found)
