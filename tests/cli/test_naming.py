"""Names, groups and tags of W&B runs."""

import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from sjd2_lightning.cli.naming import SWEPT, name_run, run_name, swept_keys


def test_keys_that_a_command_line_sweeps():
    words = ["decoding.window=16,32", "seed=range(0,3)", "run_dir=x", "compare=[ar,sjd2]", "noise=glob(*)"]
    assert swept_keys(words, ["optimizer.lr"]) == ["decoding.window", "seed", "noise", "optimizer.lr"]


@pytest.mark.parametrize(
    ("overrides", "swept", "name"),
    [
        (["decoding.window=16", "decoding.num_levels=4", "run_dir=x"], [], "window=16 num_levels=4"),
        (["decoding.window=16", "num_prompts=8"], ["decoding.window"], "window=16"),
        (
            ["methods.sjd.window=16", "methods.sjd2.window=8"],
            [],
            "methods.sjd.window=16 methods.sjd2.window=8",
        ),
        (["experiment=demo", "+trainer.x=1"], [], "demo x=1"),
        (["logger=wandb", "logger.wandb.mode=online", "hydra.run.dir=y"], [], "2026-11-28"),
        ([f"decoding.window={'1' * 200}"], [], f"window={'1' * 121}"),
    ],
)
def test_a_run_is_called_by_what_it_varies(overrides, swept, name):
    assert run_name(overrides, swept, "2026-11-28") == name


def config(**wandb):
    return OmegaConf.create({"logger": {"wandb": {"name": None, "group": None, "tags": ["mine"], **wandb}}})


def test_the_runs_of_a_sweep_share_a_group(monkeypatch):
    monkeypatch.setenv(SWEPT, json.dumps(["seed"]))
    cfg = config()
    name_run(cfg, ["seed=1", "num_prompts=2"], Path("outputs/sweep/0"), "demo", True)
    assert cfg.logger.wandb == {"name": "seed=1", "group": "sweep", "tags": ["mine", "sweep", "demo"]}
    cfg = config()
    name_run(cfg, ["seed=1", "num_prompts=2"], Path("outputs/one"), None, False)
    assert cfg.logger.wandb == {"name": "seed=1 num_prompts=2", "group": None, "tags": ["mine"]}
    cfg = config(name="blue", group="ours")
    name_run(cfg, [], Path("outputs/sweep/0"), None, True)
    assert (cfg.logger.wandb.name, cfg.logger.wandb.group) == ("blue", "ours")
    name_run(OmegaConf.create({"logger": {"wandb": None}}), [], Path("x"), None, True)
