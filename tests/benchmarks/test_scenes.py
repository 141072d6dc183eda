"""benchmarks/scenes.py measures a model of scenes and writes a page of its pictures."""

import json

import pytest
import torch

from benchmarks import scenes
from sjd2_lightning.models.small import build_tiny, small_vq


@pytest.mark.slow
def test_the_benchmark_of_scenes_writes_its_figures(tmp_path, capsys):
    torch.manual_seed(0)
    small_vq(16, 3).save(tmp_path / "tokenizer")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_layers": 1, "num_heads": 2}
    build_tiny(["a dog", "two keys"], tmp_path / "tokenizer", 320, **sizes).save(tmp_path / "model")
    files = ["--json", str(tmp_path / "scenes.json"), "--page", str(tmp_path / "scenes.png")]
    scenes.main(["--weights", str(tmp_path / "model"), "--per-category", "1", "--replayed", "1", *files])
    found = json.loads((tmp_path / "scenes.json").read_text())
    assert set(found["drawn"]) == {*scenes.CATEGORIES, "overall"}
    assert found["drawn"]["overall"][0] == 0, "random weights draw nothing that was asked for"
    assert found["tokens_a_pass"] >= 1
    assert found["equal_to_ar"] == 1
    assert (tmp_path / "scenes.png").stat().st_size > 1000
    assert "tokens_a_pass" in capsys.readouterr().out
