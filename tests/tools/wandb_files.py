"""Reads what an offline W&B run wrote: LevelDB's log format around protocol buffers."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

_BLOCK, _FILE_HEADER, _RECORD_HEADER = 32768, 7, 7
_FULL, _LAST = 1, 4


def offline_run(folder: Path, timeout_s: float = 30) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """History rows and config of the one finished offline run below a folder.

    `finish` returns shortly before the last block is on the disk, so the record of the end is waited for.
    """
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    return run_file(path, timeout_s)


def named_files(path: Path) -> list[Path]:
    """Where a run's file says that its pictures, pages and artifacts lie: what sending the run reads."""
    found = []
    for record in _records(path.read_bytes()):
        found += [path.parent / "files" / entry.path for entry in record.files.files]
        found += [Path(entry.local_path) for entry in record.artifact.manifest.contents]
        for item in record.history.item:
            value = json.loads(item.value_json)
            if (item.nested_key or [item.key])[-1] == "path" or (isinstance(value, dict) and "path" in value):
                found.append(path.parent / "files" / (value["path"] if isinstance(value, dict) else value))
    return found


def summaries(path: Path) -> dict[str, set[str]]:
    """Which values of each defined number a run's table shows."""
    kinds = ("min", "max", "mean", "best", "last")
    return {
        record.metric.name: {kind for kind in kinds if getattr(record.metric.summary, kind)}
        for record in _records(path.read_bytes())
        if record.HasField("metric")
    }


def run_file(path: Path, timeout_s: float = 30) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """As `offline_run`, of one of the files that belong to a run."""
    deadline = time.monotonic() + timeout_s
    records = _records(path.read_bytes())
    while not any(record.HasField("exit") for record in records):
        assert time.monotonic() < deadline, f"{path} does not end"
        time.sleep(0.05)
        records = _records(path.read_bytes())
    config: dict[str, Any] = {}
    for record in records:
        for holder in (record.run.config, record.config):
            config |= {item.key: json.loads(item.value_json) for item in holder.update}
    return [_nested(record.history.item) for record in records if record.HasField("history")], config


def _nested(items: Any) -> dict[str, Any]:
    """A row from its leaves, whose keys are paths."""
    row: dict[str, Any] = {}
    for item in items:
        *parents, name = item.nested_key or [item.key]
        holder = row
        for parent in parents:
            holder = holder.setdefault(parent, {})
        holder[name] = json.loads(item.value_json)
    return row


def _records(data: bytes) -> list[Any]:
    found, part, place = [], b"", _FILE_HEADER
    while place + _RECORD_HEADER <= len(data):
        if _BLOCK - place % _BLOCK < _RECORD_HEADER:
            place += _BLOCK - place % _BLOCK  # the rest of a block is too short for a header
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        place += _RECORD_HEADER
        part += data[place : place + length]
        place += length
        if kind in (_FULL, _LAST) and place <= len(data):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(part)
            found.append(record)
            part = b""
    return found
