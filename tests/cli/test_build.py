"""Parts of a run from the configuration: prompts of the data at hand, data that do not fit."""

import json
from types import SimpleNamespace

import pytest
from hydra import compose, initialize_config_dir
from PIL import Image

from sjd2_lightning.cli.build import (
    build_data,
    build_prompts,
    build_reference,
    decoding_backbone,
    trainings_after,
)
from sjd2_lightning.cli.prepare import main as prepare
from sjd2_lightning.config.reading import conf_dir, train_config
from sjd2_lightning.config.runs import TrainConfig
from sjd2_lightning.data.index import Shard, ShardIndex, ShardMeta
from sjd2_lightning.models.draft_corrector import CORRECTOR_FILE, DraftCorrector
from tests.tools.configurations import put_named_files, typed
from tests.tools.tiny_backbones import tiny_chameleon


def composed(*overrides: str) -> TrainConfig:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return train_config(compose("train", list(overrides)))


def texts(*overrides: str) -> list[str]:
    return [item.prompt for item in build_prompts(composed(*overrides), 4)]


def test_own_pictures_bring_their_prompts(tmp_path, capsys):
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(12):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(photos / f"p{number}.png")
        (photos / f"p{number}.txt").write_text(f"picture {number}\n")
    out = tmp_path / "shards"
    prepare(["folder", "--input", str(photos), "--out", str(out), "--val-share", "0.5", "--workers", "1"])
    *_, command, kept = capsys.readouterr().out.strip().splitlines()
    assert kept == "kept 12 of 12 samples"
    held_out = sorted(path.stem for path in (out / "held_out").glob("*.png"))
    told = f"sjd2 train data=raw data.data_dir={out} data.batch_size={12 - len(held_out)}"
    assert command == f"train on them: {told}", "it is whole: fewer pictures than a batch of 16"
    own = texts(*told.split()[2:])
    assert len(own) == 4
    assert all(text.startswith("picture ") for text in own)
    reference = build_reference(composed("data=raw", f"data.data_dir={out}"))
    assert sorted(reference.keys) == held_out
    assert reference.name == "held-out pictures of shards"
    assert reference.images.shape[1:] == (128, 128, 3)
    assert all(text in reference.captions for text in own)
    (tmp_path / "other.txt").write_text("a heart\n")
    assert texts("data=raw", f"data.data_dir={out}", f"data.prompt_file={tmp_path / 'other.txt'}") == [
        "a heart"
    ]
    embedded = texts()
    assert not set(embedded) & set(own)
    assert texts(f"data.data_dir={out}") == embedded, (
        "the embedded set is built there, and has its own prompts"
    )


def test_codes_of_another_tokenizer_are_refused_before_loggers_are_made(tmp_path, monkeypatch):
    put_named_files(tmp_path, monkeypatch)
    config = typed("train", "data=shards", "data.data_dir=mine")
    for split in ("train", "val"):
        folder = tmp_path / "mine/codes" / split
        folder.mkdir(parents=True)
        (folder / "a.tar").touch()
        meta = ShardMeta("codes", split, "folder", 16, 16, "", "", num_codes=2048, tokenizer_hash="a" * 64)
        ShardIndex(folder, meta, (Shard("a.tar", "", 0, 20),)).save(folder)
    backbone = SimpleNamespace(num_codes=2048, image_tokenizer=SimpleNamespace(identity="a" * 64))
    assert build_data(config, backbone).index("val").num_samples == 20
    backbone.image_tokenizer.identity = "b" * 64
    with pytest.raises(ValueError, match="made with image tokenizer aaaaaaaaaaaa, the model has bbbb"):
        build_data(config, backbone)


def test_weights_say_which_trainings_made_them():
    after = trainings_after(typed("train", "noise=one_level"), 30)
    assert [entry["steps"] for entry in after][-1] == 30
    assert after[-1]["noise"]["enabled"] is True
    assert len(after) > 1, "those of the shipped weights come first"
    json.dumps(after)
    alone = trainings_after(typed("train", "model=lumina_mgpt", "model.init=random_tiny", "noise=off"), 2)
    assert alone[0]["random"].startswith("random_tiny")
    assert [entry["noise"]["enabled"] for entry in alone[1:]] == [False]


def test_a_corrector_that_is_trained_anew_is_read_anew(tmp_path):
    """Runs of one process keep the model that they decode with."""
    tiny_chameleon(7, seed=4, scale=0.3).save(tmp_path)
    model = composed().model
    kept = decoding_backbone(model, tmp_path, None, "cpu")
    assert kept.corrector is None
    assert decoding_backbone(model, tmp_path, None, "cpu") is kept
    DraftCorrector(kept.hidden_size, 4).save(tmp_path / CORRECTOR_FILE)
    again = decoding_backbone(model, tmp_path, None, "cpu")
    assert again.corrector is not None
