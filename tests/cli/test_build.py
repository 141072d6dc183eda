"""Parts of a run from the configuration: data that do not fit are refused before anything is logged."""

from types import SimpleNamespace

import pytest

from sjd2_lightning.cli.build import build_data
from sjd2_lightning.data.index import Shard, ShardIndex, ShardMeta
from tests.tools.configurations import put_named_files, typed


def test_codes_of_another_tokenizer_are_refused_before_loggers_are_made(tmp_path, monkeypatch):
    put_named_files(tmp_path, monkeypatch)
    config = typed("train", "data=shards", "data.data_dir=mine")
    for split in ("train", "val"):
        folder = tmp_path / "mine/codes" / split
        folder.mkdir(parents=True)
        (folder / "a.tar").touch()
        meta = ShardMeta("codes", split, "folder", 16, 16, "", "", num_codes=512, tokenizer_hash="a" * 64)
        ShardIndex(folder, meta, (Shard("a.tar", "", 0, 20),)).save(folder)
    backbone = SimpleNamespace(num_codes=512, image_tokenizer=SimpleNamespace(identity="a" * 64))
    assert build_data(config, backbone).index("val").num_samples == 20
    backbone.image_tokenizer.identity = "b" * 64
    with pytest.raises(ValueError, match="made with image tokenizer aaaaaaaaaaaa, the model has bbbb"):
        build_data(config, backbone)
