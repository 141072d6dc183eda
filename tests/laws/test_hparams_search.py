"""A search tunes a number of the report; without its package it is one line that says how to get it."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import yaml
from hydra.core.global_hydra import GlobalHydra

from sjd2_lightning.cli import launch as launching
from sjd2_lightning.cli.launch import launch, objective, refuse_missing_sweeper

NUMBERS = {"nfe": 50.0, "step_compression": 5.0, "seconds_per_image": 2.0, "kid": None}
OUTCOME = {"methods": {"ar": {**NUMBERS, "nfe": 1.0}, "sjd2": NUMBERS}}


def test_the_number_is_of_the_first_method_beside_the_baseline():
    assert objective(OUTCOME, "tokens_per_second") == 125
    assert objective(OUTCOME, "nfe") == 50
    assert objective({"methods": {"ar": NUMBERS}}, "nfe") == 50
    assert objective(OUTCOME, None) != objective(OUTCOME, None), "nothing to tune"
    for name in ("kid", "speed"):
        with pytest.raises(ValueError, match=f"optimized_metric={name}: no such number; use tokens"):
            objective(OUTCOME, name)


def test_a_missing_package_and_a_missing_m_are_one_line(monkeypatch):
    monkeypatch.setattr(launching.importlib.util, "find_spec", lambda name: None)
    refuse_missing_sweeper(["num_prompts=1"])
    with pytest.raises(ValueError, match=r"pip install 'sjd2-lightning\[optuna\]'"):
        refuse_missing_sweeper(["-m", "hparams_search=optuna"])
    monkeypatch.setattr(launching.importlib.util, "find_spec", lambda name: name)
    with pytest.raises(ValueError, match="add -m"):
        refuse_missing_sweeper(["hparams_search=optuna"])


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("optuna") is None, reason="needs the extra optuna")
def test_optuna_finds_the_window_of_most_tokens_a_second(tmp_path, monkeypatch):
    """With a job whose best window and levels are known."""

    def job(cfg):
        (Path(cfg.run_dir) / "result").touch()  # a run that wrote nothing leaves no folder
        seconds = 1 + abs(cfg.methods.sjd2.window - 48) + cfg.methods.sjd2.num_levels
        return {"methods": {"sjd2": {**NUMBERS, "seconds_per_image": float(seconds)}}}

    monkeypatch.chdir(tmp_path)
    words = ["-m", "hparams_search=optuna", "run_dir=tune", "hydra.sweeper.n_trials=5", "logger=none"]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *words])
    GlobalHydra.instance().clear()
    launch("evaluate", job)
    GlobalHydra.instance().clear()
    found = yaml.safe_load((tmp_path / "tune" / "optimization_results.yaml").read_text())
    tried = [json.loads(path.read_text())["overrides"] for path in (tmp_path / "tune").glob("*/job.json")]
    values = [dict(text.split("=") for text in overrides) for overrides in tried]
    seconds = [1 + abs(int(v["decoding.window"]) - 48) + int(v["decoding.num_levels"]) for v in values]
    assert len(seconds) == 5
    assert found["best_value"] == pytest.approx(250 / min(seconds))
    best = values[seconds.index(min(seconds))]
    assert found["best_params"] == {key: int(best[key]) for key in found["best_params"]}
