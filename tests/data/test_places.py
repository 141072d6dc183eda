"""Shards in object stores, and addresses that are not opened."""

from __future__ import annotations

from pathlib import Path

import fsspec
import pytest

from sjd2_lightning.data import DataConfig
from sjd2_lightning.data.datamodule import CodeDataModule
from sjd2_lightning.data.index import ShardIndex
from sjd2_lightning.data.loader import CodeDataset, CodeLoader
from sjd2_lightning.data.places import RemotePath, place
from sjd2_lightning.data.reading import BadDataError, read_all
from tests.tools.shards import WriteCodes


@pytest.fixture
def bucket(empty_store: None, write_codes: WriteCodes, tmp_path: Path) -> str:
    """The same shards in a store in memory."""
    write_codes(20)
    write_codes(6, split="val")
    store = fsspec.filesystem("memory")
    store.put(str(tmp_path / "codes"), "/bucket/data/codes", recursive=True)
    return "memory://bucket/data"


@pytest.fixture
def empty_store() -> None:
    store = fsspec.filesystem("memory")
    store.store.clear()
    store.pseudo_dirs[:] = [""]


def test_a_store_reads_like_a_folder(bucket: str, tmp_path: Path) -> None:
    here, there = (ShardIndex.load(f"{where}/codes/train") for where in (str(tmp_path), bucket))
    assert there.shards == here.shards
    assert isinstance(there.folder, RemotePath)
    there.check_files()
    assert there.damaged_shards() == []
    batches = [
        [batch.keys for batch in CodeLoader(CodeDataset(index, batch_size=4, train=True, seed=2))]
        for index in (here, there)
    ]
    assert batches[0] == batches[1]
    assert [sample.key for sample in read_all(f"{bucket}/codes/val")] == [f"k{i}" for i in range(6)]


def test_the_data_module_takes_an_address(bucket: str) -> None:
    data = CodeDataModule(DataConfig(str(bucket), batch_size=5))
    data.prepare_data()
    assert len(list(data.train_dataloader())) == 4


def test_damage_in_a_store_is_reported(bucket: str, caplog: pytest.LogCaptureFixture) -> None:
    store = fsspec.filesystem("memory")
    name = "/bucket/data/codes/train/train-00001.tar"
    store.pipe_file(name, store.cat_file(name)[:5000])
    index = ShardIndex.load(f"{bucket}/codes/train")
    assert index.damaged_shards() == ["train-00001.tar"]
    with pytest.raises(BadDataError, match=r"train-00001.tar"):
        list(read_all(f"{bucket}/codes/train"))
    store.rm(name)
    with pytest.raises(ValueError, match=r"lacks 1 of the 3 shards.*train-00001.tar"):
        index.check_files()
    batches = CodeLoader(CodeDataset(index, batch_size=4, train=True))
    assert len(list(batches)) == 5
    assert "train-00001.tar: samples" in caplog.text


def test_errors_of_a_store_are_counted_not_raised(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone(Exception):
        pass

    def fails(*arguments: object, **options: object) -> bytes:
        raise Gone("connection lost")

    index = ShardIndex.load(f"{bucket}/codes/train")
    monkeypatch.setattr("fsspec.implementations.memory.MemoryFile.read", fails)
    with pytest.raises(BadDataError, match="Gone: connection lost"):
        list(CodeLoader(CodeDataset(index, batch_size=4, train=True)))


@pytest.mark.parametrize(
    "address",
    [
        "pipe:touch owned",
        "pipe://touch owned",
        "ssh://host/data",
        "python://x",
        "simplecache::s3://bucket/data",
        "s3://bucket::pipe://x",
    ],
)
def test_other_addresses_are_refused(address: str) -> None:
    with pytest.raises(ValueError, match=r"commands are not run|only local folders and s3://"):
        place(address)
    with pytest.raises(ValueError, match=r"commands are not run|only local folders and s3://"):
        CodeDataModule(DataConfig(str(address)))


def test_local_addresses_are_paths(tmp_path: Path) -> None:
    assert place(f"file://{tmp_path}") == tmp_path == place(tmp_path) == place(str(tmp_path))
    assert str(place("s3://bucket/data/") / "codes" / "a.tar") == "s3://bucket/data/codes/a.tar"
    assert (place("s3://bucket/data") / "a.tar").name == "a.tar"


def test_a_missing_package_is_named() -> None:
    pytest.importorskip("fsspec")
    try:
        import s3fs  # noqa: F401
    except ImportError:
        with pytest.raises(ValueError, match="pip install s3fs"):
            ShardIndex.load("s3://bucket/data")
