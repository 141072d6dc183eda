"""The two commands: fit, resume, export, measure, sweep, and say clearly what is wrong."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir

from sjd2_lightning.cli import build as building
from sjd2_lightning.cli import trainer as monitoring
from sjd2_lightning.cli.evaluate import evaluate, weights_folder
from sjd2_lightning.cli.evaluate import main as evaluate_main
from sjd2_lightning.cli.train import main as train_main
from sjd2_lightning.cli.train import resume_path, train
from sjd2_lightning.config.groups import WandbConfig
from sjd2_lightning.config.reading import conf_dir, evaluate_config
from tests.evaluation.test_references import tiny_coco
from tests.tools.source import REPO
from tests.tools.wandb_files import offline_run

# A model of random weights and a handful of pictures: what is tested here is that the parts meet.
SMALL = ("metrics=none", "data.views=1", "data.max_images=8", "data.batch_size=2", "data.val_batch_size=4")
QUIET = (
    "callbacks=none",
    "callbacks.progress_bar=null",
    "logger=none",
    "trainer=cpu",
    "validate_first=false",
)


@pytest.fixture
def composed(tiny_folder, tmp_path, monkeypatch):
    """Composes a root for the small model; its run lies in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def compose_small(root: str, *overrides: str):
        places = [f"model.path={tiny_folder / 'model'}", f"data.data_dir={tiny_folder / 'data'}"]
        places.append(f"run_dir={tmp_path / 'run'}")
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            return compose(root, [*places, *SMALL, *overrides])

    return compose_small


def test_fine_tuning_trains_exports_and_records(composed, tmp_path):
    metrics = train(
        composed(
            "train",
            "trainer=cpu",
            "trainer.max_steps=2",
            "trainer.val_check_interval=2",
            "trainer.limit_val_batches=1",
            "trainer.log_every_n_steps=1",
            "callbacks.progress_bar=null",
            "callbacks.sampling.num_prompts=1",
            "logger.wandb.mode=offline",
            "decoding.window=64",
        )
    )
    assert {"train/loss", "val/loss_clean", "val/loss_high", "val/nfe", "start/val/loss_clean"} <= set(
        metrics
    )
    assert all(isinstance(value, float) for value in metrics.values())
    run = tmp_path / "run"
    for name in (
        "csv/version_0/metrics.csv",
        "checkpoints/last.ckpt",
        "model/README.md",
        "model/trainings.json",
        "samples/metrics.jsonl",
    ):
        assert (run / name).is_file(), name
    assert yaml.safe_load((run / "train.yaml").read_text())["methods"]["sjd2"]["window"] == 64
    # a validation is one row, nothing is dropped
    *_, last = (row for row in offline_run(run)[0] if "val/nfe" in row)
    assert last["val/loss_clean"] == pytest.approx(metrics["val/loss_clean"], rel=1e-5)
    assert last["trainer/global_step"] == 2
    assert any(isinstance(value, dict) and value.get("_type") == "image-file" for value in last.values())
    assert "val/loss_clean" in (run / "csv/version_0/metrics.csv").read_text()

    report = evaluate(
        composed("evaluate", f"weights={run / 'model'}", "num_prompts=1", "compare=[ar]", "logger=none")
    )
    assert report["methods"]["ar"]["num_images"] == 1


def test_resuming_goes_on_where_training_stopped(composed, tmp_path):
    overrides = ["trainer=cpu", "logger=none", "callbacks=no_sampling", "callbacks.progress_bar=null"]
    overrides += ["validate_first=false", "trainer.val_check_interval=1", "trainer.limit_val_batches=1"]
    train(composed("train", *overrides, "trainer.max_steps=2", "noise=off"))
    first = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert resume_path("auto", tmp_path / "run") == first
    train(composed("train", *overrides, "trainer.max_steps=3", "noise=off", "ckpt_path=auto"))

    state = torch.load(first, weights_only=True)
    assert state["global_step"] == 3
    report = evaluate(
        composed(
            "evaluate",
            f"ckpt_path={first}",
            "num_prompts=1",
            "compare=[ar]",
            "logger=none",
            "run_dir=measured",
        )
    )
    assert report["provenance"]["weights"] == str(first)


def test_the_checkpoint_to_go_on_from(tmp_path):
    assert resume_path(None, tmp_path / "new") is None
    assert resume_path("auto", tmp_path / "new") is None
    with pytest.raises(ValueError, match="ckpt_path=last: no run in"):
        resume_path("last", tmp_path / "new")
    for age, name in enumerate(("old", "older")):
        path = tmp_path / name / "checkpoints" / "last.ckpt"
        path.parent.mkdir(parents=True)
        torch.save({"state_dict": {}, "global_step": 0}, path)
        os.utime(path, (1000 - age, 1000 - age))
    assert resume_path("last", tmp_path / "new") == tmp_path / "old" / "checkpoints" / "last.ckpt"
    assert resume_path("last", tmp_path / "older") == tmp_path / "older" / "checkpoints" / "last.ckpt"
    assert resume_path("auto", tmp_path / "new") is None


@pytest.mark.parametrize(
    "overrides",
    [
        ["noise=off"],
        ["noise.process.schedule=karras", "trainer.accumulate_grad_batches=2"],
        ["optimizer.freeze=[model.model.embed_tokens]", "callbacks.ema_decay=0.9"],
        ["callbacks.extra=[{_target_: lightning.pytorch.callbacks.Timer}]", "logger=csv"],
    ],
    ids=lambda overrides: overrides[0],
)
def test_a_step_of_fine_tuning(composed, overrides):
    metrics = train(composed("train", *QUIET, *overrides, "trainer.fast_dev_run=true"))
    assert metrics["train/loss"] > 0


@pytest.mark.parametrize("experiment", ["tiny_base", "tiny_clip", "tarflow", "pccot", "ceed_teacher"])
def test_a_step_of_each_recipe(composed, tiny_folder, experiment):
    own = {
        "tiny_base": [
            f"model.scratch.image_tokenizer={tiny_folder / 'model' / 'tokenizer'}",
            "model.scratch.hidden_size=16",
            "model.scratch.intermediate_size=16",
            "model.scratch.num_layers=1",
            "callbacks=none",
        ],
        "tiny_clip": [
            f"clip.text_dir={tiny_folder / 'model' / 'text'}",
            "clip.vision_layers=1",
            "clip.text_layers=1",
            "callbacks=none",
        ],
        "tarflow": [f"tarflow.clip_dir={REPO / 'weights' / 'tiny' / 'clip'}", "tarflow.sizes.width=32"],
        "pccot": ["pccot.model.width=16", "pccot.num_held_out=4"],
        "ceed_teacher": ["ceed.num_demonstrations=3"],
    }[experiment]
    shipped = Path("weights")
    metrics = train(
        composed("train", f"experiment={experiment}", *QUIET[1:], *own, "trainer.fast_dev_run=true")
    )
    assert metrics["train/loss"] > 0
    assert not shipped.exists(), "a trial run leaves the shipped weights alone"


def test_images_too_long_for_a_model_are_refused_before_shards_are_made(composed, tiny_folder):
    own = ["hidden_size=16", "intermediate_size=16", "num_layers=1", "num_positions=16"]
    own.append(f"image_tokenizer={tiny_folder / 'model' / 'tokenizer'}")
    scratch = [f"model.scratch.{key}" for key in own]
    config = composed("train", "experiment=tiny_base", *QUIET[1:], *scratch, "data.data_dir=new")
    with pytest.raises(ValueError, match=r"the model has 16 positions; set a smaller model\.image_size"):
        train(config)
    assert not Path("new").exists()


def test_a_sweep_of_fine_tuning(command, tiny_folder, tmp_path):
    places = [f"model.path={tiny_folder / 'model'}", f"data.data_dir={tiny_folder / 'data'}", "run_dir=sweep"]
    status = command(
        train_main,
        "-m",
        "decoding.window=32,64",
        "decoding.num_levels=1",
        "trainer.fast_dev_run=true",
        *places,
        *SMALL,
        "callbacks.progress_bar=null",
        "validate_first=false",
    )
    assert status == 0
    windows = [
        yaml.safe_load((tmp_path / "sweep" / job / "train.yaml").read_text())["methods"]["sjd2"]["window"]
        for job in ("0", "1")
    ]
    assert windows == [32, 64]


def test_a_sweep_ends_in_one_report_and_lists_what_failed(command, tiny_folder, tmp_path, monkeypatch):
    loaded, build = [], building.build_backbone
    monkeypatch.setattr(building, "build_backbone", lambda *args: (loaded.append(args), build(*args))[1])
    building._kept_backbone.cache_clear()
    broken = tmp_path / "sweep" / "4"
    broken.mkdir(parents=True)
    (broken / "images").write_text("a file where the folder of images should be")
    status = command(
        evaluate_main,
        "-m",
        "decoding.window=4,16,32",
        "decoding.num_levels=0,1,2",
        f"model.path={tiny_folder / 'model'}",
        "run_dir=sweep",
        "metrics=none",
        "num_prompts=1",
        "warm_up=false",
        "compare=[ar,sjd2]",
        "logger=none",
    )
    assert status == 0
    lines = list(csv.DictReader((tmp_path / "sweep" / "sweep.csv").read_text().splitlines()))
    assert [line["job"] for line in lines if line["error"]] == ["4"]
    assert len({line["job"] for line in lines}) == 9
    assert {(line["window"], line["num_levels"]) for line in lines if line["method"] == "sjd2"} == {
        (window, levels) for window in ("4", "16", "32") for levels in "012"
    } - {("16", "1")}
    assert "decoding.window=16 decoding.num_levels=1" in (tmp_path / "sweep" / "sweep.html").read_text()
    assert (tmp_path / "sweep" / "figures" / "sweep_step_compression.png").is_file()
    assert (tmp_path / "sweep" / "figures" / "sweep_seconds_per_image.png").is_file()
    assert len(loaded) == 1, "the backbone is loaded once a process"


@pytest.mark.slow
def test_a_sweep_in_several_processes(tiny_folder, tmp_path):
    broken = tmp_path / "sweep" / "1"
    broken.mkdir(parents=True)
    (broken / "images").write_text("a file where the folder of images should be")
    command = [sys.executable, str(REPO / "evaluate.py"), "-m", "hydra/launcher=joblib"]
    command += ["hydra.launcher.n_jobs=2", "decoding.window=4,16", "decoding.num_levels=1,2"]
    command += [f"model.path={tiny_folder / 'model'}", "run_dir=sweep", "metrics=none", "num_prompts=1"]
    command += ["warm_up=false", "compare=[ar,sjd2]", "logger=none"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert ran.returncode == 0, ran.stderr
    lines = list(csv.DictReader((tmp_path / "sweep" / "sweep.csv").read_text().splitlines()))
    assert {line["job"] for line in lines} == set("0123")
    assert [line["job"] for line in lines if line["error"]] == ["1"]


def test_evaluation_writes_what_it_returns(command, tiny_folder, tmp_path):
    status = command(
        evaluate_main,
        f"model.path={tiny_folder / 'model'}",
        "run_dir=out",
        "metrics=none",
        "num_prompts=2",
        "batch_size=2",
        "decoding.window=64",
        "compare=[ar,sjd,mc_sjd,sjd2,sjd2_paper]",
        "logger=none",
    )
    assert status == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert list(report["methods"]) == ["ar", "sjd", "mc_sjd", "sjd2", "sjd2_paper"]
    assert report["methods"]["sjd2"]["nfe"] < report["methods"]["ar"]["nfe"] == 271
    assert report["provenance"]["weights"] == str(tiny_folder / "model")
    assert len(list((tmp_path / "out" / "images" / "sjd2").glob("*.png"))) == 2


def test_prompts_of_a_benchmark_end_in_its_folders(command, tiny_folder, tmp_path):
    (tmp_path / "m.jsonl").write_text('{"tag": "colors", "prompt": "red heart"}\n')
    settings = [f"model.path={tiny_folder / 'model'}", "metrics=none", "compare=[sjd]", "logger=none"]
    settings += ["run_dir=out", "benchmark=geneval", "benchmark_prompts=m.jsonl", "samples_per_prompt=4"]
    assert command(evaluate_main, *settings, "batch_size=4", "warm_up=false") == 0
    found = sorted(p.relative_to(tmp_path / "out/geneval") for p in (tmp_path / "out/geneval").rglob("*.*"))
    assert [str(path) for path in found] == [
        "sjd/00000/metadata.jsonl", *(f"sjd/00000/samples/000{n}.png" for n in range(4))
    ]  # fmt: skip


def test_coco_is_read_from_a_folder(tmp_path, composed):
    protocol = tiny_coco(tmp_path / "data" / "coco")
    config = evaluate_config(
        composed(
            "evaluate",
            "metrics=coco2017_5k",
            "metrics.features=[EffNetLite0]",
            "metrics.clip=null",
            "metrics.protocol.num_images=3",
        )
    )
    assert Path(config.metrics.protocol.images).resolve() == protocol.images
    prompts, reference = building.build_prompts(config, config.num_prompts), building.build_reference(config)
    assert tuple(item.key for item in prompts) == reference.keys
    assert (reference.name, reference.num_prompts, len(prompts)) == ("coco2017_5k", 3, 3)


@pytest.mark.parametrize(
    ("text", "expected"), [("red\n\nblue", "'prompt-00001' is empty"), ("red\nred", "'red' occurs 2 times")]
)
def test_unusable_prompts_leave_nothing_behind(command, tiny_folder, tmp_path, capfd, text, expected):
    (tmp_path / "prompts.txt").write_text(text)
    settings = ["data.prompt_file=prompts.txt", f"model.path={tiny_folder / 'model'}", "metrics=none"]
    assert command(evaluate_main, *settings, "run_dir=bad") == 2
    assert expected in capfd.readouterr().err
    assert not (tmp_path / "bad").exists()


def test_wandb_mode_of_the_environment_wins(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(monitoring.wandb_log, "start_run", lambda mode, settings: asked.append(mode))
    wanted = WandbConfig(mode="online", project="p", entity=None, name=None, group=None, tags=())
    monitoring.start_wandb(wanted, tmp_path, {}, "id")
    monkeypatch.delenv("WANDB_MODE")
    monitoring.start_wandb(wanted, tmp_path, {}, "id")
    assert asked == ["offline", "online"]
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert monitoring.start_wandb(wanted, tmp_path, {}, "id") is None
    monkeypatch.setenv("WANDB_MODE", "onlin")
    with pytest.raises(ValueError, match="WANDB_MODE=onlin is unknown"):
        monitoring.start_wandb(wanted, tmp_path, {}, "id")


def test_which_weights_are_measured(composed, tmp_path):
    def chosen(*overrides: str) -> Path:
        return weights_folder(evaluate_config(composed("evaluate", *overrides)))

    for number, run in enumerate(("a", "b")):
        export = tmp_path / "outputs" / "train" / run / "model" / "backbone.json"
        export.parent.mkdir(parents=True)
        export.touch()

        os.utime(export, (1000 - number, 1000 - number))
    own = evaluate_config(composed("evaluate")).model.path
    assert chosen() == Path(own), "another model than the shipped one is measured as it is"
    shipped = tmp_path / "weights" / "tiny" / "backbone.json"
    shipped.parent.mkdir(parents=True)
    shipped.touch()
    assert chosen("model.path=weights/tiny") == Path("outputs/train/a/model")
    assert chosen("model.path=weights/tiny", "weights=model") == Path("weights/tiny")
    assert chosen("weights=outputs/train/b/model") == Path("outputs/train/b/model")


@pytest.mark.parametrize(
    ("main", "arguments", "expected"),
    [
        (
            train_main,
            ["trainer.max_stps=1"],
            "trainer.max_stps: unknown key; did you mean `trainer.max_steps`",
        ),
        (train_main, ["model=tini"], "model=tini: no such choice; did you mean `tiny`?"),
        (train_main, ["ckpt_path=gone.ckpt", "decoding.window=0"], "has 2 problems"),
        (train_main, ["ckpt_path=last"], "ckpt_path=last: no run in"),
        (evaluate_main, ["decoding.window=abc"], "decoding.window='abc': must be a whole number"),
        (evaluate_main, ["compare=[ar,sdj]"], "unknown method 'sdj'; did you mean `sjd`?"),
        (evaluate_main, ["num_prompts=100000"], "ask for 1 to 10000 scenes"),
        (evaluate_main, ["optimizer.lr=1"], "optimizer.lr: unknown key"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_mistakes_end_in_one_message(command, tiny_folder, capfd, main, arguments, expected):
    places = [f"model.path={tiny_folder / 'model'}", "metrics.clip=null", "run_dir=bad"]
    assert command(main, *places, *arguments) == 2
    shown = capfd.readouterr().err
    assert expected in shown
    assert "Traceback" not in shown
    assert not Path("bad").exists()
