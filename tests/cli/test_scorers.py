"""What is measured, from the configuration: scores that say nothing, weights that are not there."""

import json

import pytest
from PIL import Image

from sjd2_lightning.cli.build import build_reference
from sjd2_lightning.cli.check import check_evaluate, logged_names
from sjd2_lightning.cli.scorers import build_metrics, left_out
from sjd2_lightning.config.reading import ConfigError
from tests.tools.configurations import composed as composed_tree
from tests.tools.configurations import put_named_files, typed
from tests.tools.small_scorers import small_clip, small_dinov2, small_pickscore


def test_scores_that_say_nothing_of_own_pictures_are_left_out(tmp_path):
    """With one sentence each; what is asked for by name is measured, and scenes as ever."""
    (tmp_path / "held_out").mkdir()
    for number in range(3):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / "held_out" / f"p{number}.png")
    (tmp_path / "prompts.json").write_text('["a", "b", "c"]')
    own = ("data=shards", f"data.data_dir={tmp_path}")

    def said(*overrides: str, num: int = 8) -> tuple[list[str], int, bool]:
        config = typed("train", *overrides)
        reference = build_reference(config)
        metrics = build_metrics(config, reference, num)
        return list(left_out(config, reference, num)), len(metrics.extractors), metrics.clip is not None

    sentences, extractors, has_clip = said(*own)
    assert [sentence.split(":")[0] for sentence in sentences] == ["no CLIP score", "no distances"]
    assert "3 pictures are too few, and metrics.min_images=24" in sentences[1]
    assert (extractors, has_clip) == (0, False)
    assert said(*own, "metrics.min_images=3", "metrics.clip=weights/tiny/clip") == ([], 1, True)
    assert said(*own, "metrics=none") == ([], 0, False)
    assert said(num=24) == ([], 1, True)
    assert said(num=23)[1:] == (0, True)
    assert said("data=scenes")[0][0].startswith("no distances: 8 pictures are too few")
    (tmp_path / "one" / "held_out").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "one" / "held_out" / "p.png")
    assert said("data=shards", f"data.data_dir={tmp_path / 'one'}")[1:] == (0, False), "one picture is no set"
    bare = ("data=shards", "data.data_dir=nowhere")
    assert [sentence.split(":")[0] for sentence in said(*bare)[0]][2].startswith(
        "the prompts are names of emoji"
    )
    photos = (f"data.reference_dir={tmp_path / 'held_out'}", "metrics.min_images=2")
    assert said(*photos)[1:] == (1, False), "the scorer of scenes judges no photos"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("scorers")
    return {
        "dinov2": small_dinov2(root / "dinov2"),
        "cmmd": small_clip(root / "clip"),
        "pickscore": small_pickscore(root / "pickscore"),
    }


def test_scorers_are_built_where_they_are_asked_for(folders):
    plain = typed("evaluate", "metrics.features=[]", "metrics.clip=null")
    built = build_metrics(plain, build_reference(plain), 24)
    assert (list(built.extractors), built.embedder, built.pick) == ([], None, None), "off by default"
    asked = [f"metrics.{key}={folder}" for key, folder in folders.items()]
    config = typed("evaluate", "metrics.clip=null", *asked)
    reference = build_reference(config)
    built = build_metrics(config, reference, 24)
    assert [extractor.name for extractor in built.extractors] == ["EffNetLite0", "DINOv2"]
    assert (built.embedder.name, built.pick.source) == ("CLIPVision", str(folders["pickscore"]))
    few = build_metrics(config, reference, 23)
    assert (list(few.extractors), few.embedder) == ([], None)
    assert few.pick is not None, "a score of single images needs no number of them"
    [sentence] = [line for line in left_out(config, reference, 23) if line.startswith("no distances")]
    assert "23 pictures are too few, and metrics.min_images=24 are asked for" in sentence


def test_a_release_on_the_hub_is_named_with_its_commit_and_downloaded_by_leave(folders, monkeypatch):
    asked = []

    def download(name, local_files_only):
        asked.append((str(name), local_files_only))
        return folders["dinov2"]

    monkeypatch.setattr("sjd2_lightning.cli.scorers.download", download)
    for leave in ("false", "true"):
        words = ["metrics.dinov2=owner/dino@v1", f"metrics.allow_download={leave}", "metrics.clip=null"]
        config = typed("evaluate", *words, "metrics.features=[]")
        built = build_metrics(config, build_reference(config), 24)
        assert built.extractors[0].preprocessing.startswith(
            f"owner/dino@{folders['dinov2'].name}, licence of"
        )
    assert asked == [("owner/dino@v1", True), ("owner/dino@v1", False)]


def test_what_training_logs_is_known_before(folders):
    asked = [f"metrics.{key}={folder}" for key, folder in folders.items()]
    names = logged_names(typed("train", "callbacks.sampling.num_prompts=24", *asked))
    wanted = {"val/fd_DINOv2", "val/kid_DINOv2", "val/cmmd", "val/pick_score", "val/pick_score_minus_ar"}
    assert wanted <= set(names)
    assert not wanted & set(logged_names(typed("train", "callbacks.sampling.num_prompts=24")))


@pytest.mark.parametrize("key", ["dinov2", "cmmd", "pickscore"])
def test_weights_that_are_not_there_are_named(key, folders, tmp_path, monkeypatch):
    put_named_files(tmp_path, monkeypatch)
    monkeypatch.setattr("sjd2_lightning.metrics.alignment.check_clip", lambda *named: "")

    def said(value: str) -> str:
        cfg = composed_tree("evaluate").copy()
        cfg.metrics[key] = value
        with pytest.raises(ConfigError) as caught:
            check_evaluate(cfg)
        [line] = [line for line in caught.value.problems if line.startswith(f"metrics.{key}=")]
        return line

    assert said("gone/folder/here") == (
        f"metrics.{key}=gone/folder/here: no config.json in gone/folder/here; give a folder that "
        "`hf download` has written"
    )
    line = said("owner/model@v1")
    assert "neither in the hub's cache nor could it be downloaded" in line
    assert "or metrics.allow_download=true" in line
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.json").write_text(json.dumps({"model_type": "bert"}))
    assert "other is a model of type bert, where" in said("other")
    kind = json.loads((folders[key] / "config.json").read_text())["model_type"]
    (tmp_path / "other/config.json").write_text(json.dumps({"model_type": kind}))
    assert "no weights (*.safetensors) in other" in said("other")
    (tmp_path / "other/config.json").write_text("[")
    assert "is no configuration of transformers" in said("other")
