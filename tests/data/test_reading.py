"""Damaged shards: what can be used is used, what cannot is named and bounded."""

from __future__ import annotations

import io
import json
import pickle
import re
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds

from sjd2_lightning.data.index import ShardIndex, payload_checksum
from sjd2_lightning.data.order import Segment
from sjd2_lightning.data.reading import BadDataError, SkipLog, SkippedSample, make_pipeline, read_all
from tests.tools.shards import WriteCodes


def read(index: ShardIndex) -> tuple[list[str], list[SkippedSample]]:
    log = SkipLog()
    whole = [Segment(number, 0, shard.num_samples) for number, shard in enumerate(index.shards)]
    keys = [sample.key for sample in make_pipeline(index, whole, log)]
    skipped = log.drain()
    assert log.num_samples == sum(item.num_samples for item in skipped)
    assert len(keys) + log.num_samples == index.num_samples, "samples got lost uncounted"
    return keys, list(skipped)


def rewrite(path: Path, change: Callable[[dict[str, bytes]], None]) -> None:
    """Apply a change to the files of a tar, keeping the rest."""
    with tarfile.open(path) as tar:
        files = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    change(files)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def replace_payload(payload: bytes, key: str = "k9") -> Callable[[dict[str, bytes]], None]:
    """Another payload with a fitting checksum, so that the later checks are the ones that see it."""

    def change(files: dict[str, bytes]) -> None:
        files[f"{key}.image_ids.npy"] = payload
        facts = json.loads(files[f"{key}.json"])
        facts["crc32"] = payload_checksum(key, payload, files[f"{key}.txt"])
        files[f"{key}.json"] = json.dumps(facts).encode()

    return change


def npy(array: np.ndarray, allow_pickle: bool = False) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=allow_pickle)
    return buffer.getvalue()


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return pytest.fail, ("a pickle was loaded",)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda files: files.pop("k9.txt"), "txt missing"),
        (lambda files: files.pop("k9.image_ids.npy"), "image_ids.npy missing"),
        (lambda files: files.update({"k9.txt": b""}), "txt missing or empty"),
        (lambda files: files.update({"k9.txt": b"another"}), "checksum"),
        (lambda files: files.update({"k9.json": b"[1"}), "Expecting"),
        (lambda files: files.update({"k9.json": b"[]"}), "checksum"),
        (replace_payload(b"garbage"), "cannot be read|pickle"),
        (replace_payload(pickle.dumps(Bomb())), "cannot be read"),
        (replace_payload(npy(np.array([Bomb()], dtype=object), allow_pickle=True)), "not an int32 array"),
        (replace_payload(npy(np.zeros((2, 3), np.float32))), "not an int32 array"),
        (replace_payload(npy(np.zeros((3, 2), np.int32))), "not an int32 array"),
        (replace_payload(npy(np.full((2, 3), 512, np.int32))), r"outside \[0, 512\)"),
        (replace_payload(npy(np.full((2, 3), -1, np.int32))), r"codes in \[-1, -1\]"),
    ],
)
def test_a_bad_sample_is_skipped_and_named(
    write_codes: WriteCodes, change: Callable[[dict[str, bytes]], None], reason: str
) -> None:
    index = write_codes(20)
    rewrite(index.folder / index.shards[1].name, change)
    keys, (skipped,) = read(index)
    assert keys == [f"k{i}" for i in range(20) if i != 9]
    assert (skipped.shard, skipped.key) == ("train-00001.tar", "k9")
    assert re.search(reason, skipped.reason)


def test_a_flipped_byte_is_noticed(write_codes: WriteCodes) -> None:
    index = write_codes(20)
    path = index.folder / index.shards[1].name
    content = bytearray(path.read_bytes())
    content[content.index(b"picture 9") + 8] ^= 1
    path.write_bytes(content)
    keys, (skipped,) = read(index)
    assert skipped.key == "k9"
    assert len(keys) == 19


@pytest.mark.parametrize("num_bytes", [0, 100, 512, 700, 3000, 5000, 9000])
def test_a_truncated_shard_loses_only_its_end(write_codes: WriteCodes, num_bytes: int) -> None:
    index = write_codes(20)
    path = index.folder / index.shards[1].name
    assert path.stat().st_size > 9000
    path.write_bytes(path.read_bytes()[:num_bytes])
    keys, skipped = read(index)
    assert keys[:8] == [f"k{i}" for i in range(8)]
    assert keys[-4:] == [f"k{i}" for i in range(16, 20)]
    assert {item.shard for item in skipped} == {"train-00001.tar"}
    assert "unreadable after" in skipped[-1].reason


@pytest.mark.parametrize("position", [0, 3100])
def test_garbage_in_a_shard_does_not_reach_training(write_codes: WriteCodes, position: int) -> None:
    index = write_codes(20)
    path = index.folder / index.shards[1].name
    content = bytearray(path.read_bytes())
    content[position : position + 1500] = np.random.default_rng(0).bytes(1500)
    path.write_bytes(content)
    keys, _ = read(index)
    assert set(keys) >= {f"k{i}" for i in (*range(8), *range(16, 20))}


def test_a_shard_that_vanishes_while_training_is_counted(write_codes: WriteCodes) -> None:
    index = write_codes(20)
    (index.folder / index.shards[2].name).unlink()
    keys, (skipped,) = read(index)
    assert len(keys) == 16
    assert skipped.num_samples == 4
    assert "No such file" in skipped.reason


def test_part_of_a_shard(write_codes: WriteCodes) -> None:
    index = write_codes(20)
    parts = [Segment(2, 1, 3), Segment(0, 6, 8)]
    assert [s.key for s in make_pipeline(index, parts, SkipLog())] == ["k17", "k18", "k6", "k7"]


def test_reading_everything_stops_at_the_bound(write_codes: WriteCodes) -> None:
    index = write_codes(20)
    rewrite(index.folder / index.shards[1].name, lambda files: files.pop("k9.txt"))
    assert len(list(read_all(index.folder, max_bad_samples=1))) == 19
    with pytest.raises(
        BadDataError, match=r"1 samples of .* are unusable, 0 are allowed.*train-00001.tar: k9"
    ):
        list(read_all(index.folder))


def test_webdataset_is_locked_down(monkeypatch: pytest.MonkeyPatch) -> None:
    assert wds.utils.enforce_security
    with pytest.raises(ValueError, match="unsafe"):
        wds.gopen("pipe:true")
