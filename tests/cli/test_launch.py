"""Hostile configurations are refused by name, further ranks join their run, scale is one word."""

import json
import os
import sys
import time
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from sjd2_lightning.cli import launch as launching
from sjd2_lightning.cli.launch import SweepPace
from sjd2_lightning.cli.trainer import build_strategy, wandb_id
from sjd2_lightning.config.reading import ConfigError, conf_dir, train_config
from sjd2_lightning.run.processes import HANDED_DOWN


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Runs `launch` as the command line does; the exit status and what jobs got."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, job=None):
        seen = []
        monkeypatch.setattr(sys, "argv", ["script", *arguments])
        GlobalHydra.instance().clear()
        try:
            launching.launch("train", lambda cfg: seen.append((job or (lambda cfg: cfg))(cfg)))
        except SystemExit as end:
            return end.code, seen
        finally:
            GlobalHydra.instance().clear()
        return 0, seen

    return run


HOSTILE = {
    "os.system": "command: touch ran",
    "torch.load": "f: evil.pt",
    "torch.hub.load": "repo_or_dir: evil/repo, model: x",
    "subprocess.Popen": "args: [touch, ran]",
    "builtins.eval": "_args_: ['1']",
    "transformers.AutoModel.from_pretrained": "pretrained_model_name_or_path: x, trust_remote_code: true",
    "lightning.pytorch.callbacks.Callback": "",
}


@pytest.mark.parametrize("target", HOSTILE)
def test_hydra_itself_calls_no_name_that_is_not_listed(command, capfd, tmp_path, target):
    values = ", ".join(filter(None, [f"_target_: {target}", HOSTILE[target]]))
    status, seen = command("run_dir=out", f"+hydra.callbacks.evil={{{values}}}")
    assert (status, seen) == (2, [])
    assert f"{target}: this target is not allowed" in capfd.readouterr().err.replace("=", ": ").replace(
        f"_target_: {target}", target
    )
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("target", HOSTILE)
@pytest.mark.parametrize("key", ["data.loader.evil", "callbacks.extra"])
def test_a_configuration_with_such_a_name_is_refused_with_all_others(target, key):
    values = ", ".join(filter(None, [f"_target_: {target}", HOSTILE[target]]))
    given = f"+{key}={{{values}}}" if key != "callbacks.extra" else f"{key}=[{{{values}}}]"
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose("train", [given, "run_dir=out"])
    with pytest.raises(ConfigError, match=f"{target}'.*this target is not allowed"):
        train_config(cfg)


def test_further_ranks_take_part_in_the_run_of_a_sweep_they_belong_to(command, monkeypatch):
    """Lightning repeats the command line for them, `-m` and all."""

    def job(cfg):
        handed = json.loads(os.environ[HANDED_DOWN])
        return cfg.run_dir, cfg.seed, handed

    status, seen = command("-m", "seed=1,2", "run_dir=sweep", job=job)
    assert status == 0
    assert [(folder, seed) for folder, seed, _ in seen] == [("sweep/0", 1), ("sweep/1", 2)]
    assert HANDED_DOWN not in os.environ
    monkeypatch.setenv(HANDED_DOWN, json.dumps(seen[1][2]))
    monkeypatch.setenv("LOCAL_RANK", "1")
    (further,) = command("-m", "seed=1,2", "run_dir=sweep", "hydra.run.dir=elsewhere", job=job)[1]
    assert further[:2] == ("sweep/1", 2)
    assert not Path("elsewhere").exists()


def test_a_sweeps_next_run_does_not_find_the_ranks_of_the_last(command, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)

    def job(cfg):
        assert "LOCAL_RANK" not in os.environ
        os.environ["LOCAL_RANK"] = "0"  # as Lightning's launcher leaves it

    status, seen = command("-m", "seed=1,2", "run_dir=sweep", job=job)
    assert (status, len(seen)) == (0, 2)
    assert "LOCAL_RANK" not in os.environ


def composed(*overrides: str):
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return train_config(compose("train", ["run_dir=out", *overrides]))


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["callbacks.ema_decay=0.9"], "callbacks.ema_decay: needs whole weights"),
        (["optimizer=muon"], "optimizer.name=muon: needs whole matrices"),
        (["trainer.max_time=90"], "trainer.max_time"),
        (["trainer.precision=16-mixed"], "precision=16-mixed: FSDP2 has no gradient scaler"),
    ],
)
def test_what_does_not_go_with_sharded_weights_is_said_first(overrides, expected):
    with pytest.raises(ConfigError, match=expected):
        composed("trainer=fsdp", *overrides)


def test_scale_is_one_word(monkeypatch):
    for word, strategy in {"cpu": "auto", "gpu": "auto", "ddp": "ddp", "fsdp": "fsdp"}.items():
        assert composed(f"trainer={word}").trainer.strategy == strategy
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="the package deepspeed is not installed; `pip install"):
        build_strategy(composed("trainer=deepspeed"), None)
    with pytest.raises(ValueError, match=r"use trainer\.strategy=ddp"):
        build_strategy(composed("trainer=fsdp"), None)


def test_going_on_continues_the_run_of_wandb_and_a_new_start_is_a_new_run(tmp_path):
    first = wandb_id(tmp_path, None)
    assert wandb_id(tmp_path, "auto") == first
    assert wandb_id(tmp_path, None) != first


def test_no_secret_is_written(tmp_path, monkeypatch):
    from sjd2_lightning.config.reading import save_config

    monkeypatch.setenv("MY_API_KEY", "abcdefgh12345678")
    save_config(composed("logger.wandb.name=${oc.env:MY_API_KEY}"), tmp_path / "train.yaml")
    assert "abcdefgh12345678" not in (tmp_path / "train.yaml").read_text()
    assert "<redacted>" in (tmp_path / "train.yaml").read_text()


def test_a_sweep_says_how_much_time_is_left():
    pace = SweepPace(os.getpid(), 3, time.perf_counter() - 100)
    assert pace.after_one_more() == "run 1 of 3 has ended; about 3 min left"
    assert pace.after_one_more() == "run 2 of 3 has ended; about 50 s left"
    assert pace.after_one_more() == ""
    assert SweepPace(os.getpid(), 3, time.perf_counter() - 1).after_one_more() == "", "a quick one"
