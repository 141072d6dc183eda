"""What a W&B run is called and found by: what it varies, its experiment, the sweep it belongs to."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, open_dict

# Handed down to the jobs of a sweep, which may be processes of their own: each sees its own values alone.
SWEPT = "SJD2_LIGHTNING_SWEPT_KEYS"
_MOST_CHARACTERS = 128  # of W&B's names
# Where things lie and how they are told says nothing about what a run does.
_PLACES = ("run_dir", "export_dir", "hydra", "logger", "callbacks.progress_bar", "print_plan")


def swept_keys(overrides: Sequence[str], further: Iterable[str] = ()) -> list[str]:
    """Keys that a sweep's command line gives several values, and further ones that its sweeper varies."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    return [*(each.get_key_element() for each in parsed if each.is_sweep_override()), *further]


def run_name(overrides: Sequence[str], swept: Collection[str], fallback: str) -> str:
    """The values that a run varies, such as "window=16 num_levels=4"; a key is as short as it can be told.

    Args:
        overrides: the run's own, "key=value" each.
        swept: keys that its sweep varies; without a sweep none, and all overrides count but places.
        fallback: name of a run that varies nothing.
    """
    pairs = [text.lstrip("+~").partition("=")[::2] for text in overrides]
    shown = [
        (key, value)
        for key, value in pairs
        if (key in swept if swept else not f"{key}.".startswith(tuple(f"{place}." for place in _PLACES)))
    ]
    last = Counter(key.rpartition(".")[2] for key, _ in shown)
    parts = [
        value if key == "experiment" else f"{key if last[short] > 1 else short}={value}"
        for key, value in shown
        for short in [key.rpartition(".")[2]]
    ]
    return " ".join(parts)[:_MOST_CHARACTERS] or fallback


def name_run(
    cfg: DictConfig, overrides: Sequence[str], folder: Path, experiment: str | None, in_sweep: bool
) -> None:
    """Names the W&B run where the configuration does not; a sweep's runs get a group, and tags.

    Args:
        cfg: the run's configuration; its `logger.wandb` is changed.
        overrides: the run's own overrides.
        folder: the run's folder; in a sweep its parent is the sweep's.
        experiment: the chosen experiment, which becomes a tag.
        in_sweep: whether the run is one of a sweep.
    """
    wandb = cfg.get("logger", {}).get("wandb")
    if wandb is None:
        return
    swept = json.loads(os.environ.get(SWEPT, "[]")) if in_sweep else []
    tags = [*wandb.tags, *(["sweep"] if in_sweep else []), *([experiment] if experiment else [])]
    with open_dict(cfg):
        wandb.name = wandb.name or run_name(overrides, swept, folder.name)
        wandb.group = wandb.group or (folder.parent.name[:_MOST_CHARACTERS] if in_sweep else None)
        wandb.tags = list(dict.fromkeys(tags))
