"""What `evaluate.py` refuses before it decodes anything, and what it says of weights."""

from types import SimpleNamespace

import pytest

from sjd2_lightning.cli.evaluate import evaluate, with_word_of_noise
from sjd2_lightning.run.provenance import write_trainings
from tests.tools.configurations import composed
from tests.tools.small_evaluation import METHODS
from tests.tools.small_evaluation import evaluate as small


def test_a_prompt_that_is_too_long_is_refused_before_a_window_is_chosen(tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("red heart\n" + "blue car " * 900 + "\n")
    monkeypatch.setattr("sjd2_lightning.evaluation.auto_window.choose_window", None)
    run = tmp_path / "run"
    overrides = [f"data.prompt_file={tmp_path / 'prompts.txt'}", f"run_dir={run}", "weights=weights/tiny"]
    cfg = composed(
        "evaluate", *overrides, "decoding.window=auto", "metrics=none", "logger=none", "device=cpu"
    )
    with pytest.raises(ValueError, match=r"prompt 2 of 2, .* tokens .* [\d,]+ positions, \d+ of them"):
        evaluate(cfg)
    assert not run.exists()


def test_methods_with_levels_on_weights_that_never_saw_noise_are_named(tmp_path):
    result = small(tmp_path / "run", methods={name: METHODS[name] for name in ("ar", "sjd", "sjd2")})
    own = SimpleNamespace(ckpt_path=None, model=SimpleNamespace(random_name=""))
    assert with_word_of_noise(result, own, tmp_path) is result, "nothing is known"
    write_trainings(tmp_path, [{"noise": {"enabled": False}}])
    found = with_word_of_noise(result, own, tmp_path).warnings
    assert found[0].startswith("sjd2: noise levels on weights that never saw noise")
    assert found[1:] == result.warnings
    other = SimpleNamespace(ckpt_path="a.ckpt", model=own.model)
    assert with_word_of_noise(result, other, tmp_path) is result, "the weights are those of the checkpoint"
    write_trainings(tmp_path, [{"noise": {"enabled": False}}, {"noise": {"enabled": True}}])
    assert with_word_of_noise(result, own, tmp_path) is result
