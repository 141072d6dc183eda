"""The data module under a trainer: one command, refusals, and exact continuation."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from sjd2_lightning.data import DataConfig, ensure
from sjd2_lightning.data.datamodule import Batch, CaptionLimit, CodeDataModule
from sjd2_lightning.data.index import ShardIndex, ShardMeta
from sjd2_lightning.models.chameleon import ChameleonBackbone
from tests.tools.shards import GreyTokenizer, WriteCodes, write_shards
from tests.tools.tiny_backbones import tiny_chameleon


class Recorder(L.LightningModule):
    """Remembers the keys it saw; its "model" is one number."""

    def __init__(self, num_codes: int = 512, identity: str = "tok") -> None:
        super().__init__()
        self.backbone = SimpleNamespace(
            num_codes=num_codes, image_tokenizer=SimpleNamespace(identity=identity)
        )
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[list[str]] = []
        self.num_val = 0

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.seen.append(batch.keys)
        return (self.weight - batch.image_ids.float().mean()) ** 2

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.num_val += len(batch.keys)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


@pytest.fixture
def data_dir(write_codes: WriteCodes, tmp_path: Path) -> Path:
    write_codes(48, split="train")
    write_codes(10, split="val")
    return tmp_path


def trainer(folder: Path, **options: Any) -> L.Trainer:
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
    }
    defaults = {"enable_checkpointing": False, "default_root_dir": folder, "max_epochs": 2}
    return L.Trainer(**(quiet | defaults | options))


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_trains_two_epochs_of_another_order(data_dir: Path, num_workers: int) -> None:
    model = Recorder()
    data = CodeDataModule(
        DataConfig(str(data_dir), batch_size=4, num_workers=num_workers, val_batch_size=3, shuffle_buffer=6)
    )
    trainer(data_dir, num_sanity_val_steps=0).fit(model, data)
    first, second = ([key for keys in half for key in keys] for half in (model.seen[:12], model.seen[12:]))
    assert sorted(first) == sorted(second) == sorted(f"k{i}" for i in range(48))
    assert first != second
    assert model.num_val == 20


@pytest.mark.parametrize("stop_at", [5, 12, 17])
@pytest.mark.parametrize("limit", [1.0, 6])
def test_resume_sees_what_an_unbroken_run_sees(
    data_dir: Path, tmp_path: Path, stop_at: int, limit: float
) -> None:
    def data() -> CodeDataModule:
        return CodeDataModule(DataConfig(str(data_dir), batch_size=4, shuffle_buffer=6, verify_shards=False))

    options = {"limit_train_batches": limit, "max_epochs": 4, "limit_val_batches": 0}
    unbroken = Recorder()
    trainer(tmp_path, **options).fit(unbroken, data())
    stopped = Recorder()
    saver = ModelCheckpoint(tmp_path / "ckpt", every_n_train_steps=stop_at, save_top_k=-1, filename="{step}")
    trainer(
        tmp_path, **options, max_steps=stop_at, enable_checkpointing=True, callbacks=[saver]
    ).fit(stopped, data())  # fmt: skip
    continued = Recorder()
    checkpoint = tmp_path / "ckpt" / f"step={stop_at}.ckpt"
    trainer(tmp_path, **options).fit(continued, data(), ckpt_path=checkpoint, weights_only=True)
    assert stopped.seen + continued.seen == unbroken.seen
    assert torch.equal(continued.weight, unbroken.weight)


def test_missing_shards_are_built_by_training_itself(tmp_path: Path) -> None:
    tokenizer = GreyTokenizer()
    data = CodeDataModule(
        DataConfig(str(tmp_path / "emoji"), batch_size=2, views=2, max_images=4), tokenizer=tokenizer
    )
    model = Recorder(tokenizer.num_codes, tokenizer.identity)
    trainer(tmp_path, max_epochs=1).fit(model, data)
    assert len(model.seen) == 4
    assert tokenizer.num_encoded == 12
    trainer(tmp_path, max_epochs=1).fit(model, data)
    assert tokenizer.num_encoded == 12, "fresh shards were built again"


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Recorder(num_codes=8192), "codebook of 512, the model has 8192"),
        (Recorder(identity="other"), "made with image tokenizer tok, the model has other"),
    ],
)
def test_codes_of_another_model_are_refused_before_training(
    data_dir: Path, model: Recorder, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(data_dir).fit(model, CodeDataModule(DataConfig(str(data_dir), batch_size=4)))
    assert model.seen == []


def test_a_wrong_tokenizer_is_refused_before_it_builds_anything(tmp_path: Path) -> None:
    tokenizer = GreyTokenizer()
    data = CodeDataModule(DataConfig(str(tmp_path / "emoji")), tokenizer=tokenizer)
    with pytest.raises(ValueError, match=r"data\.tokenizer has a codebook of 16, the model's has 512"):
        trainer(tmp_path).fit(Recorder(), data)
    assert not (tmp_path / "emoji").exists()


def test_a_missing_shard_stops_before_training(data_dir: Path) -> None:
    (data_dir / "codes" / "train" / "train-00002.tar").unlink()
    model = Recorder()
    with pytest.raises(ValueError, match=r"lacks 1 of the 6 shards.*train-00002.tar"):
        trainer(data_dir).fit(model, CodeDataModule(DataConfig(str(data_dir), batch_size=4)))
    assert model.seen == []


def test_missing_data_say_how_to_make_them(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`sjd2 prepare`"):
        CodeDataModule(DataConfig(str(tmp_path))).prepare_data()


def test_damage_is_announced_before_training(data_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = data_dir / "codes" / "train" / "train-00001.tar"
    path.write_bytes(path.read_bytes()[:-3000])
    CodeDataModule(DataConfig(str(data_dir))).prepare_data()
    assert "train-00001.tar is not as it was written" in caplog.text
    caplog.clear()
    CodeDataModule(DataConfig(str(data_dir), verify_shards=False)).prepare_data()
    assert caplog.text == ""


def test_shards_of_another_source_are_used_as_they_are(data_dir: Path) -> None:
    tokenizer = GreyTokenizer()
    CodeDataModule(DataConfig(str(data_dir)), tokenizer=tokenizer).prepare_data()
    assert tokenizer.num_encoded == 0
    assert ShardIndex.load(data_dir / "codes" / "train").meta.source == "made up"


def test_swapped_folders_are_refused(data_dir: Path) -> None:
    (data_dir / "codes" / "val").rename(data_dir / "codes" / "was_val")
    (data_dir / "codes" / "train").rename(data_dir / "codes" / "val")
    with pytest.raises(ValueError, match="split 'train', not codes of 'val'"):
        CodeDataModule(DataConfig(str(data_dir))).index("val")


def test_all_bad_arguments_are_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.views=0: .*data\.batch_size=0: .*data\.num_workers=-1: "):
        CodeDataModule(DataConfig(str(tmp_path), batch_size=0, num_workers=-1, views=0))


def test_fresh_shards_need_no_writable_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = CodeDataModule(
        DataConfig(str(tmp_path / "emoji"), views=1, max_images=2), tokenizer=GreyTokenizer()
    )
    data.prepare_data()
    monkeypatch.setattr(ensure, "_locked", lambda folder: pytest.fail("tried to write"))
    data.prepare_data()


class Reader(Recorder):
    """A recorder whose backbone has 256 positions: 7 slots, 5 tokens of the template, 244 words."""

    def __init__(self, backbone: ChameleonBackbone) -> None:
        super().__init__()
        self.backbone = backbone
        self.image_layout = backbone.layout(4, 6)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        assert all(len(caption.split()) <= 244 for caption in batch.captions)
        return super().training_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("max_steps", [-1, 3])
def test_captions_too_long_for_the_model_are_left_out_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, num_workers: int, max_steps: int
) -> None:
    backbone = tiny_chameleon(512)
    tokenizer = backbone.image_tokenizer.identity
    for split in ("train", "val"):
        meta = ShardMeta("codes", split, "made up", 2, 3, "nobody", "hash", 512, tokenizer)
        samples = (
            {"key": f"k{i}", "caption": "cat " * (245 - bool(i % 3)), "image_ids": np.full((2, 3), i)}
            for i in range(24)
        )
        write_shards(samples, tmp_path / "codes" / split, 8, meta)
    data = CodeDataModule(
        DataConfig(str(tmp_path), batch_size=4, num_workers=num_workers, shuffle_buffer=4, max_bad_samples=0)
    )
    model = Reader(backbone)
    options = {"max_epochs": 1, "max_steps": max_steps, "limit_val_batches": 0}
    with caplog.at_level("WARNING", logger="sjd2_lightning"):
        trainer(tmp_path, **options).fit(model, data)
    seen = [key for keys in model.seen for key in keys]
    assert len(model.seen) == (6 if max_steps == -1 else 3), "an epoch has the batches that it had"
    assert not [key for key in seen if int(key[1:]) % 3 == 0]
    lines = [record.getMessage() for record in caplog.records if "too long for the model" in record.message]
    assert len(lines) == 1
    assert "its caption has 250 tokens with its template, and the model has 256 positions" in lines[0]
    if max_steps == -1:
        assert set(seen) == {f"k{i}" for i in range(24) if i % 3}
        assert lines[0].startswith("8 sample(s)")


def test_images_that_fill_the_positions_alone_are_refused(data_dir: Path) -> None:
    backbone = tiny_chameleon(512)
    backbone.num_positions = 11
    with pytest.raises(ValueError, match=r"take 7 tokens, the template 6, and the model has 11 positions"):
        CaptionLimit(backbone, backbone.layout(4, 6))


def test_short_captions_are_not_counted_in_tokens() -> None:
    backbone = tiny_chameleon(512)
    limit = CaptionLimit(backbone, backbone.layout(4, 6))
    limit.backbone.prompt_ids = None  # a call of it would be an error
    assert limit("a red cat") == ""
