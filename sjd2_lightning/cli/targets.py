"""Which names Hydra may call: an exact list, held where every `_target_` is looked up.

`config.py` refuses other names in a run's configuration, all at once and with their keys. Hydra's own part of
it (launcher, sweeper, callbacks) is instantiated before that, so the rule is held here too. Source: ours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hydra._internal.instantiate import _instantiate2
from hydra.errors import InstantiationException

from sjd2_lightning.config import ALLOWED_TARGETS

OF_HYDRA = frozenset(
    {
        "hydra._internal.core_plugins.basic_launcher.BasicLauncher",
        "hydra._internal.core_plugins.basic_sweeper.BasicSweeper",
        "hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher",
        "hydra_plugins.hydra_submitit_launcher.submitit_launcher.LocalLauncher",
        "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher",
        "sjd2_lightning.cli.sweep.SweepReport",
    }
)


def restrict_targets() -> None:
    """From now on Hydra calls no name that is not on the lists, in this process."""
    inner = _instantiate2._resolve_target
    if getattr(inner, "restricted", False):
        return

    def resolve(target: str | Callable[..., Any], full_key: str) -> Any:
        name = target if isinstance(target, str) else f"{target.__module__}.{target.__qualname__}"
        if name not in ALLOWED_TARGETS | OF_HYDRA:
            raise InstantiationException(f"{full_key or '_target_'}={name}: this target is not allowed")
        return inner(target, full_key)

    resolve.restricted = True  # type: ignore[attr-defined]
    _instantiate2._resolve_target = resolve
