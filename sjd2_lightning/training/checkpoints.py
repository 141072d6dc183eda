"""Checkpoints that are whole or absent, and checked when they are read.

Around Lightning's `CheckpointIO`, which leaves half-written files behind and does not notice a flipped bit.
"""

from __future__ import annotations

import io
import json
import logging
import os
import pickle
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO

from sjd2_lightning.run.files import remove_unfinished, sha256_of_file, whole_file

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
        with _read_or_refused(path):
            return torch.load(path, map_location=map_location or _on_cpu, weights_only=True)


def check_checkpoint(path: str | Path) -> None:
    """Compares every byte of a checkpoint with the sums that torch stored with it, and sees that it is whole.

    Of a sharded checkpoint, which is a folder, every part of its own kind is.

    Raises:
        ValueError: the file is missing, cut short or changed, or none of training; it says what to do.
    """
    path = Path(path)
    if path.is_dir():
        check_sharded(path)
        return
    with _read_or_refused(path):
        with path.open("rb") as file:
            if damaged := damaged_member(file):
                raise _Damaged(damaged)
            with zipfile.ZipFile(file) as archive:
                held = [entry.file_size for entry in archive.infolist() if "/data/" in entry.filename]
        # what the index names is there, each at its size; mapped, so that nothing but the index is read again
        named: list[int] = []

        def note(storage: Any, location: str) -> Any:
            named.append(storage.nbytes())
            return storage

        found = torch.load(path, map_location=note, weights_only=True, mmap=True)
        if sorted(named) != sorted(held):
            raise _Damaged("its index: sizes of tensors are not those of their bytes")
        lacking = sorted({"state_dict", "global_step"} - set(found)) if isinstance(found, dict) else ["keys"]
        if lacking:
            raise pickle.UnpicklingError(f"it has no {' and no '.join(lacking)}")


class _Damaged(Exception):
    """A member of an archive is not as it was written."""


@contextmanager
def _read_or_refused(path: str | Path) -> Iterator[None]:
    """One sentence for whatever a damaged file makes its readers raise.

    Python's and torch's readers of archives trust what they read: one bit gives errors of a dozen types.
    """
    try:
        yield
    except _Damaged as error:
        raise ValueError(
            f"checkpoint {path} is damaged at {error}; go on from another one in its folder"
        ) from error
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"checkpoint {path} is not one of this project's training: {_first_line(error)}"
        ) from error
    except Exception as error:
        raise ValueError(
            f"checkpoint {path} cannot be read ({_first_line(error)}); go on from another one in its folder"
        ) from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


_FOLDER = 0x10  # bit of the attributes in an archive's directory


def damaged_member(file: IO[bytes]) -> str:
    """The first member of an archive of torch that is not as it was written; "" if all are.

    What else a damaged archive makes Python's reader raise is left to the caller.
    """
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        seen: set[str] = set()
        for member in members:
            # torch writes none of the three: readers differ in which of two they take, and its own reads a
            # "folder" as nothing
            is_folder = member.external_attr & _FOLDER
            if member.filename in seen or is_folder or member.compress_type != zipfile.ZIP_STORED:
                return member.filename
            seen.add(member.filename)
        return archive.testzip() or ""


def newest_first(paths: Iterable[Path]) -> list[Path]:
    """Paths by the time of their last change; those that are gone come last."""

    def changed(path: Path) -> float:
        try:
            return path.stat().st_mtime
        except OSError:  # removed meanwhile, or a link to nothing
            return 0.0

    return sorted(paths, key=changed, reverse=True)


def newest_sound_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint of a folder that can be read; damaged ones are passed over with a warning."""
    for path in newest_first(folder.glob("*.ckpt")):
        try:
            check_checkpoint(path)
        except ValueError as error:
            log.warning("passed over: %s", error)
        else:
            return path
    return None


def _on_cpu(storage: Any, location: str) -> Any:
    return storage


_METADATA = ".metadata"  # torch's index of a sharded checkpoint, a pickle
_REST = "meta.pt"  # Lightning's file of everything that is neither weights nor optimizer
_SUMS = "sums.json"  # ours: sha256 of the two, since nothing in torch protects its index


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


def write_sums(path: Path) -> None:
    """Notes what the index of a sharded checkpoint holds, and the rest beside it."""
    sums = {name: sha256_of_file(path / name) for name in (_METADATA, _REST)}
    (path / _SUMS).write_text(json.dumps(sums))


def check_sharded(path: Path) -> None:
    """Refuses a folder that is no sharded checkpoint of training, or names anything that could run.

    Every byte is compared with a sum: of index and rest with ours (which those of 0.1.0 lack), of the parts
    with torch's.

    Raises:
        ValueError: with the name, or what is missing.
    """
    with _read_or_refused(path):
        if (path / _SUMS).exists():
            for name, wanted in json.loads((path / _SUMS).read_text()).items():
                if sha256_of_file(path / name) != wanted:
                    raise _Damaged(name)
        with (path / _METADATA).open("rb") as file:
            places = list((_IndexReader(file).load().storage_data or {}).values())
        parts = {str(place.relative_path) for place in places}
        outside = sorted(name for name in parts if Path(name).name != name)
        missing = sorted(name for name in {*parts, _REST} if not (path / name).is_file())
        if outside or missing:
            raise FileNotFoundError(f"it is not whole: {', '.join(outside or missing)}")
        for name in sorted(parts):
            own = [place for place in places if str(place.relative_path) == name]
            with (path / name).open("rb") as file:
                for place in sorted(own, key=lambda place: place.offset):
                    _check_piece(file, name, place.offset, place.length)
        with (path / _REST).open("rb") as file:
            if damaged := damaged_member(file):
                raise _Damaged(f"{_REST}, {damaged}")


def _check_piece(file: IO[bytes], name: str, offset: int, length: int) -> None:
    """A tensor or value of a part, which torch has written as an archive of its own."""
    file.seek(offset)
    piece = file.read(length)
    if len(piece) < length:
        raise _Damaged(f"{name}, which ends early")
    if damaged := damaged_member(io.BytesIO(piece)):
        raise _Damaged(f"{name}, {damaged}")
    torch.load(io.BytesIO(piece), map_location=_on_cpu, weights_only=True)
