"""Checkpoints that are whole or absent, and checked when they are read.

Source: ours, around Lightning's `CheckpointIO`.
"""

from __future__ import annotations

import logging
import os
import pickle
import shutil
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO

from sjd2_lightning.records import TEMPORARY
from sjd2_lightning.sharded_index import check_sharded

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
        temporary: str | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(path.parent, path.name)
            handle, temporary = tempfile.mkstemp(TEMPORARY, f".{path.name}.", path.parent)
            with os.fdopen(handle, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).replace(path)
            sync_folder(path.parent)
        except BaseException as error:
            if temporary is not None:
                Path(temporary).unlink(missing_ok=True)
            # torch reports a full disk as a RuntimeError of its own
            if isinstance(error, (OSError, RuntimeError)):
                raise OSError(
                    f"checkpoint {path} cannot be written: {error}; make room or give another run_dir. "
                    "The checkpoint that stood there is intact"
                ) from error
            raise

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


def remove_leftovers(folder: Path, name: str = "") -> None:
    """Removes what a run that was killed while it wrote left below a folder: of one checkpoint, or all."""
    for leftover in folder.glob(f".{name}.*{TEMPORARY}") if name else folder.rglob(f".*{TEMPORARY}"):
        remove_checkpoint(leftover)


def remove_checkpoint(path: Path) -> None:
    """Removes a file, or the folder of a sharded checkpoint; it is no error if another did so before."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


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


def fsync_below(folder: Path) -> None:
    """Forces the files of a folder, and their names, to the disk."""
    for path in [*folder.rglob("*"), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _on_cpu(storage: Any, location: str) -> Any:
    return storage


def sync_folder(folder: Path) -> None:
    """Makes the new name itself survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
