"""benchmarks/scenes.py measures a model of scenes and writes a page of its pictures."""

import json

import pytest

from benchmarks import scenes
from sjd2_lightning.data.sources.scenes import Variety, training_scene


def test_trained_combinations_are_new_scenes_of_the_training_split():
    variety = Variety(32, True)
    found = scenes.trained(2, 0, variety)
    assert [scene.category for scene in found] == [*scenes.CATEGORIES] * 2
    assert len({scene.key for scene in found}) == len(found)
    for scene in found:
        assert scene == training_scene(0, int(scene.key.removeprefix("scene_")), variety)
        assert int(scene.key.removeprefix("scene_")) >= 1_000_000


@pytest.mark.slow
def test_the_benchmark_of_scenes_writes_its_figures(random_scenes_model, tmp_path, capsys):
    files = ["--json", str(tmp_path / "scenes.json"), "--page", str(tmp_path / "scenes.png")]
    scenes.main(["--weights", str(random_scenes_model), "--per-category", "1", "--replayed", "1", *files])
    found = json.loads((tmp_path / "scenes.json").read_text())
    assert set(found["drawn"]) == {*scenes.CATEGORIES, "overall"}
    assert found["drawn"]["overall"][0] == 0, "random weights draw nothing that was asked for"
    assert found["tokens_a_pass"] >= 1
    assert found["equal_to_ar"] == 1
    assert (tmp_path / "scenes.png").stat().st_size > 1000
    assert "tokens_a_pass" in capsys.readouterr().out
