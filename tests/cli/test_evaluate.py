"""What `evaluate.py` refuses before it decodes anything."""

import pytest

from sjd2_lightning.cli.evaluate import evaluate
from tests.tools.configurations import composed


def test_a_prompt_that_is_too_long_is_refused_before_a_window_is_chosen(tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("red heart\n" + "blue car " * 900 + "\n")
    monkeypatch.setattr("sjd2_lightning.evaluation.auto_window.choose_window", None)
    run = tmp_path / "run"
    overrides = [f"data.prompt_file={tmp_path / 'prompts.txt'}", f"run_dir={run}", "weights=weights/tiny"]
    cfg = composed(
        "evaluate", *overrides, "decoding.window=auto", "metrics=none", "logger=none", "device=cpu"
    )
    with pytest.raises(ValueError, match=r"prompt 2 of 2, .* tokens .* 1,024 positions, 271 of them"):
        evaluate(cfg)
    assert not run.exists()
