"""What a sharded checkpoint may hold: read without running anything that it names.

torch's index of such a folder is a pickle, and what is neither tensor nor index may be one too. Source: ours.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

_METADATA = ".metadata"  # torch's index of a sharded checkpoint, a pickle
_REST = "meta.pt"  # Lightning's file of everything that is neither weights nor optimizer


@contextmanager
def only_plain_values() -> Iterator[None]:
    """Within it `torch.load` reads nothing but plain values and tensors, also where torch asks for more."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


class _IndexReader(pickle.Unpickler):
    """Reads torch's index of a sharded checkpoint and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        # functions of these modules are not to be called by a file: only classes, and those that torch lists
        allowed = {
            "torch.distributed.checkpoint.metadata",
            "torch.distributed.checkpoint.filesystem",
            "torch.distributed.checkpoint.planner",
        }
        plain = {
            ("torch", "Size"),
            ("collections", "OrderedDict"),
            ("builtins", "set"),
            ("pathlib", "PosixPath"),
            ("torch.serialization", "_get_layout"),
            ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
        }
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if (module, name) in plain or is_dtype:
            return super().find_class(module, name)
        if module in allowed and "." not in name:
            found = super().find_class(module, name)
            if isinstance(found, type) and found.__module__ == module:
                return found
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint of training holds")


def check_sharded(path: Path) -> None:
    """Refuses a folder that is no sharded checkpoint of training, or names anything that could run.

    Raises:
        ValueError: with the name, or what is missing.
    """
    try:
        with (path / _METADATA).open("rb") as file:
            index = _IndexReader(file).load()
        parts = {str(place.relative_path) for place in (index.storage_data or {}).values()}
        missing = sorted(name for name in {*parts, _REST} if not (path / name).is_file())
    except (OSError, pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError) as error:
        raise ValueError(
            f"checkpoint {path} cannot be read: {error}; go on from another one in its folder"
        ) from error
    outside = [name for name in parts if Path(name).name != name]
    if missing or outside:
        raise ValueError(
            f"checkpoint {path} is not whole: {', '.join(missing or outside)}; go on from another one"
        )
