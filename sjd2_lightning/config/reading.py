"""From a composed configuration to a typed one: every problem found at once, before anything is built.

Source: ours. `conf/` holds the values, `config_groups` their types.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from sjd2_lightning.config.runs import EvaluateConfig, SharedConfig, TrainConfig
from sjd2_lightning.decoding.config import BASELINE, NOISY
from sjd2_lightning.run.files import write_whole
from sjd2_lightning.run.processes import run_id

# `${run_id:}` in conf/train.yaml; kept for the process, so that every key with it names one folder.
OmegaConf.register_new_resolver("run_id", lambda: run_id(), use_cache=True, replace=True)

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

OF_ALL_METHODS = (
    "sampling",
    "compile",
)  # keys of a method that the baseline shares, or a comparison is unfair
KeyPath = tuple[str | int, ...]
_UNKNOWN_KEY = ("extra_forbidden", "unexpected_keyword_argument")

Config = TypeVar("Config", bound=SharedConfig)


class ConfigError(ValueError):
    """A configuration with problems; `problems` has a line for each."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(dict.fromkeys(problems))
        count = len(self.problems)
        head = f"The configuration has {'a problem' if count == 1 else f'{count} problems'}:"
        super().__init__("\n".join([head, *(f"  - {problem}" for problem in self.problems)]))


def conf_dir() -> Path:
    """The folder of the configuration: beside the package in a checkout, inside it when installed."""
    package = Path(__file__).resolve().parent.parent
    return next(
        folder for folder in (package.parent / "conf", package / "conf") if (folder / "train.yaml").is_file()
    )


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


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """Names the known name that is close, or else all of them."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"did you mean `{close[0]}`?" if close else f"known here: {', '.join(sorted(known))}"


def _typed(cfg: DictConfig, wanted: type[Config], other: type[SharedConfig]) -> Config:
    try:
        tree: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError([str(error).replace("\n", "; ")]) from error
    # An experiment file may hold keys of both scripts; Hydra refuses the other's on the command line.
    for name in set(other.model_fields) - set(wanted.model_fields):
        tree.pop(name, None)
    problems = [
        f"{key}={value!r}: this target is not allowed; allowed are {', '.join(sorted(ALLOWED_TARGETS))}"
        for key, value in _targets(tree)
        if value not in ALLOWED_TARGETS
    ]
    given = _fill_methods(tree)
    names = tree.get("compare")
    problems += [
        f"compare: unknown method {name!r}; {did_you_mean(str(name), list(tree['methods']))}"
        for name in (names if isinstance(names, list) else ())
        if name not in tree["methods"]
    ]
    problems += _name_auto_windows(tree)
    while True:
        try:
            config = wanted.model_validate_json(json.dumps(tree))
        except ValidationError as error:
            unknown = {_path_in(tree, e["loc"]) for e in error.errors() if e["type"] in _UNKNOWN_KEY}
            problems += _lines(error, tree, given, unknown)
            if not unknown:
                raise ConfigError(problems) from error
            # Checks between the fields of a group run only when there are no unknown ones.
            for path in unknown:
                del _inside(tree, path[:-1])[path[-1]]
            continue
        if problems:
            raise ConfigError(problems)
        return config


def _targets(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every `_target_` of a tree, with its key."""
    items = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        here = f"{path}.{key}" if path else str(key)
        if key == "_target_":
            yield here, value
        yield from _targets(value, here)


def _fill_methods(tree: dict[str, Any]) -> set[str]:
    """Turns `decoding` and `methods` into complete methods; returns the keys of them that `decoding` gave.

    With a method chosen (`decoding=sjd2_exact`) that one is compared with autoregression, and the others
    share its sampling. Otherwise (`decoding=each`) a value that is not null replaces that of every drafting
    method that is compared: it need not suit the others.
    """
    decoding, methods = tree.pop("decoding", None), tree.get("methods")
    if not isinstance(decoding, dict) or not isinstance(methods, dict):
        raise ConfigError(["decoding: choose a file of conf/decoding, and leave `methods` a group of keys"])
    name = decoding.pop("name", None)
    given = {key: value for key, value in decoding.items() if value is not None}
    if name is not None:
        methods[name] = decoding
        tree["compare"] = list(dict.fromkeys([BASELINE, name]))
    compared = tree.get("compare")
    for title, method in methods.items():
        method.pop("name", None)
        everything = name is None and isinstance(compared, list) and title in compared
        for key in given if everything else OF_ALL_METHODS:
            # The baseline drafts nothing, and only SJD2 has levels.
            fits = key in OF_ALL_METHODS or (
                method["method"] != "ar" and (key != "num_levels" or method["method"] in NOISY)
            )
            if fits:
                method[key] = given.get(key)
    return set(decoding) if name is not None else set(given)


def _name_auto_windows(tree: dict[str, Any]) -> list[str]:
    """Puts the longest window in place of `auto` and names the method in `auto_window.methods`."""
    auto: Any = tree.get("auto_window")
    if not isinstance(auto, dict) or not all(
        isinstance(auto.get(key), list) for key in ("windows", "methods")
    ):
        return []  # a problem that is found with the others
    for name, method in tree["methods"].items():
        if method.get("window") == "auto":
            method["window"] = max((size for size in auto["windows"] if isinstance(size, int)), default=1)
            auto["methods"].append(name)
    return [
        f"auto_window.methods: unknown method {name!r}; {did_you_mean(str(name), list(tree['methods']))}"
        for name in auto["methods"]
        if name not in tree["methods"]
    ]


def _lines(error: ValidationError, tree: Any, given: set[str], unknown: set[KeyPath]) -> list[str]:
    """A line for each validation error: key, value, remedy; methods' keys as the reader gave them."""
    lines: dict[str, list[str]] = {}
    for found in error.errors():
        path = _path_in(tree, found["loc"])
        key = ".".join(str(part) for part in path)
        if found["type"] == "several":
            for line in found["ctx"]["lines"].split("\n"):
                lines[key + line if line.startswith("=") else f"{key}.{line}".lstrip(".")] = []
        elif found["type"] in _UNKNOWN_KEY:
            # Since `conf/` gives every key, the right ones stand beside the unknown one.
            known = [str(name) for name in _inside(tree, path[:-1]) if (*path[:-1], name) not in unknown]
            lines[f"{key}={found['input']!r}: "] = [f"unknown key; {did_you_mean(str(path[-1]), known)}"]
        elif found["type"].startswith("missing"):
            lines[f"{key}: missing; give it a value"] = []
        else:
            lines.setdefault(f"{key}={found['input']!r}: ", []).append(_remedy(found["msg"]))
    of_methods = re.compile(rf"^methods\.[^.]+\.(?=({'|'.join(given)})\b)")
    return [of_methods.sub("decoding.", head) + " or ".join(remedies) for head, remedies in lines.items()]


def _remedy(message: str) -> str:
    for old, new in {
        "Input should be": "must be",
        "a valid integer": "a whole number",
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
