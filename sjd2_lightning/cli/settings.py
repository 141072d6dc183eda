"""What exported weights say of how they are decoded, as keys: size, sampling and the noise they were shown.

`settings.json` lies beside the weights. Its keys stand in front of those of the command line, which win.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sjd2_lightning.cli.card import Card
from sjd2_lightning.config.runs import TrainConfig
from sjd2_lightning.models.hub import HubName, located
from sjd2_lightning.models.weights import ADAPTER_FILE, BACKBONE_FILE, SETTINGS_FILE
from sjd2_lightning.run.files import write_whole


def write_settings(config: TrainConfig, card: Card) -> None:
    """Writes the settings of a training beside the weights that it exported."""
    settings = {
        "image_size": config.model.image_size,
        "sampling": config.model.sampling.model_dump(),
        "noise": {"process": asdict(config.noise.process), "trajectory": config.noise.trajectory},
        "num_levels": config.noise.num_levels,
        "card": asdict(card),
    }
    write_whole(Path(config.export_dir) / SETTINGS_FILE, json.dumps(settings, indent=2) + "\n")


def read_settings(folder: Path) -> dict[str, Any]:
    """Settings of exported weights; empty where an older export has none.

    Raises:
        ValueError: the file holds no size and sampling.
    """
    path = folder / SETTINGS_FILE
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text())
        height, width = found["image_size"]
        return {**found, "image_size": [int(height), int(width)], "sampling": dict(found["sampling"])}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} names no size and sampling ({error}); remove it, or export again"
        ) from error


def settings_keys(folder: Path) -> Iterator[str]:
    """Keys of `evaluate.py` of the settings in a folder of weights, "key=value" each."""
    found = read_settings(folder)
    if not found:
        return
    height, width = found["image_size"]
    yield f"model.image_size=[{height},{width}]"
    yield from (f"model.sampling.{name}={value}" for name, value in found["sampling"].items())
    if "noise" in found:
        process = found["noise"]["process"].items()
        yield f"noise.trajectory={str(found['noise']['trajectory']).lower()}"
        yield from (f"noise.process.{name}={value}" for name, value in process)
    fewest, _ = found.get("num_levels", (1, 1))
    if fewest > 1:  # one level is what methods have by themselves
        yield f"decoding.num_levels={fewest}"


def with_settings(script: str, arguments: list[str]) -> list[str]:
    """The command line of an evaluation with the settings of the weights that it names.

    `weights=owner/name@revision` becomes `model.path` (of an adapter `model.adapter`) at the commit that was
    found. A folder stays where it stands.

    Args:
        script: root of `conf/`; only "evaluate" takes `weights`.
        arguments: words of the command line.

    Raises:
        ValueError: a repository that cannot be had, damaged settings.
    """
    words = {word.partition("=")[0]: word.partition("=")[2] for word in arguments if "=" in word}
    weights = words.get("weights", "").strip("'\"")
    if script != "evaluate" or not weights or weights in ("auto", "model"):
        return arguments
    folder = located(weights, "weights")
    name = HubName.of(weights)
    keys = [*settings_keys(folder)] if name is not None or "noise" in read_settings(folder) else []
    kept = [key for key in keys if not _is_named(key, words)]
    if name is None:
        return _in_front(kept, arguments)
    if not any((folder / file).is_file() for file in (BACKBONE_FILE, ADAPTER_FILE)):
        raise ValueError(
            f"weights={weights}: the repository has neither {BACKBONE_FILE} nor {ADAPTER_FILE}, so it is no "
            f"export of this package; a release is chosen by model=, and read with model.path={weights}"
        )
    is_adapter = not (folder / BACKBONE_FILE).is_file()
    pinned = HubName(name.hub_id, folder.name)  # the hub's cache names a snapshot by its commit
    place = f"model.{'adapter' if is_adapter else 'path'}={quoted(pinned)}"
    others = [word for word in arguments if not word.startswith("weights=")]
    return _in_front([*kept, place, "weights=model"], others)


def _in_front(keys: list[str], arguments: list[str]) -> list[str]:
    """Keys before the other keys: Hydra takes the last value of a key."""
    start = next((place for place, word in enumerate(arguments) if "=" in word), len(arguments))
    return [*arguments[:start], *keys, *arguments[start:]]


def _is_named(key: str, words: dict[str, str]) -> bool:
    """Whether the command line chooses a key's group, or the key."""
    name = key.partition("=")[0]
    return name in words or (name.startswith("noise.") and "noise" in words)


def quoted(path: Path | HubName) -> str:
    """A path in quotes of Hydra's grammar."""
    escaped = str(path).replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def family_in(folder: Path) -> str:
    """The family that `backbone.json` names; raises ValueError for a damaged one."""
    path = folder / BACKBONE_FILE
    try:
        return str(json.loads(path.read_text())["family"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} names no family ({error}); export the model again") from error
