"""The matrix of damage: reported with shard and key, bounded, nothing partial in a batch, no code run."""

from __future__ import annotations

import io
import itertools
import json
import logging
import pickle
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np
import pytest

from sjd2_lightning.data.index import ShardIndex
from sjd2_lightning.data.loader import CodeDataset, CodeLoader
from sjd2_lightning.data.reading import BadDataError
from tests.data.test_reading import npy, replace_payload, rewrite
from tests.tools.shards import WriteCodes

NUM, PER_SHARD, BAD = 48, 8, "train-00002.tar"  # holds k16..k23
Damage = Callable[[Path], None]


class Bomb:
    """Leaves a file if it is ever unpickled."""

    trace = ""

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.write_text, (Path(self.trace), "a pickle was loaded")


def in_tar(change: Callable[[dict[str, bytes]], None]) -> Damage:
    return lambda path: rewrite(path, change)


def flip(what: bytes) -> Damage:
    def damage(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[content.index(what)] ^= 4
        path.write_bytes(content)

    return damage


def renamed(prefix: str) -> Damage:
    def change(files: dict[str, bytes]) -> None:
        for name in [name for name in files if name.startswith("k19.")]:
            files[prefix + name] = files.pop(name)

    return in_tar(change)


def fact(**changes: object) -> Damage:
    def change(files: dict[str, bytes]) -> None:
        files["k19.json"] = json.dumps(json.loads(files["k19.json"]) | changes).encode()

    return in_tar(change)


def pickled() -> bytes:
    return pickle.dumps(Bomb())


def object_array() -> bytes:
    return npy(np.array([Bomb()], dtype=object), allow_pickle=True)


def beside(name: str) -> Callable[[dict[str, bytes]], None]:
    def change(files: dict[str, bytes]) -> None:
        members = list(files.items())
        place = next(i for i, (other, _) in enumerate(members) if other == "k19.txt")
        files.clear()
        files.update([*members[:place], (name, pickled()), *members[place:]])

    return change


def huge_header() -> bytes:
    buffer = io.BytesIO()
    header = {"descr": "<i4", "fortran_order": False, "shape": (2**40, 3)}
    np.lib.format.write_array_header_1_0(buffer, header)
    return buffer.getvalue()


def special_member(kind: bytes, target: str = "") -> Damage:
    """The codes of k19 become a link or a device of the same name."""

    def damage(path: Path) -> None:
        with tarfile.open(path) as tar:
            members = [(member, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]
        with tarfile.open(path, "w") as tar:
            for member, content in members:
                if member.name == "k19.image_ids.npy":
                    member.type, member.size, member.linkname, content = kind, 0, target, b""
                tar.addfile(member, io.BytesIO(content))

    return damage


# name: what is done to the shard, what the report says, how many of its eight samples it may cost
MATRIX: dict[str, tuple[Damage, str, int]] = {
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[: p.stat().st_size // 2]), "unreadable after k", 5),
    "zero-length": (lambda p: p.write_bytes(b""), "unreadable after the start", 8),
    "garbage": (lambda p: p.write_bytes(np.random.default_rng(0).bytes(p.stat().st_size)), "unreadable", 8),
    "missing shard": (Path.unlink, "No such file", 8),
    "missing codes": (in_tar(lambda files: files.pop("k19.image_ids.npy")), "npy missing", 1),
    "missing caption": (in_tar(lambda files: files.pop("k19.txt")), "txt missing", 1),
    "missing json": (in_tar(lambda files: files.pop("k19.json")), "json missing", 1),
    "bit flipped in caption": (flip(b"picture 19"), "checksum", 1),
    "bit flipped in codes": (flip(np.arange(19, 25, dtype="<i4").tobytes()), "checksum", 1),
    "bit flipped in a name": (flip(b"k19.txt"), "txt missing", 1),
    "pickle for codes": (in_tar(lambda f: replace_payload(pickled(), "k19")(f)), "cannot be read", 1),
    "pickle in npy": (in_tar(lambda f: replace_payload(object_array(), "k19")(f)), "not an int32", 1),
    "pickle beside": (in_tar(beside("k19.pyd")), "k19: it holds 'pyd'", 1),
    "wrong tokenizer": (fact(tokenizer="other"), "made by image tokenizer other", 1),
    "no tokenizer": (fact(tokenizer=None), "made by image tokenizer None", 1),
    "code too large": (in_tar(replace_payload(npy(np.full((2, 3), 512, "<i4")), "k19")), "outside", 1),
    "code negative": (in_tar(replace_payload(npy(np.full((2, 3), -1, "<i4")), "k19")), "outside", 1),
    "traversal": (renamed("../../"), "plain file name", 1),
    "absolute name": (renamed("/tmp/"), "plain file name", 1),
    "symbolic link": (special_member(tarfile.SYMTYPE, "/etc/passwd"), "no regular file", 1),
    "device": (special_member(tarfile.CHRTYPE), "no regular file", 1),
    "oversized": (in_tar(lambda f: f.update({"k19.image_ids.npy": bytes(2**20)})), "claims 1048576", 1),
    "oversized by header": (in_tar(replace_payload(huge_header(), "k19")), "not an int32", 1),
    "deep json": (in_tar(lambda f: f.update({"k19.json": b"[" * 30_000})), "deep", 1),
    "repeated key": (in_tar(lambda f: f.update({"l.txt": f.pop("k20.txt")})), "k20|l: ", 2),
}


@pytest.fixture
def shards(write_codes: WriteCodes) -> ShardIndex:
    return write_codes(NUM, PER_SHARD)


def loaders(index: ShardIndex, world_size: int, max_bad_samples: int = 8) -> list[CodeLoader]:
    return [
        CodeLoader(
            CodeDataset(
                index,
                batch_size=4,
                train=True,
                seed=1,
                shuffle_buffer=8,
                rank=rank,
                world_size=world_size,
                max_bad_samples=max_bad_samples,
            )
        )
        for rank in range(world_size)
    ]


def check_content(ranks: list[CodeLoader]) -> set[str]:
    """Every sample of every batch is whole and as written; returns the keys."""
    seen = set()
    lengths = set()
    for loader in ranks:
        batches = list(loader)
        lengths.add(len(batches))
        for key, caption, image_ids in itertools.chain.from_iterable(zip(*b, strict=True) for b in batches):
            number = int(re.fullmatch(r"k(\d+)", key)[1])  # type: ignore[index]
            assert caption == f"picture {number}"
            assert image_ids.flatten().tolist() == list(range(number, number + 6))
            seen.add(key)
    assert len(lengths) == 1, "a rank has fewer batches: the others would wait for it forever"
    return seen


def read_all_ranks(ranks: list[CodeLoader]) -> None:
    for rank in ranks:
        list(rank)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("name", MATRIX)
def test_damage(
    shards: ShardIndex,
    name: str,
    world_size: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    damage, report, at_most = MATRIX[name]
    monkeypatch.setattr(Bomb, "trace", str(tmp_path / "owned"))
    damage(shards.folder / BAD)
    ranks = loaders(shards, world_size)
    seen = check_content(ranks)
    lost = {f"k{i}" for i in range(NUM)} - seen
    assert lost <= {f"k{i}" for i in range(16, 24)}
    assert 1 <= len(lost) <= at_most
    assert 1 <= sum(rank.num_skipped for rank in ranks) <= 8
    assert BAD in caplog.text
    assert re.search(report, caplog.text), caplog.text
    assert not (tmp_path / "owned").exists(), "code of a shard was run"
    strict = loaders(shards, world_size, max_bad_samples=0)
    with pytest.raises(BadDataError, match=f"0 are allowed .data.max_bad_samples..*{BAD}"):
        read_all_ranks(strict)


def test_no_flipped_bit_reaches_a_batch(shards: ShardIndex, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    path, rng = shards.folder / BAD, Random(0)
    whole = path.read_bytes()
    for _ in range(40):
        content = bytearray(whole)
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        (loader,) = loaders(shards, 1)
        assert NUM - len(check_content([loader])) <= 1, "one bit costs one sample at most"


@pytest.mark.slow
def test_no_flipped_bit_reaches_a_batch_anywhere(shards: ShardIndex) -> None:
    path, rng = shards.folder / BAD, Random(1)
    whole = path.read_bytes()
    for _ in range(3000):
        content = bytearray(whole)
        for _ in range(rng.choice([1, 2, 16])):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        check_content(loaders(shards, 1, max_bad_samples=16))
