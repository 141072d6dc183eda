"""Nothing that takes long is silent: while it goes on, a stage is open, which speaks every few seconds."""

import json
import sys
from pathlib import Path

import lightning as L
import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from PIL import Image

from sjd2_lightning import __main__ as table
from sjd2_lightning import callbacks
from sjd2_lightning.cli import build, pairs, prepare, scorers, teacher
from sjd2_lightning.cli import evaluate as evaluation
from sjd2_lightning.cli import train as training
from sjd2_lightning.config.reading import conf_dir
from sjd2_lightning.data import ensure
from sjd2_lightning.evaluation import compare
from sjd2_lightning.models import convert, registry
from sjd2_lightning.report import wandb_report, write
from sjd2_lightning.run import stages
from tests.tools.training_runs import SETTINGS, make_folder, places


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_folder(tmp_path_factory.mktemp("silence"))


@pytest.fixture
def watch(monkeypatch):
    """Wraps functions; what was called, and which calls came while no stage was open."""
    called, silent = [], []

    def wrap(owner, *names: str, instead: object = None) -> None:
        for name in names:
            real = getattr(owner, name)

            def wrapped(*args, real=real, name=name, **kwargs):
                called.append(name)
                if not stages._open:
                    silent.append(name)
                return instead if instead is not None else real(*args, **kwargs)

            monkeypatch.setattr(owner, name, wrapped)

    return wrap, called, silent


def check(watch, *names: str) -> None:
    _, called, silent = watch
    assert set(names) <= set(called)
    assert not silent


def composed(root: str, *overrides: str):
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose(root, list(overrides))


def test_training(folder, tmp_path, watch, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wrap, _, _ = watch
    wrap(build, "load_backbone")
    wrap(scorers, "load_clip_scorer")
    wrap(L.Trainer, "validate", "fit", "save_checkpoint")
    wrap(training, "resume_path")
    wrap(callbacks, "decode_methods", "QualityMeter", "measure_methods", "save_figure")
    wrap(ensure, "make_shard")
    small = [word for word in SETTINGS if not word.startswith(("metrics", "callbacks=", "validate_first"))]
    small += [
        "trainer.max_steps=1",
        "callbacks.sampling.num_prompts=1",
        "compare=[ar]",
        "metrics.features=[]",
    ]
    training.train(composed("train", *places(folder, tmp_path / "run"), *small))
    names = ("load_backbone", "load_clip_scorer", "validate", "fit", "decode_methods", "measure_methods")
    check(watch, *names, "make_shard", "save_checkpoint", "save_figure")


def test_evaluation(folder, tmp_path, watch, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wrap, _, _ = watch
    wrap(build, "load_backbone", "build_reference")
    wrap(scorers, "load_clip_scorer")
    wrap(compare, "QualityMeter", "decode_jobs", "measure_methods", "decoding_flops")
    wrap(write, "write_report")
    wrap(evaluation, "export", "publish", "chosen_prompts")
    small = ["num_prompts=2", "compare=[ar,sjd2]", "metrics.features=[]", "logger=none", "warm_up=false"]
    evaluation.evaluate(composed("evaluate", *places(folder, tmp_path / "run")[::2], *small))
    names = ("load_backbone", "load_clip_scorer", "QualityMeter", "decode_jobs", "measure_methods", "export")
    check(watch, *names, "write_report", "publish")


def photos(place: Path) -> Path:
    """A folder of captioned pictures."""
    place.mkdir()
    rng = np.random.default_rng(0)
    for number in range(4):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(place / f"{number}.png")
        (place / f"{number}.txt").write_text(f"picture {number}")
    return place


def test_the_other_commands(folder, tmp_path, watch, monkeypatch):
    wrap, _, _ = watch
    wrap(table.importlib, "import_module")
    wrap(prepare, "load_coder", "list_records")
    wrap(ensure, "make_shard", "start_build")
    wrap(teacher, "real_images", "drawn_samples", "sha256_of_file")
    monkeypatch.setattr(teacher, "load_backbone", registry.load_backbone)
    wrap(teacher, "load_backbone")
    wrap(pairs, "read_all")
    wrap(convert, "convert", instead=["a file"])
    wrap(wandb_report, "publish_report", instead="https://example.org")
    tokenizer = ["--tokenizer", str(folder / "tokenizer"), "--size", "32", "--workers", "0"]
    source = ["--input", str(photos(tmp_path / "photos")), "--val-share", "0.5"]
    out = str(tmp_path / "shards")
    table.main(["prepare", "folder", *source, *tokenizer, "--out", out])
    table.main(["pairs", f"{out}/codes/train", str(tmp_path / "pairs.safetensors"), "--rank", "2"])
    weights = str(folder / "model")
    table.main(["teacher", f"{out}/codes", str(tmp_path / "drawn"), "--weights", weights])
    table.main(["convert", "--trunk", "a", "--vqgan", "b", "--out", "c"])
    table.main(["wandb", "d"])
    names = ("import_module", "load_coder", "list_records", "start_build", "make_shard", "real_images")
    check(watch, *names, "drawn_samples", "load_backbone", "read_all", "convert", "publish_report")
    assert json.loads((tmp_path / "drawn" / "train" / "index.json").read_text())
    assert sys.modules["sjd2_lightning.cli.prepare"] is prepare
