"""The page of every configuration key: types from `config.runs`, values and meanings from `conf/`."""

from __future__ import annotations

import dataclasses
import html
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from sjd2_lightning.config.reading import conf_dir
from sjd2_lightning.config.runs import EvaluateConfig, TrainConfig

ROOTS = {"train": TrainConfig, "evaluate": EvaluateConfig}
METHOD = "methods.<name>"
# Groups whose keys are names of one's own, each with the same keys below it.
NAMED = {"methods": METHOD}
NAMED |= {name: f"{name}.<name>" for name in ("flow.inversions", "thoughts.ways")}
# Which file of a group says what its keys are; the others say what differs.
_FIRST = ("shared", "base", "default", "auto", "offline", "wandb", "adamw")
_LARGE = 1e6  # an upper bound from here on is no choice, only a guard
_LINE = re.compile(r"^(?P<indent> *)(?P<key>[\w.]+):(?P<value>[^#]*)(?:#\s*(?P<comment>.*))?$")
_CONTINUED = re.compile(r"^\s*#\s*(?P<comment>.*)$")
_EXPERIMENTS = "Named combinations of the keys above: `sjd2 train experiment=demo`."
_NAMES = {
    Path: "path",
    int: "whole number",
    float: "number",
    str: "text",
    bool: "true or false",
    NoneType: "null",
}


@dataclass(frozen=True)
class Key:
    """One row of the page."""

    path: str
    type: str
    default: str
    meaning: str
    roots: tuple[str, ...]


def all_keys() -> list[Key]:
    """Every key of train and evaluate, in the order of the types; two rows where the commands differ."""
    found: dict[tuple[str, str, str], Key] = {}
    for root, kind in ROOTS.items():
        values, said = composed(root), comments(root)
        for path, hint, owner in leaves(kind):
            meaning = said.get(path) or attributes(owner).get(path.rpartition(".")[2], "")
            row = Key(path, described(hint), default(values, path, owner), meaning, (root,))
            same = (path, row.default, meaning)
            found[same] = dataclasses.replace(row, roots=(*found[same].roots, root)) if same in found else row
    return list(found.values())


@cache
def composed(root: str) -> Mapping[str, Any]:
    """The tree of a command as Hydra composes it, interpolations as they are written."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return OmegaConf.to_container(compose(root), resolve=False)


def leaves(kind: type, path: str = "") -> Iterator[tuple[str, Any, type]]:
    """Keys below a class of the configuration: path, type with its bounds, the class that declares it."""
    for name, hint in fields(kind).items():
        here = f"{path}.{name}" if path else name
        inner = group_in(hint)
        if inner is None:
            yield here, hint, kind
        elif here in NAMED:
            yield from leaves(inner, NAMED[here])
        else:
            yield from leaves(inner, here)


def fields(kind: type) -> dict[str, Any]:
    """Fields of a pydantic group or a dataclass, with their annotations."""
    names = kind.model_fields if issubclass(kind, BaseModel) else [f.name for f in dataclasses.fields(kind)]
    hints = get_type_hints(kind, include_extras=True)
    return {name: hints[name] for name in names}


def group_in(hint: Any) -> type | None:
    """The class behind an annotation that stands for keys of its own; None for a value."""
    if isinstance(hint, type) and (dataclasses.is_dataclass(hint) or issubclass(hint, BaseModel)):
        return hint
    if get_origin(hint) in (Annotated, Union, UnionType, dict):
        return next(filter(None, map(group_in, get_args(hint))), None)
    return None


def described(hint: Any) -> str:
    """A type in words, with what it allows."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return described(arguments[0]) + bounds(arguments[1:])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (Union, UnionType):
        return " or ".join(described(member) for member in arguments)
    if origin is tuple and arguments[-1] is not Ellipsis:
        return f"[{', '.join(map(described, arguments))}]"
    if origin in (tuple, list):
        return f"list of {described(arguments[0])}"
    return "mapping" if origin is dict else _NAMES.get(hint, getattr(hint, "__name__", str(hint)))


def bounds(marks: tuple[Any, ...]) -> str:
    """Limits of a number or a text, from pydantic's marks or the package's own."""
    flat = [inner for mark in marks for inner in (mark.metadata if isinstance(mark, FieldInfo) else [mark])]
    low, high, more = "", "", ""
    for mark in flat:
        own = getattr(mark, "without", None)  # a mark with `least` and `most`
        for name, sign in {"ge": "≥", "gt": ">"}.items():
            if hasattr(mark, name):
                low = f"{sign} {getattr(mark, name)}"
        for name, sign in {"le": "≤", "lt": "<"}.items():
            if hasattr(mark, name) and getattr(mark, name) < _LARGE:
                high = f"{sign} {getattr(mark, name)}"
        if own is not None:
            low = f"{'>' if own in ('least', 'both') else '≥'} {mark.least}"
            if mark.most < _LARGE:
                high = f"{'<' if own in ('most', 'both') else '≤'} {mark.most}"
        if getattr(mark, "pattern", None):
            more = f"`{mark.pattern}`"
    limits = " and ".join(filter(None, (low, high, more)))
    return f" {limits}" if limits else ""


def default(values: Mapping[str, Any], path: str, owner: type) -> str:
    """What a command takes if nothing is said; of a method's field that of conf/method/base.yaml."""
    parts = path.split(".")
    node: Any = values
    if path.startswith(METHOD):
        node, parts = yaml.safe_load((conf_dir() / "method" / "base.yaml").read_text()), parts[2:]
    for part in parts:
        if not isinstance(node, Mapping):  # the group is null: what its class would take
            known = dataclasses.fields(owner) if dataclasses.is_dataclass(owner) else ()
            node = next((field.default for field in known if field.name == part), dataclasses.MISSING)
            return "" if node is dataclasses.MISSING else shown(node)
        node = node[part]
    return shown(node)


def shown(value: Any) -> str:
    """A value as it is typed on the command line."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(shown, value))}]"
    if isinstance(value, float):
        return f"{value:g}"
    return {"None": "null", "True": "true", "False": "false"}.get(str(value), str(value))


@cache
def comments(root: str) -> Mapping[str, str]:
    """Comments of the files in `conf/` by key; of several files that have the key the group's first."""
    found: dict[str, str] = {}
    places = [("", conf_dir() / f"{name}.yaml") for name in ("base", root)]
    for group in groups():
        prefix = METHOD if group == "method" else group
        places += [(prefix, path) for path in options(group)]
    places += [("", path) for path in experiments()]
    for prefix, path in places:
        for key, comment in comments_in(path.read_text()):
            found.setdefault(f"{prefix}.{key}" if prefix else key, comment)
    return found


def groups() -> list[str]:
    """Groups of the configuration whose files hold keys of their own."""
    folders = sorted(path.name for path in conf_dir().iterdir() if path.is_dir())
    return [name for name in folders if name not in ("hydra", "experiment")]


def options(group: str) -> list[Path]:
    """Files of a group, first the one that says what its keys are."""
    files = (conf_dir() / group).glob("*.yaml")
    return sorted(files, key=lambda path: (path.stem not in _FIRST, path.stem))


def experiments() -> list[Path]:
    """Files of named combinations."""
    return sorted((conf_dir() / "experiment").rglob("*.yaml"))


def head_of(path: Path) -> str:
    """The comment that a file begins with."""
    lines = path.read_text().splitlines()
    count = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return " ".join(line.lstrip("# ").rstrip() for line in lines[:count] if "@package" not in line)


def comments_in(text: str) -> Iterator[tuple[str, str]]:
    """(key, comment) of a YAML file; the comment goes on in the lines below that hold nothing else."""
    stack: list[tuple[int, str]] = []
    key, said = "", ""
    for line in [*text.splitlines(), "end:"]:
        goes_on = _CONTINUED.match(line)
        if goes_on and said:
            said += f" {goes_on['comment']}"
            continue
        if said:
            yield key, said
        said = ""
        if match := _LINE.match(line):
            indent = len(match["indent"])
            stack = [entry for entry in stack if entry[0] < indent]
            stack.append((indent, match["key"]))
            key, said = ".".join(name for _, name in stack), match["comment"] or ""


@cache
def attributes(kind: type) -> Mapping[str, str]:
    """What the docstring of a class says of its attributes."""
    text = (kind.__doc__ or "").partition("Attributes:\n")[2]
    found: dict[str, str] = {}
    for names, said in re.findall(r"^        ([\w, ]+): (.*(?:\n {12,}.*)*)", text, re.M):
        found |= dict.fromkeys(names.split(", "), " ".join(said.split()))
    return found


def page() -> str:
    """What stands below the head of docs/reference/configuration.md, in Markdown."""
    rows, lines = all_keys(), []
    own = [row for row in rows if "." not in row.path]
    for title, roots in (
        ("Both commands", ("train", "evaluate")),
        ("train", ("train",)),
        ("evaluate", ("evaluate",)),
    ):
        lines += [f"## {title}", "", *table(row for row in own if row.roots == roots), ""]
    done = {row.path for row in own}
    for group in dict.fromkeys(row.path.partition(".")[0] for row in rows if "." in row.path):
        inside = [row for row in rows if row.path.startswith(f"{group}.") and row.path not in done]
        done |= {row.path for row in inside}
        lines += [f"## {group}", "", *introduced(group, inside), *table(inside), ""]
    lines += [
        "## experiment",
        "",
        _EXPERIMENTS,
        "",
        "| experiment | what it is for, how long it takes |",
        "|---|---|",
    ]
    for path in experiments():
        if path.stem != "shared":
            name = path.relative_to(conf_dir() / "experiment").with_suffix("")
            lines.append(f"| `experiment={name}` | {cell(head_of(path))} |")
    return "\n".join(lines) + "\n"


def introduced(group: str, rows: list[Key]) -> Iterator[str]:
    """Which command has the group, and its choices."""
    (roots,) = {row.roots for row in rows}
    yield f"Of {' and '.join(f'`sjd2 {root}`' for root in roots)}."
    yield ""
    folder = "method" if group == "methods" else group
    if not (conf_dir() / folder).is_dir():
        return
    chosen = "`methods.{0}`" if group == "methods" else f"`{group}={{0}}`"
    yield from ("| choice | what it is |", "|---|---|")
    for path in options(folder):
        if path.stem not in ("shared", "base"):
            yield f"| {chosen.format(path.stem)} | {cell(head_of(path))} |"
    yield ""


def table(rows: Iterable[Key]) -> Iterator[str]:
    """Rows of a Markdown table."""
    yield from ("| key | type and allowed values | default | meaning |", "|---|---|---|---|")
    for row in rows:
        value = f"`{row.default}`" if row.default else "-"
        yield f"| `{row.path}` | {cell(row.type)} | {value} | {cell(row.meaning)} |"


def cell(text: str) -> str:
    """Plain text for a cell of a Markdown table; what stands in backticks stays code."""
    parts = text.split("`")
    if len(parts) % 2 == 0:  # a lone backtick is none
        parts = [text.replace("`", "'")]
    for place, part in enumerate(parts):
        plain = part if place % 2 else re.sub(r"([\\*_\[\]{}])", r"\\\1", html.escape(part, quote=False))
        parts[place] = plain.replace("|", "\\|")
    return "`".join(parts)
