"""Checkpoints that are whole or absent, checked when they are read, and written before a run is told to end.

Source: ours, around Lightning's `CheckpointIO`.
"""

from __future__ import annotations

import logging
import os
import pickle
import signal
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer

log = logging.getLogger(__name__)

TERMINATED = 143  # exit status of a process that SIGTERM ended: 128 + 15
_TEMPORARY = ".writing"


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
            for leftover in path.parent.glob(f".{path.name}.*{_TEMPORARY}"):
                leftover.unlink(missing_ok=True)  # of a run that was killed while it wrote
            handle, temporary = tempfile.mkstemp(_TEMPORARY, f".{path.name}.", path.parent)
            with os.fdopen(handle, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).replace(path)
            _sync_folder(path.parent)
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

    A sharded checkpoint, which is a folder, is left to the strategy that reads it.

    Raises:
        ValueError: the file is missing, cut short or changed; the message says what to do.
    """
    if Path(path).is_dir():
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


class SaveOnTermination(Callback):
    """On SIGTERM: ends the step, writes a checkpoint on all ranks together, and exits with status 143.

    Lightning alone ends with status 0 and saves nothing. The handler only notes the signal, so nothing is
    cut short; a rank that was not told learns of it from the others.

    Args:
        path: of the checkpoint.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._told = False
        self._before: Callable[[int, FrameType | None], Any] | int | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes over the signal: Lightning registers its own handler before this."""
        self._told = False
        try:
            self._before = signal.signal(signal.SIGTERM, self._note)
        except ValueError:  # only the main thread of a process may have handlers
            log.warning("training runs outside the main thread: SIGTERM will not save a checkpoint")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves and exits, if any rank was told to."""
        if not trainer.strategy.reduce_boolean_decision(self._told, all=False):
            return
        log.warning("SIGTERM: writing %s; the same command with ckpt_path=auto goes on", self.path)
        trainer.save_checkpoint(self.path)
        raise SystemExit(TERMINATED)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Gives the signal back."""
        self._give_back()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Gives the signal back."""
        self._give_back()

    def _give_back(self) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            self._before = None

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._told = True


def _on_cpu(storage: Any, location: str) -> Any:
    return storage


def _sync_folder(folder: Path) -> None:
    """Makes the new name itself survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
