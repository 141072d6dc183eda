"""Raw shards: the codes of training are those that prepared shards would have held."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sjd2_lightning.data import DataConfig
from sjd2_lightning.data.datamodule import Batch, CodeDataModule, PictureBatch
from sjd2_lightning.data.index import ShardIndex
from sjd2_lightning.data.loader import CodeDataset, CodeLoader
from sjd2_lightning.data.sources.emoji import prepare_emoji
from tests.data.test_datamodule import Recorder, trainer
from tests.tools.shards import GreyTokenizer


class Watcher(Recorder):
    """Remembers the codes it was given."""

    def __init__(self, pixels: tuple[int, int] = (64, 64)) -> None:
        super().__init__(16, "grey-1")
        self.backbone.image_tokenizer = GreyTokenizer()
        self.image_layout = SimpleNamespace(height=16, width=16, pixels=pixels)
        self.codes: dict[str, list[Any]] = {}

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        assert isinstance(batch, Batch)
        self.codes |= dict(zip(batch.keys, batch.image_ids.tolist(), strict=True))
        return super().training_step(batch, batch_idx)


@pytest.fixture(scope="module")
def emoji_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("emoji")
    prepare_emoji(folder, GreyTokenizer(), views=1, max_images=8, show_progress=False)
    return folder


def test_raw_shards_train_like_codes(emoji_dir: Path, tmp_path: Path) -> None:
    models = {}
    for kind in ("codes", "raw"):
        models[kind] = Watcher()
        data = CodeDataModule(DataConfig(str(emoji_dir), batch_size=4, kind=kind))
        trainer(tmp_path, max_epochs=1, num_sanity_val_steps=0).fit(models[kind], data)
    assert models["raw"].seen == models["codes"].seen
    assert models["raw"].codes == models["codes"].codes
    assert models["raw"].num_val == models["codes"].num_val == 8
    assert torch.equal(models["raw"].weight, models["codes"].weight)


def test_raw_batches_hold_pixels(emoji_dir: Path) -> None:
    index = ShardIndex.load(emoji_dir / "raw" / "train")
    (first, _) = CodeLoader(CodeDataset(index, batch_size=4, train=True), num_workers=0)
    assert isinstance(first, PictureBatch)
    assert (first.images.shape, first.images.dtype) == ((4, 64, 64, 3), torch.uint8)


@pytest.mark.parametrize("kind", ["codes", "raw"])
def test_images_of_another_size_are_refused(emoji_dir: Path, tmp_path: Path, kind: str) -> None:
    model = Watcher(pixels=(32, 64))
    model.image_layout.height = 8
    with pytest.raises(ValueError, match=r"holds images of .*prepare them again with --image-size"):
        trainer(tmp_path).fit(model, CodeDataModule(DataConfig(str(emoji_dir), batch_size=4, kind=kind)))
    assert model.seen == []


def test_half_precision_tokenizers_are_refused(emoji_dir: Path) -> None:
    data = CodeDataModule(DataConfig(str(emoji_dir), batch_size=4, kind="raw"))
    tokenizer = SimpleNamespace(vq=torch.nn.Linear(1, 1).bfloat16(), encode=None)
    backbone = SimpleNamespace(image_tokenizer=tokenizer)
    data.trainer = SimpleNamespace(lightning_module=SimpleNamespace(backbone=backbone))  # type: ignore[assignment]
    batch = PictureBatch(["k"], ["c"], torch.zeros(1, 64, 64, 3, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"use trainer.precision=bf16-mixed, or data=shards"):
        data.on_after_batch_transfer(batch, 0)


def test_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.kind='jpg': must be one of codes, raw"):
        CodeDataModule(DataConfig(str(tmp_path), kind="jpg"))  # type: ignore[arg-type]
