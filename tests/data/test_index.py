"""Writing shards: the round trip, the index, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset as wds

from sjd2_lightning.data.index import ShardIndex, ShardMeta
from sjd2_lightning.data.reading import RawSample, Sample, read_all
from sjd2_lightning.data.writing import write_shard
from sjd2_lightning.run.files import sha256_of_file
from tests.tools.shards import WriteCodes, write_shards

CODES = ShardMeta("codes", "train", "made up", 2, 3, "nobody", "hash", 512, "tok")


def sample(**changes: Any) -> dict[str, Any]:
    plain = {
        "key": "k",
        "caption": "c",
        "concept": "x",
        "view": 0,
        "size": (8, 12),
        "image_ids": np.zeros((2, 3)),
    }
    return plain | changes


def test_codes_round_trip(write_codes: WriteCodes) -> None:
    index = write_codes(20, samples_per_shard=8)
    read: list[Sample] = list(read_all(index.folder))
    assert [s.key for s in read] == [f"k{i}" for i in range(20)]
    assert read[7].caption == "picture 7"
    assert read[7].image_ids.tolist() == [[7, 8, 9], [10, 11, 12]]
    assert str(read[7].image_ids.dtype) == "torch.int64"


def test_index_counts_and_hashes_what_lies_beside_it(write_codes: WriteCodes) -> None:
    written = write_codes(20, samples_per_shard=8)
    index = ShardIndex.load(written.folder)
    assert index == written
    assert [shard.num_samples for shard in index.shards] == [8, 8, 4]
    assert all(sha256_of_file(index.folder / shard.name) == shard.sha256 for shard in index.shards)
    assert index.damaged_shards() == []
    assert [shard.code_range for shard in index.shards] == [(0, 12), (8, 20), (16, 24)]


def test_same_samples_give_the_same_bytes(write_codes: WriteCodes, tmp_path: Path) -> None:
    assert write_codes(20).shards == write_codes(20, data_dir=tmp_path / "again").shards


def test_stock_webdataset_reads_the_shards(write_codes: WriteCodes) -> None:
    index = write_codes(20)
    urls = [str(index.folder / shard.name) for shard in index.shards]
    assert len(list(wds.WebDataset(urls, shardshuffle=False))) == 20


def test_raw_round_trip(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    meta = ShardMeta("raw", "val", "made up", 8, 8, "nobody", "hash")
    write_shards([sample(image=image)], tmp_path / "raw", 4, meta)
    (read,) = read_all(str(tmp_path / "raw"))
    assert isinstance(read, RawSample)
    np.testing.assert_array_equal(read.image, image)


def test_damage_is_seen_in_the_hash(write_codes: WriteCodes) -> None:
    index = write_codes(20)
    path = index.folder / index.shards[1].name
    content = bytearray(path.read_bytes())
    content[2000] ^= 1
    path.write_bytes(content)
    assert index.damaged_shards() == [path.name]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"key": "a.b"}, "'a.b' repeats, or.* plain and unique"),
        ({"key": "../a"}, "plain and unique"),
        ({"image_ids": np.full((2, 3), 512)}, r"in \[512, 512\]; the folder is for .* in \[0, 512\)"),
        ({"image_ids": np.full((2, 3), -1)}, r"in \[-1, -1\]"),
        ({"image_ids": np.zeros((3, 2))}, r"shape \(3, 2\)"),
    ],
)
def test_samples_that_do_not_fit_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_shards([sample(**changes)], tmp_path / "shards", 4, CODES)


def test_a_repeated_key_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unique"):
        write_shards([sample(), sample()], tmp_path / "shards", 4, CODES)


def test_failed_writing_leaves_the_old_shard(write_codes: WriteCodes) -> None:
    index = write_codes(20)
    path = index.folder / index.shards[0].name
    before = path.read_bytes()
    with pytest.raises(ValueError, match="shape"):
        write_shard(path, [sample(), sample(key="l", image_ids=np.zeros((1, 1)))], CODES)
    assert path.read_bytes() == before


def test_missing_index_and_missing_shards_are_named(write_codes: WriteCodes, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"index.json is missing.*prepare"):
        ShardIndex.load(tmp_path / "nowhere")
    index = write_codes(20)
    (index.folder / "train-00001.tar").unlink()
    with pytest.raises(ValueError, match=r"lacks 1 of the 3 shards.*train-00001.tar"):
        index.check_files()


@pytest.mark.parametrize("name", ["pipe:touch owned.tar", "../train-00000.tar", "train-00000.sh"])
def test_an_index_cannot_name_commands_or_other_folders(write_codes: WriteCodes, name: str) -> None:
    index = write_codes(20)
    path = index.folder / "index.json"
    content = json.loads(path.read_text())
    content["shards"][0]["name"] = name
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"not a .tar file of this folder"):
        ShardIndex.load(index.folder)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"format_version": 99}', '{"format_version": 1, "shards": [1]}']
)
def test_a_broken_index_is_refused(write_codes: WriteCodes, content: str) -> None:
    index = write_codes(20)
    (index.folder / "index.json").write_text(content)
    with pytest.raises(ValueError, match="no index of format 2"):
        ShardIndex.load(index.folder)


def test_codes_of_another_model_are_refused(write_codes: WriteCodes) -> None:
    index = write_codes(20)
    index.check_model(512, "tok")
    index.check_model(None, None)
    with pytest.raises(ValueError, match="codebook of 512, the model has 8192"):
        index.check_model(8192, None)
    with pytest.raises(ValueError, match="made with image tokenizer tok, the model has other"):
        index.check_model(512, "other")
