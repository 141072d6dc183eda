"""Building a folder of shards in parallel; a build that was killed goes on where it stopped.

Shard k is made of records k * n to (k + 1) * n - 1 by one process alone, so that its bytes depend neither on
the other shards nor on the number of processes. Finished shards wait in ``.<name>-building`` beside the
folder, each with a note of what it holds; the folder itself appears complete or not at all.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby, islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import PIL
import torch
from torch import nn

from sjd2_lightning.data.index import INDEX_NAME, Shard, ShardIndex, ShardMeta
from sjd2_lightning.data.writing import write_shard
from sjd2_lightning.models.image_tokenizer import ImageTokenizer
from sjd2_lightning.run.files import remove_unfinished, sha256_of_file, sha256_of_json, write_whole

PLAN_NAME = "plan.json"
SKIPPED_NAME = "skipped.jsonl"
BATCH_PIXELS = 64 * 64 * 64  # that are encoded at once on a CPU


class PictureSet(Protocol):
    """Captioned pictures in the order of the shards; records of one picture are neighbours."""

    @property
    def records(self) -> Sequence[Any]: ...

    def picture(self, record: Any) -> Hashable:
        """What records of the same picture share."""

    def image(self, record: Any) -> np.ndarray:
        """The picture at its size, (H, W, 3) uint8; ValueError says why it cannot be used."""

    def facts(self, record: Any) -> dict[str, Any]:
        """`key`, `caption` and what else is kept of a sample."""


@dataclass(frozen=True)
class Build:
    """What a folder is built from.

    Args:
        folder: where the shards go; what lies there is replaced once the new ones are complete.
        meta: what the samples share.
        pictures: the source.
        tokenizer: makes image ids of pictures; None for kind "raw".
        samples_per_shard: records of every shard but the last.
        encode_batch: pictures that are encoded at once.
    """

    folder: Path
    meta: ShardMeta
    pictures: PictureSet
    tokenizer: ImageTokenizer | None
    samples_per_shard: int
    encode_batch: int

    @property
    def building(self) -> Path:
        """Where finished shards wait."""
        return self.folder.with_name(f".{self.folder.name}-building")

    @property
    def num_shards(self) -> int:
        """Shards of the folder, empty ones included."""
        return -(-len(self.pictures.records) // self.samples_per_shard)


@dataclass(frozen=True)
class Made:
    """A finished shard, and the samples that could not be used: `key`, `file` if known, and `reason`."""

    shard: Shard
    skipped: list[dict[str, str]]


Tick = Callable[[int], None]  # called with the number of records done; may raise to stop


def make_shard(build: Build, number: int, device: str, tick: Tick) -> Made:
    """Make shard `number` in the waiting folder, and note what it holds."""
    start = number * build.samples_per_shard
    records = build.pictures.records[start : start + build.samples_per_shard]
    path = build.building / f"{build.meta.split}-{number:05d}.tar"
    skipped: list[dict[str, str]] = []
    shard = write_shard(path, _samples(build, records, device, skipped, tick), build.meta)
    write_whole(path.with_suffix(".json"), json.dumps(asdict(Made(shard, skipped))))
    return Made(shard, skipped)


def _samples(
    build: Build, records: Sequence[Any], device: str, skipped: list[dict[str, str]], tick: Tick
) -> Iterator[dict[str, Any]]:
    """The samples of some records; each picture is read and encoded once for all its neighbours."""
    pictures = build.pictures
    groups = ([*group] for _, group in groupby(records, key=pictures.picture))
    while chunk := list(islice(groups, build.encode_batch)):
        usable, images = [], []
        for group in chunk:
            try:
                images.append(pictures.image(group[0]))
                usable.append(group)
            except (ValueError, OSError) as error:
                skipped += [skipped_line(pictures.facts(record), str(error)) for record in group]
        payloads: Sequence[np.ndarray] | np.ndarray = images
        if build.tokenizer is not None and images:
            pixels = torch.from_numpy(np.stack(images)).to(device).permute(0, 3, 1, 2).float() / 255
            payloads = build.tokenizer.encode(pixels).cpu().numpy()
        name = "image" if build.tokenizer is None else "image_ids"
        for group, payload in zip(usable, payloads, strict=True):
            for record in group:
                yield {**pictures.facts(record), "size": list(build.meta.pixel_size or ()), name: payload}
        tick(sum(map(len, chunk)))


def skipped_line(facts: dict[str, Any], reason: str) -> dict[str, str]:
    """A line of skipped.jsonl."""
    return {name: facts[name] for name in ("key", "file") if name in facts} | {"reason": reason}


def write_skipped(path: Path, lines: Sequence[dict[str, str]]) -> None:
    """Write skipped.jsonl, or remove it where nothing was skipped."""
    path.unlink(missing_ok=True)
    if lines:
        write_whole(path, "".join(json.dumps(line) + "\n" for line in lines))


def move_tokenizer(tokenizer: ImageTokenizer | None, device: str) -> None:
    """Puts a tokenizer's weights on a device."""
    module = tokenizer if isinstance(tokenizer, nn.Module) else getattr(tokenizer, "vq", None)
    if isinstance(module, nn.Module):
        module.to(device)


def start_build(build: Build) -> dict[int, Made]:
    """Prepare the waiting folder; returns the shards that an earlier, killed build of the same finished.

    Raises:
        ValueError: there is nothing to build, or a key repeats.
    """
    records, folder = build.pictures.records, build.building
    if not records:
        raise ValueError(f"No samples to write to {build.folder}; check the selection of the data set")
    keys = [build.pictures.facts(record)["key"] for record in records]
    key, uses = Counter(keys).most_common(1)[0]
    if uses > 1:
        raise ValueError(f"Sample key {key!r} repeats; make keys plain and unique")
    plan = {
        "inputs_hash": build.meta.inputs_hash,
        "keys": sha256_of_json(keys),
        "encode_batch": build.encode_batch,
        "versions": [torch.__version__, PIL.__version__, np.__version__],
    }
    for leftover in folder.parent.glob(f".{build.folder.name}-old-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    path = folder / PLAN_NAME
    if not path.is_file() or json.loads(path.read_text()) != plan:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_whole(path, json.dumps(plan))
    remove_unfinished(folder)
    for leftover in folder.glob("*.part"):  # as 0.1.0 called them
        leftover.unlink()
    return {number: made for number in range(build.num_shards) if (made := _finished(build, number))}


def _finished(build: Build, number: int) -> Made | None:
    path = build.building / f"{build.meta.split}-{number:05d}.tar"
    try:
        note = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        shard = Shard.of(note["shard"])
        whole = path.stat().st_size == shard.num_bytes and sha256_of_file(path) == shard.sha256
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return Made(shard, note["skipped"]) if whole else None


def complete_build(build: Build) -> bool:
    """Whether an earlier build made everything and was killed while putting the folder in its place."""
    if not (build.building / INDEX_NAME).is_file():
        return False
    index = ShardIndex.load(build.building)
    return index.meta.inputs_hash == build.meta.inputs_hash and not index.damaged_shards()


def finish_build(build: Build, made: dict[int, Made]) -> None:
    """Write the index beside the finished shards; they are complete from then on.

    Raises:
        ValueError: not a single sample can be used.
    """
    shards = tuple(made[number].shard for number in sorted(made) if made[number].shard.num_samples)
    skipped = [entry for number in sorted(made) for entry in made[number].skipped]
    write_skipped(build.building / SKIPPED_NAME, skipped)
    if not shards:
        example = f"{skipped[0].get('file', skipped[0]['key'])}: {skipped[0]['reason']}"
        raise ValueError(
            f"No sample for {build.folder} can be used (0 of {len(skipped)}), e.g. {example}; all are "
            f"named in {build.building / SKIPPED_NAME}"
        )
    ShardIndex(build.folder, replace(build.meta, num_skipped=len(skipped)), shards).save(build.building)


def put_in_place(build: Build) -> ShardIndex:
    """Put the complete folder in its place, without the notes."""
    index = ShardIndex.load(build.building)
    kept = {INDEX_NAME, SKIPPED_NAME, *(shard.name for shard in index.shards)}
    for path in build.building.iterdir():
        if path.name not in kept:
            path.unlink()
    replace_folder(build.building, build.folder)
    return replace(index, folder=build.folder)


def replace_folder(new: Path, folder: Path) -> None:
    """Put a folder in the place of another."""
    old = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent))
    if folder.exists():
        folder.replace(old)
    new.replace(folder)
    shutil.rmtree(old, ignore_errors=True)
