"""From a composed configuration to a typed one: every problem found at once, before anything is built.

`conf/` holds the values, `config.runs` their types. Nothing is changed on the way: what Hydra prints
(`--cfg job --resolve`) is what runs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from sjd2_lightning.config.groups import did_you_mean
from sjd2_lightning.config.runs import EvaluateConfig, SharedConfig, TrainConfig
from sjd2_lightning.run.files import write_whole
from sjd2_lightning.run.processes import run_id


def _as_node(value: Any) -> Any:
    """A list as OmegaConf's own, which `--cfg job --resolve` can write into a configuration."""
    return OmegaConf.create(list(value)) if isinstance(value, list | ListConfig) else value


# `${run_id:}` in conf/train.yaml; kept for the process, so that every key with it names one folder.
OmegaConf.register_new_resolver("run_id", lambda: run_id(), use_cache=True, replace=True)
# `${dry_run:${model.init},a,b}` in conf: a for a dry run on random weights, else b
OmegaConf.register_new_resolver(
    "dry_run", lambda init, a, b: _as_node(a if init == "random_tiny" else b), replace=True
)
# `${if_scenes:${data.prepare},${data.source},${data.reference_dir},${model.condition},a}` in conf/metrics: a
# where pictures are embedded scenes, else null: what has seen scenes alone says nothing about other pictures
OmegaConf.register_new_resolver(
    "if_scenes",
    lambda prepare, source, reference, condition, a: (
        a if prepare and source == "scenes" and not reference and condition != "class" else None
    ),
    replace=True,
)
# `${either:a,b}` in conf/method: a, or b where a is null
OmegaConf.register_new_resolver("either", lambda a, b: b if a is None else a, replace=True)

# The only names that `_target_` may hold, anywhere in a configuration: instantiating a name runs its code.
ALLOWED_TARGETS = frozenset(
    f"lightning.pytorch.callbacks.{name}"
    for name in (
        "DeviceStatsMonitor",
        "EarlyStopping",
        "GradientAccumulationScheduler",
        "ThroughputMonitor",
        "Timer",
    )
)

KeyPath = tuple[str | int, ...]
_INTERPOLATED = re.compile(r"\$\{(?P<plain>[\w.]+)\}|\$\{either:\$\{(?P<first>[\w.]+)\},.*\}")
_REFERENCE = re.compile(r"\$\{([\w.]+)\}")
_UNKNOWN_KEY = ("extra_forbidden", "unexpected_keyword_argument")

Config = TypeVar("Config", bound=SharedConfig)


class ConfigError(ValueError):
    """A configuration with problems; `problems` has a line for each."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(dict.fromkeys(problems))
        if len(self.problems) == 1:
            super().__init__(f"The configuration has a problem: {self.problems[0]}")
        else:
            head = f"The configuration has {len(self.problems)} problems:"
            super().__init__("\n".join([head, *(f"  - {problem}" for problem in self.problems)]))


def conf_dir() -> Path:
    """The folder of the configuration: beside the package in a checkout, inside it when installed."""
    package = Path(__file__).resolve().parent.parent
    return next(
        folder for folder in (package.parent / "conf", package / "conf") if (folder / "train.yaml").is_file()
    )


def model_choices() -> dict[str, dict[str, Any]]:
    """Fields of every file of `conf/model`, as written, with those of the files that it stands on."""
    folder = conf_dir() / "model"
    return {
        path.stem: _fields(folder, path.stem)
        for path in sorted(folder.glob("*.yaml"))
        if path.stem != "shared"
    }


def _fields(folder: Path, name: str) -> dict[str, Any]:
    own = yaml.safe_load((folder / f"{name}.yaml").read_text())
    bases = [base for base in own.pop("defaults", []) if base != "_self_"]
    return {key: value for base in bases for key, value in _fields(folder, base).items()} | own


def train_config(cfg: DictConfig) -> TrainConfig:
    """The typed configuration of train.py; raises ConfigError with all problems."""
    return _typed(cfg, TrainConfig, EvaluateConfig)


def evaluate_config(cfg: DictConfig) -> EvaluateConfig:
    """The typed configuration of evaluate.py; raises ConfigError with all problems."""
    return _typed(cfg, EvaluateConfig, TrainConfig)


def save_config(config: SharedConfig, path: Path) -> None:
    """Writes the resolved configuration as YAML, secrets blanked."""
    from sjd2_lightning.run.provenance import redact

    write_whole(path, yaml.safe_dump(redact(config.model_dump(mode="json")), sort_keys=False))


def _typed(cfg: DictConfig, wanted: type[Config], other: type[SharedConfig]) -> Config:
    try:
        written = OmegaConf.to_container(cfg, resolve=False)
        tree: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError([_unresolved(error, written)]) from error
    # An experiment file may hold keys of both scripts; Hydra refuses the other's on the command line.
    for name in set(other.model_fields) - set(wanted.model_fields):
        tree.pop(name, None)
    problems = [
        f"{key}={value!r}: this target is not allowed; allowed are {', '.join(sorted(ALLOWED_TARGETS))}"
        for key, value in _targets(tree)
        if value not in ALLOWED_TARGETS
    ]
    while True:
        try:
            config = wanted.model_validate_json(json.dumps(tree))
        except ValidationError as error:
            unknown = {_path_in(tree, e["loc"]) for e in error.errors() if e["type"] in _UNKNOWN_KEY}
            problems += _lines(error, tree, written, unknown)
            if not unknown:
                raise ConfigError(problems) from error
            # Checks between the fields of a group run only when there are no unknown ones.
            for path in unknown:
                del _inside(tree, path[:-1])[path[-1]]
            continue
        if problems:
            raise ConfigError(problems)
        return config


def _unresolved(error: OmegaConfBaseException, written: Any) -> str:
    """What a value that refers to another one, or to the environment, does not find."""
    key = str(error.full_key or "")
    node: Any = OmegaConf.select(OmegaConf.create(written), key, throw_on_resolution_failure=False)
    for part in key.split(".") if node is None else ():
        node = written if node is None else node
        node = node.get(part) if isinstance(node, dict) else None
    for name in _REFERENCE.findall(node) if isinstance(node, str) else ():
        place, path = written, list[str]()
        for part in name.split("."):
            if not isinstance(place, dict):
                return f"{'.'.join(path)}={_shown(place)}: must be a group of keys"
            path.append(part)
            place = place.get(part)
        if isinstance(place, str) and "${" in place:  # the fault of what it refers to
            key = name
    reason = str(error).split("\n", 1)[0].rpartition("while resolving interpolation: ")[2].strip('"')
    return f"{key}: {reason}; give the value itself, or set what it refers to"


def _shown(value: Any) -> str:
    """A value as it stands in a message: whole if it is short."""
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:100]}... ({len(text)} characters)"


def _targets(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every `_target_` of a tree, with its key."""
    items = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        here = f"{path}.{key}" if path else str(key)
        if key == "_target_":
            yield here, value
        yield from _targets(value, here)


def _lines(error: ValidationError, tree: Any, written: Any, unknown: set[KeyPath]) -> list[str]:
    """A line for each validation error: key, value, remedy; the key is the one whose value is at fault."""
    lines: dict[str, list[str]] = {}
    for found in error.errors():
        path = _path_in(tree, found["loc"])
        key = ".".join(map(str, _origin(written, path)))
        if found["type"] == "several":
            for line in found["ctx"]["lines"].split("\n"):
                own, sign, rest = re.match(r"([\w.]*)(=|:|$)(.*)", line, re.S).groups()  # type: ignore[union-attr]
                at = _origin(written, (*path, *own.split("."))) if own else path
                lines[".".join(map(str, at)) + sign + rest] = []
        elif found["type"] in _UNKNOWN_KEY:
            # Since `conf/` gives every key, the right ones stand beside the unknown one.
            known = [str(name) for name in _inside(tree, path[:-1]) if (*path[:-1], name) not in unknown]
            lines[f"{key}={_shown(found['input'])}: "] = [
                f"unknown key; {did_you_mean(str(path[-1]), known)}"
            ]
        elif found["type"].startswith("missing"):
            lines[f"{key}: missing; give it a value"] = []
        else:
            remedies = lines.setdefault(f"{key}={_shown(found['input'])}: ", [])
            if (remedy := _remedy(found["msg"])) not in remedies:
                remedies.append(remedy)
    return [head + " or ".join(remedies) for head, remedies in lines.items()]


def _origin(written: Any, path: KeyPath) -> KeyPath:
    """The key that a value comes from: where `conf/` has an interpolation, the key that it names.

    `methods.sjd.window` is written as `${decoding.window}`, so what is wrong with it is wrong there; of
    `${either:${decoding.num_levels},8}` it is the first, if that has a value.
    """
    node = written
    for place, part in enumerate(path):
        node = node.get(part) if isinstance(node, dict) else None
        names = _INTERPOLATED.fullmatch(node) if isinstance(node, str) else None
        if names is not None:
            first = tuple(str(names["plain"] or names["first"]).split("."))
            if names["plain"] is not None or _inside(written, first) is not None:
                return _origin(written, (*first, *path[place + 1 :]))
    return path


def _remedy(message: str) -> str:
    for old, new in {
        "Input should be": "must be",
        "String should have at least 1 character": "must not be empty",
        "a valid integer": "a whole number",
        "a valid array": "a list: [A, B, ...]",
        "an object": "a group of keys",
        "a valid ": "a ",
    }.items():
        message = message.replace(old, new)
    return message


def _path_in(tree: Any, loc: Sequence[str | int]) -> KeyPath:
    """The part of a pydantic location that names keys: members of unions stand behind it."""
    path: list[str | int] = []
    for part in loc:
        inside = isinstance(tree, dict) if isinstance(part, str) else isinstance(tree, list)
        if not inside:
            break
        path.append(part)
        try:
            tree = tree[part]
        except (KeyError, IndexError):
            tree = None
    return tuple(path)


def _inside(tree: Any, path: KeyPath) -> Any:
    for part in path:
        tree = tree[part]
    return tree
