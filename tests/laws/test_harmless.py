"""Logging never ends a run: a full disk, an unwritable cache and a broken W&B are said once."""

import json
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from sjd2_lightning import callbacks
from sjd2_lightning.cli.evaluate import evaluate
from sjd2_lightning.cli.launch import refusal
from sjd2_lightning.cli.train import train
from sjd2_lightning.config.reading import conf_dir
from sjd2_lightning.report import wandb_log
from sjd2_lightning.run import harmless
from sjd2_lightning.run.files import write_whole
from tests.report.test_wandb_log import Broken
from tests.tools.training_runs import SETTINGS, make_folder, places


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_folder(tmp_path_factory.mktemp("harmless"))


@pytest.fixture
def composed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(harmless, "_said", set())

    def compose_here(root: str, *overrides: str):
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            return compose(root, list(overrides))

    return compose_here


def full(*_, **__):
    raise OSError(28, "No space left on device")


def said(caplog) -> list[str]:
    """What failed, by the warnings of the guard."""
    lines = [r.getMessage() for r in caplog.records if r.name == harmless.__name__ and r.levelno >= 30]
    return [line.partition(" failed;")[0] for line in lines]


def test_training_goes_on(folder, tmp_path, composed, monkeypatch, caplog):
    monkeypatch.setattr(wandb_log.wandb, "init", lambda **settings: Broken())
    monkeypatch.setattr(ExperimentWriter, "save", full)
    monkeypatch.setattr(callbacks, "_append_csv", full)
    dropped = ("logger", "callbacks=", "validate_first")
    small = [word for word in SETTINGS if not word.startswith(dropped)]
    small += ["trainer.max_steps=2", "callbacks.sampling.num_prompts=2", "compare=[ar]"]
    small += ["trainer.val_check_interval=1", "trainer.log_every_n_steps=1"]
    metrics = train(composed("train", *places(folder, tmp_path / "run"), *small))
    assert metrics["val/nfe"] > 0
    assert (tmp_path / "run" / "model" / "backbone.json").is_file()
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").is_file()
    assert sorted(said(caplog)) == sorted(
        [
            "writing csv/*/metrics.csv",
            f"writing {tmp_path / 'run' / 'samples'}",
            f"starting W&B in {tmp_path / 'run'}",
            "logging to W&B",
            "logging samples by StepLogger",
            "ending the W&B run",
        ]
    )


@pytest.mark.parametrize("way", ["start", "use"])
def test_evaluation_prints_reports_and_exports(folder, tmp_path, composed, monkeypatch, caplog, capsys, way):
    monkeypatch.setattr(wandb_log.wandb, "init", full if way == "start" else lambda **settings: Broken())
    (tmp_path / "m.jsonl").write_text('{"tag": "colors", "prompt": "red heart"}\n')
    small = ["metrics=none", "compare=[sjd]", "warm_up=false", "report.num_trajectories=0"]
    small += ["benchmark=geneval", "benchmark_prompts=m.jsonl", "samples_per_prompt=4", "batch_size=4"]
    report = evaluate(composed("evaluate", *places(folder, tmp_path / "run")[::2], *small))
    assert report["methods"]["sjd"]["nfe"] > 0
    assert json.loads((tmp_path / "run" / "report.json").read_text())["methods"].keys() == {"sjd"}
    assert list((tmp_path / "run" / "geneval" / "sjd").rglob("*.png"))
    assert "page:" in capsys.readouterr().out
    place = f"W&B in {tmp_path / 'run'}"
    wanted = [f"starting {place}"]
    if way == "use":
        wanted += [f"logging to {place}", "ending the W&B run"]
    assert said(caplog) == wanted


def test_a_wrong_mode_is_refused_before_anything_is_decoded(folder, tmp_path, composed, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "onlin")
    with pytest.raises(ValueError, match="WANDB_MODE=onlin is unknown; use one of online"):
        evaluate(composed("evaluate", *places(folder, tmp_path / "run")[::2]))
    assert not (tmp_path / "run").exists()


def test_a_disk_without_room_for_results_is_one_line(small_disk):
    with pytest.raises(OSError, match="No space left") as full_disk:
        write_whole(small_disk / "report.json", bytes(2_000_000))
    line = refusal("evaluate", full_disk.value)
    assert line is not None
    assert line.endswith("what was finished is kept; make room, and start the command again")
    assert not list(small_disk.iterdir())
