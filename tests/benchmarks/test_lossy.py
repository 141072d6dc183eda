"""benchmarks/study/lossy.py draws by every rule, and replay draws what plain decoding draws."""

import json

import pytest

from benchmarks.study import lossy
from sjd2_lightning.decoding import Sampling


def test_settings_are_sound_and_say_what_is_exact():
    found = lossy.settings(Sampling(0.9, guidance_scale=1.5))
    for config in found.values():
        config.check()
    assert {name for name, config in found.items() if config.lossless} == {"ar", "replay_32_1", "exact_32_1"}


@pytest.mark.slow
def test_the_benchmark_of_lossy_rules_writes_its_figures(random_scenes_model, tmp_path, capsys):
    path = tmp_path / "lossy.json"
    lossy.main(["--weights", str(random_scenes_model), "--per-category", "1", "--json", str(path)])
    found = json.loads(path.read_text())["settings"]
    assert found["replay_32_1"]["equal_to_ar"] == 1
    assert found["replay_32_1"]["nats_minus_ar"][0] == 0
    assert found["paper_96_25"]["equal_to_ar"] < 1
    assert found["paper_96_25"]["tokens_a_pass"][0] > found["ar"]["tokens_a_pass"][0] == 1
    assert found["ar"]["right"][0] == 0, "random weights draw nothing that was asked for"
    assert "paper_96_25" in capsys.readouterr().out
    few = ["--weights", str(random_scenes_model), "--per-category", "1", "--only", "replay_32_1"]
    lossy.main([*few, "--json", str(path)])
    assert list(json.loads(path.read_text())["settings"]) == ["ar", "replay_32_1"]
