"""Records and images of a comparison on disk: a killed run continues from them.

Every image has one record and one PNG. The record is appended, and forced to the disk, after the PNG is
written: where there is a record, the work is done. A folder belongs to one configuration, whose hash it
carries.
"""

from __future__ import annotations

import io
import json
import os
import shutil
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from PIL import Image
from torch import Tensor, distributed

from sjd2_lightning.data.pictures import LazyImages, png_bytes, read_image
from sjd2_lightning.decoding.config import DecodingConfig
from sjd2_lightning.run.files import sha256_of_file, sha256_of_json, write_whole
from sjd2_lightning.run.processes import wait_for_all

RUN_FILE = "run.json"


@dataclass(frozen=True, kw_only=True)
class Record:
    """One result of one method, without its pixels: what all tasks have in common.

    Attributes:
        key, prompt, seed: the prompt item.
        method: name of the method.
        batch, batch_size: number of the image's prompt batch, and rows of that batch.
        nfe: forward passes, prefill excluded.
        num_generated: generated slots, structural ones included.
        accepted: number of slots that each pass committed.
        settled_iteration: pass, from 0, that committed each code or patch; raster order.
        size: (height, width) in codes or patches.
        seconds: wall clock of decoding the whole batch.
        process: name of the process; only decodes of one process are compared in time.
        peak_bytes: most memory the device held while it decoded the batch; None where it cannot be told.
    """

    key: str
    prompt: str
    seed: int
    method: str
    batch: int
    batch_size: int
    nfe: int
    num_generated: int
    accepted: tuple[int, ...]
    settled_iteration: tuple[int, ...]
    size: tuple[int, int]
    seconds: float
    process: str
    peak_bytes: int | None = None

    SAME: ClassVar[str]  # how equal results of this task are that count as equal
    COUNTED: ClassVar[str] = "forward passes an image, prefill excluded"  # what `nfe` counts

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        """A record from its JSON object."""
        plain: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()}
        return cls(**plain)

    @abstractmethod
    def percent_equal(self, other: Self) -> int:
        """Share of another method's result that is equal to this one, in percent, never rounded up to all."""


@dataclass(frozen=True, kw_only=True)
class ImageRecord(Record):
    """One decoded image of codes.

    Attributes:
        image_ids: the codes, raster order.
    """

    image_ids: tuple[int, ...]

    SAME: ClassVar[str] = "token for token"

    def percent_equal(self, other: ImageRecord) -> int:
        same = sum(a == b for a, b in zip(self.image_ids, other.image_ids, strict=True))
        return 100 * same // len(self.image_ids)


def method_fields(config: Any) -> dict[str, Any]:
    """A method as run.json and report.json hold it: the fields of its noise lie beside the others.

    Keep this form, whose names are those of 0.1.0, with later fields where they say something: a folder
    continues only where the hash of its identity is the same as before. Methods of other tasks are held as
    they are.
    """
    fields = asdict(config)
    if not isinstance(config, DecodingConfig):
        return fields
    engine, attention, corrector = (fields.pop(name) for name in ("engine", "attention", "corrector"))
    drafter = fields.pop("drafter")
    later = {name: fields.pop(name) for name in ("invariant", "window_shape")}
    if engine not in ("auto", "compiled"):
        later["engine"] = engine
    if attention != "auto":
        later["attention"] = attention
    if config.corrector.is_file:  # one that was trained anew has other passes
        corrector["sha256"] = sha256_of_file(Path(corrector["weights"]))
    if corrector["weights"] is not None:
        later["corrector"] = corrector
    later |= {name: fields.pop(name) for name in ("max_passes", "max_changed")}
    if drafter["weights"] is not None:
        later["drafter"] = {**drafter, "sha256": sha256_of_file(Path(drafter["weights"]))}
    said = {name: value for name, value in later.items() if value}
    return fields.pop("noise") | fields | {"compile": engine == "compiled"} | said


def discard_other_run(folder: str | Path, identity: Mapping[str, Any]) -> bool:
    """Removes records and images of another configuration from a folder, and nothing else.

    Returns:
        Whether anything was removed; a folder without `run.json` is left alone.
    """
    folder = Path(folder)
    run_file = folder / RUN_FILE
    if not run_file.is_file():
        return False
    try:
        if json.loads(run_file.read_text())["hash"] == sha256_of_json(identity):
            return False
    except (ValueError, KeyError, TypeError):
        pass  # no usable hash: no run can continue here
    for path in folder.glob("records*.jsonl"):
        path.unlink()
    shutil.rmtree(folder / "images", ignore_errors=True)
    run_file.unlink()
    return True


def held_weights(folder: str | Path, identity: Mapping[str, Any]) -> str:
    """The weights that a folder's `run.json` names; "" where it differs from an identity in anything else."""
    try:
        held = json.loads((Path(folder) / RUN_FILE).read_text())["identity"]
        others = {**held, "weights": ""} == json.loads(json.dumps({**identity, "weights": ""}))
        return str(held["weights"]) if others else ""
    except (OSError, ValueError, KeyError, TypeError):
        return ""  # no folder, or one that no run can continue


class RecordStore:
    """Records and images of one folder.

    Args:
        folder: place of records and images; created when missing.
        identity: JSON object of everything that decides the images; a folder holds one identity only.
        rank: rank of this process; each rank appends to a file of its own.
        kind: class of the records.

    Raises:
        ValueError: the folder holds images of another identity; the message names what differs.
    """

    def __init__(
        self,
        folder: str | Path,
        identity: Mapping[str, Any],
        rank: int = 0,
        kind: type[Record] = ImageRecord,
    ) -> None:
        self.folder, self.kind = Path(folder), kind
        self.identity = dict(identity)
        self.hash = sha256_of_json(identity)
        self._claim(identity)
        self.path = self.folder / ("records.jsonl" if rank == 0 else f"records.rank{rank}.jsonl")
        _cut_torn_line(self.path)

    def image_path(self, record: Record) -> Path:
        """Path of a record's PNG."""
        return self.folder / "images" / record.method / f"{record.key}.png"

    def append(self, records: Sequence[Record], images: Iterable[Tensor | np.ndarray]) -> None:
        """Writes decoded images, uint8 (h, w, 3) each: first the PNGs, then all their records at once."""
        for record, pixels in zip(records, images, strict=True):
            write_whole(self.image_path(record), png_bytes(pixels))
        lines = "".join(json.dumps(asdict(record)) + "\n" for record in records)
        with self.path.open("ab") as file:
            file.write(lines.encode())
            file.flush()
            os.fsync(file.fileno())

    def load(self) -> list[Any]:
        """Records of all ranks whose PNG exists, each of `kind`, one for each method and key.

        They are sorted by batch and method.
        """
        found: dict[tuple[str, str], Record] = {}
        for path in sorted(self.folder.glob("records*.jsonl")):
            # Behind the last newline is what a kill cut short, or what another rank is writing now.
            whole, _, _ = path.read_text().rpartition("\n")
            for number, line in enumerate(whole.splitlines(), start=1):
                try:
                    record = self.kind.from_json(json.loads(line))
                except (ValueError, TypeError) as error:
                    raise ValueError(
                        f"{path}, line {number} is no record ({error}); remove the line to decode again"
                    ) from error
                if self.image_path(record).is_file():
                    found.setdefault((record.method, record.key), record)
        return sorted(found.values(), key=lambda record: (record.batch, record.method, record.key))

    def images(self, records: Sequence[Record]) -> LazyImages:
        """Pixels of records, each read when it is looked at; an unreadable one raises ValueError then."""
        return LazyImages(read_image, [self.image_path(record) for record in records])

    def _claim(self, identity: Mapping[str, Any]) -> None:
        run_file = self.folder / RUN_FILE
        if not run_file.is_file():
            if any(self.folder.glob("records*.jsonl")):
                raise ValueError(f"{self.folder} holds records but no {RUN_FILE}; choose another folder")
            write_whole(run_file, json.dumps({"hash": self.hash, "identity": dict(identity)}, indent=1))
            return
        try:
            held = json.loads(run_file.read_text())
            differs = held["hash"] != self.hash
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{run_file} cannot be read ({error}); choose another folder") from error
        if differs:
            plain = json.loads(json.dumps(dict(identity)))
            names = _differences(held.get("identity", {}), plain)
            raise ValueError(
                f"{self.folder} holds images of another configuration ({', '.join(names[:5])} differ); "
                f"choose another folder, or let the old images be replaced"
            )


def _cut_torn_line(path: Path) -> None:
    """Drops what a kill in the middle of an append left behind the last newline."""
    if path.is_file():
        data = path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            write_whole(path, whole)


def _differences(held: Any, wanted: Any, prefix: str = "") -> list[str]:
    if not (isinstance(held, dict) and isinstance(wanted, dict)):
        return [prefix or "contents"] if held != wanted else []
    names = []
    for name in sorted(held.keys() | wanted.keys()):
        names += _differences(held.get(name), wanted.get(name), f"{prefix}.{name}" if prefix else str(name))
    return names


def collect_on_rank_zero(store: RecordStore, rank: int, world_size: int) -> None:
    """Waits for all ranks, then copies what they decoded into rank 0's folder.

    On a shared file system nothing is copied. A record is known by method and key, so none is copied twice.
    """
    if world_size == 1:
        return
    wait_for_all()
    held: list[Any] = [{(record.method, record.key) for record in store.load()} if rank == 0 else None]
    distributed.broadcast_object_list(held, src=0)
    mine = []
    if rank != 0:
        for record in store.load():
            if (record.method, record.key) not in held[0]:
                mine.append((record, store.image_path(record).read_bytes()))
    gathered: list[Any] | None = [None] * world_size if rank == 0 else None
    distributed.gather_object(mine, gathered, dst=0)
    for parts in gathered or ():
        records: list[Record] = [record for record, _ in parts]
        store.append(records, [np.array(Image.open(io.BytesIO(png)).convert("RGB")) for _, png in parts])
