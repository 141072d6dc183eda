"""Checkpoints that are whole or absent, and checked when they are read.

Around Lightning's `CheckpointIO`, which leaves half-written files behind and does not notice a flipped bit.
"""

from __future__ import annotations

import logging
import os
import pickle
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO

from sjd2_lightning.run.files import remove_unfinished, whole_file

log = logging.getLogger(__name__)


class VerifiedCheckpointIO(TorchCheckpointIO):
    """Local checkpoints through a temporary file in their own folder, with every byte checked on reading.

    Lightning's own writer goes through a temporary file elsewhere, which a killed run leaves behind, and
    nothing in torch notices a flipped bit. Paths with a protocol ("s3://...") are left to Lightning.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Writes a checkpoint, whole or not at all; what stood there stays until the new one is on the disk.

        Raises:
            OSError: it cannot be written; the message names the path.
        """
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            remove_unfinished(path.parent, path.name)
            with whole_file(path) as temporary:
                torch.save(checkpoint, temporary)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError of its own
            raise OSError(
                f"checkpoint {path} cannot be written: {error}; make room or give another run_dir. "
                "The checkpoint that stood there is intact"
            ) from error

    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Reads a checkpoint; only plain values and tensors, whatever `weights_only` says.

        Raises:
            ValueError: it is missing, damaged, or holds anything else.
        """
        if "://" in str(path):
            return super().load_checkpoint(path, map_location or _on_cpu, weights_only=True)
        check_checkpoint(path)
        try:
            return torch.load(path, map_location=map_location or _on_cpu, weights_only=True)
        except (RuntimeError, EOFError, KeyError, pickle.UnpicklingError) as error:
            raise ValueError(
                f"checkpoint {path} is not one of this project's training: {str(error).splitlines()[0]}"
            ) from error


def check_checkpoint(path: str | Path) -> None:
    """Compares every byte of a checkpoint with the sums that torch stored with it.

    Of a sharded checkpoint, which is a folder, every part of its own kind is.

    Raises:
        ValueError: the file is missing, cut short or changed; the message says what to do.
    """
    if Path(path).is_dir():
        check_sharded(Path(path))
        return
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (OSError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"checkpoint {path} cannot be read ({error}); go on from another one in its folder"
        ) from error
    if damaged is not None:
        raise ValueError(f"checkpoint {path} is damaged at {damaged}; go on from another one in its folder")


def newest_sound_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint of a folder that can be read; damaged ones are passed over with a warning."""
    for path in sorted(folder.glob("*.ckpt"), key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            check_checkpoint(path)
        except ValueError as error:
            log.warning("passed over: %s", error)
        else:
            return path
    return None


def progress_of(path: Path) -> tuple[int, int]:
    """Optimizer steps and whole epochs behind a checkpoint; (0, 0) of one that cannot be read.

    Weights stay on the disk, and nothing is checked: that is for the one who goes on from it.
    """
    file = path / _REST if path.is_dir() else path
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        epochs = state["loops"]["fit_loop"]["epoch_progress"]["current"]["completed"]
        return int(state["global_step"]), int(epochs)
    except Exception:  # whatever a damaged file makes torch raise, reading it in earnest will say it
        return 0, 0


def _on_cpu(storage: Any, location: str) -> Any:
    return storage


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
