"""Sampling during validation: what it logs, when, with which weights, and that it leaves no trace."""

import csv
import json
from dataclasses import replace

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from torch.utils.data import DataLoader

from sjd2_lightning import callbacks
from sjd2_lightning.callbacks import SamplingCallback
from sjd2_lightning.decoding.config import DecodingConfig
from sjd2_lightning.evaluation import auto_window, compare, store
from sjd2_lightning.evaluation.prompts import PromptItem
from sjd2_lightning.evaluation.quality import QualityMetrics
from sjd2_lightning.run import harmless
from sjd2_lightning.run.provenance import weights_hash
from sjd2_lightning.training.resume import Retention
from tests.tools.small_evaluation import (
    METHODS,
    PROMPTS,
    SIDE,
    fake_clip,
    metrics,
    reference_set,
    small_backbone,
)
from tests.tools.wandb_files import offline_run


class Module(L.LightningModule):
    """Moves one tensor of the backbone in every step."""

    def __init__(self, lr=0.1):
        super().__init__()
        self.backbone = small_backbone()
        self.image_layout = self.backbone.layout(SIDE, SIDE)
        self.lr = lr
        self.draws = []

    def training_step(self, batch, batch_idx):
        self.draws.append((float(torch.rand(())), float(np.random.rand())))  # noqa: NPY002
        return self.backbone.model.lm_head.weight.square().sum()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD([self.backbone.model.lm_head.weight], lr=self.lr)


def sampling(folder, **changes):
    settings = {"prompts": PROMPTS[:3], "methods": {name: METHODS[name] for name in ("ar", "sjd2")}}
    settings |= {"batch_size": 2, "metrics": metrics(), "reference": reference_set(), **changes}
    return SamplingCallback(out_dir=folder / "samples", **settings)


def fit(folder, module, *parts, epochs=1, **settings):
    trainer = L.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        max_epochs=epochs,
        callbacks=list(parts),
        logger=settings.pop("logger", False),
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=settings.pop("enable_checkpointing", False),
        num_sanity_val_steps=settings.pop("num_sanity_val_steps", 0),
        **settings,
    )
    L.seed_everything(0, verbose=False)
    trainer.fit(module, DataLoader(range(2)), DataLoader(range(1)))
    return trainer


def modes(module):
    return [part.training for part in module.modules()]


def lines_of(folder):
    return [json.loads(line) for line in (folder / "samples" / "metrics.jsonl").read_text().splitlines()]


def test_everything_is_logged_in_the_step_it_belongs_to(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    loggers = [CSVLogger(tmp_path / "csv"), WandbLogger(save_dir=tmp_path, project="p", offline=True)]
    trainer = fit(tmp_path, Module(), sampling(tmp_path), epochs=2, logger=loggers, num_sanity_val_steps=1)
    loggers[1].experiment.finish()
    lines = lines_of(tmp_path)
    assert [line["step"] for line in lines] == [2, 4]
    for name in (
        "nfe",
        "step_compression",
        "speedup",
        "clip_score",
        "fd_Colours",
        "kid_Colours",
        "equal_to_ar",
    ):
        assert trainer.callback_metrics[f"val/{name}"] == pytest.approx(lines[1][f"val/{name}"])
    assert lines[1]["val/equal_to_ar"] == 1
    assert lines[1]["val/nfe"] < lines[1]["val/nfe_ar"]
    assert sum(lines[1]["acceptance_counts"]["sjd2"]) == round(3 * lines[1]["val/nfe"])
    with (tmp_path / "samples" / "metrics.csv").open() as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["2", "4"]
    for name in ("grid.png", "acceptance.png", "images/ar/p0.png", "images/sjd2/p2.png"):
        assert (tmp_path / "samples" / "step_00000004" / name).is_file()
    with next((tmp_path / "csv").rglob("metrics.csv")).open() as file:
        assert any(row["val/nfe"] and row["step"] == "4" for row in csv.DictReader(file))
    rows = [row for row in offline_run(tmp_path)[0] if "val/nfe" in row]
    assert [row["trainer/global_step"] for row in rows] == [2, 4]
    for row in rows:
        assert row["val/images"]["_type"] == "image-file"
        assert row["val_acceptance/ar"]["_type"] == "histogram"
        assert {"val_ar/nfe", "val/speedup", "val/fd_Colours", "val/clip_score", "val/prompts"} <= set(row)


@pytest.mark.parametrize("what", ["write_whole", "RecordStore"])
def test_a_disk_that_is_full_for_a_while_costs_the_samples_of_that_while(tmp_path, monkeypatch, caplog, what):
    """The best checkpoint is chosen among validations that were measured; the last one is always saved."""
    place = store if what == "write_whole" else compare
    inner, module, kept = getattr(place, what), Module(), []

    def written(*arguments):
        if len(module.draws) < 5:  # steps: in two of three validations
            kept.append(sorted(path.name for path in tmp_path.glob("kept/*")))
            raise OSError(28, "No space left on device")
        return inner(*arguments)

    monkeypatch.setattr(harmless, "_said", set())
    monkeypatch.setattr(place, what, written)
    saving = Retention(tmp_path / "kept", monitor="val/nfe", save_top_k=1)
    sampled = sampling(tmp_path, metrics=None, reference=None, prompts=PROMPTS[:1])
    trainer = fit(tmp_path, module, sampled, saving, epochs=3, enable_checkpointing=True)
    assert trainer.global_step == 6
    assert kept == [[], ["last.ckpt"]]
    assert [line["step"] for line in lines_of(tmp_path)] == [6]
    assert saving.best_model_path.endswith("-step_6.ckpt")
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert [line for line in said if "No space left" in line] == [
        f"decoding samples into {tmp_path / 'samples'} failed; the run goes on without it: "
        "[Errno 28] No space left on device"
    ]


def test_training_goes_on_as_if_nothing_had_been_decoded(tmp_path):
    quiet, sampled = Module(), Module()
    fit(tmp_path, quiet, epochs=2)
    fit(tmp_path, sampled, sampling(tmp_path, metrics=None, reference=None), epochs=2)
    assert quiet.draws == sampled.draws
    assert weights_hash(quiet) == weights_hash(sampled)
    assert modes(sampled) == modes(quiet)


def test_every_nth_validation_counted_over_resumption(tmp_path):
    callback = sampling(tmp_path, every_n_validations=2, metrics=None, reference=None, prompts=PROMPTS[:1])
    fit(tmp_path, Module(), callback, epochs=3)
    assert [line["step"] for line in lines_of(tmp_path)] == [2, 6]
    resumed = sampling(tmp_path, every_n_validations=2)
    resumed.load_state_dict(callback.state_dict())
    assert resumed.state_dict() == {"num_validations": 3}


def test_averaged_weights_are_the_ones_decoded(tmp_path):
    module, seen = Module(), []
    callback = sampling(tmp_path, metrics=None, reference=None, prompts=PROMPTS[:1])

    class Look(L.Callback):
        def on_validation_epoch_end(self, trainer, pl_module):
            seen.append(weights_hash(pl_module.backbone))

    fit(tmp_path, module, Look(), callback, EMAWeightAveraging(decay=0.5))
    run = json.loads((tmp_path / "samples" / "step_00000002" / "run.json").read_text())
    assert run["identity"]["weights"] == seen[0]
    alone = Module()
    fit(tmp_path, alone)
    assert weights_hash(alone.backbone) != seen[0]
    with pytest.raises(ValueError, match="must come before the weight averaging"):
        fit(tmp_path, Module(), EMAWeightAveraging(), sampling(tmp_path))


def test_baseline_is_decoded_again_only_when_weights_change(tmp_path, monkeypatch):
    decoded = []
    real = callbacks.decode_methods

    def watched(*args, **settings):
        found = real(*args, **settings)
        lines = (args[4] / "records.jsonl").read_text().splitlines()
        decoded.append({json.loads(line)["seconds"] for line in lines if '"method": "ar"' in line})
        return found

    monkeypatch.setattr(callbacks, "decode_methods", watched)
    settings = {"metrics": None, "reference": None, "prompts": PROMPTS[:1]}
    fit(tmp_path / "a", Module(lr=0.0), sampling(tmp_path / "a", **settings), epochs=2)
    assert decoded[0] == decoded[1]
    fit(tmp_path / "b", Module(), sampling(tmp_path / "b", **settings), epochs=2)
    assert decoded[2] != decoded[3]


class FrozenBelow(Module):
    """All weights but the head's are frozen: ranks wait for the gradient of every weight that is not."""

    def __init__(self):
        super().__init__(lr=0.0)
        self.requires_grad_(False)
        self.backbone.model.lm_head.weight.requires_grad_(True)


@pytest.mark.slow
def test_ranks_share_the_prompts_and_log_the_same_numbers(tmp_path):
    fit(tmp_path / "one", FrozenBelow(), sampling(tmp_path / "one"))
    fit(tmp_path / "two", FrozenBelow(), sampling(tmp_path / "two"), strategy="ddp_fork", devices=2)
    (alone,), (shared,) = lines_of(tmp_path / "one"), lines_of(tmp_path / "two")
    clock = {name for name in alone if "speedup" in name or "second" in name}
    assert {k: v for k, v in alone.items() if k not in {*clock, "step"}} == {
        k: v for k, v in shared.items() if k not in {*clock, "step"}
    }
    (folder,) = (tmp_path / "two" / "samples").glob("step_*")
    lines = [len(path.read_text().splitlines()) for path in sorted(folder.glob("records*.jsonl"))]
    assert len(lines) == 2
    assert sum(lines) == 2 * 3  # two methods, three prompts, none twice


def test_a_trial_run_decodes_one_prompt(tmp_path):
    fit(tmp_path, Module(), sampling(tmp_path, metrics=None, reference=None), fast_dev_run=True)
    assert [line["num_images"] for line in lines_of(tmp_path)] == [1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": [PromptItem("a", "", 0)]}, "'a' is empty"),
        ({"methods": {}}, "there are no methods"),
        ({"methods": {"x": DecodingConfig("sjd", window=0)}}, "window=0: must be at least 1"),
        ({"every_n_validations": 0}, "every_n_validations is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
    ids=["prompt", "methods", "method", "every_n", "batch"],
)
def test_bad_arguments_are_one_clear_error(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        sampling(tmp_path, **change)


def test_a_module_without_backbone_is_refused(tmp_path):
    with pytest.raises(ValueError, match="needs a module with a `backbone`"):
        sampling(tmp_path).setup(L.Trainer(logger=False), L.LightningModule(), "fit")


def test_a_chosen_window_is_logged_and_kept_over_resumption(tmp_path, monkeypatch):
    monkeypatch.setattr(auto_window, "timed", lambda call, device: (call(), 1.0))
    methods = {"ar": METHODS["ar"], "sjd2": replace(METHODS["sjd2"], window="auto")}
    asked = {"prompts": PROMPTS[:1], "methods": methods, "windows": (2, 8)}
    callback = sampling(tmp_path, metrics=None, reference=None, **asked)
    trainer = fit(tmp_path, Module(), callback)
    [line] = lines_of(tmp_path)
    window = line["windows"]["sjd2"]["window"]
    assert set(line["windows"]["sjd2"]["seconds"]) == {"2", "8"}
    assert trainer.callback_metrics["val/window_sjd2"] == line["val/window_sjd2"] == window == 8
    assert callback.methods["sjd2"].window == 8
    again = sampling(tmp_path / "again", **asked)
    again.load_state_dict(callback.state_dict())
    assert again.methods == callback.methods
    monkeypatch.setattr(callbacks, "resolve_windows", None)  # it would be called to choose again
    fit(tmp_path / "again", Module(), again)
    assert again.methods == callback.methods


def test_a_model_whose_numbers_are_not_finite_ends_the_validation(tmp_path):
    module = Module()
    with torch.no_grad():
        module.backbone.trunk.layers[0].mlp.up_proj.weight[2, 3] = torch.nan
    with pytest.raises(ValueError, match=r"not finite at slot 0.*the weight \S*up_proj"):
        fit(tmp_path, module, sampling(tmp_path))
    assert not (tmp_path / "samples" / "metrics.jsonl").exists()


def test_a_prompt_that_is_too_long_is_refused_before_training(tmp_path):
    module = Module()
    callback = sampling(tmp_path, prompts=[*PROMPTS[:2], PromptItem("long", "cat " * 240, 1)])
    with pytest.raises(ValueError, match="prompt 3 of 3, 'long', cannot be decoded"):
        fit(tmp_path, module, callback)
    assert not module.draws


def test_a_scorer_that_fails_its_controls_is_named_once_and_logs_nothing(tmp_path, caplog):
    blind = QualityMetrics(clip=fake_clip(knows=False), num_resamples=20)
    fit(tmp_path, Module(), sampling(tmp_path, metrics=blind, prompts=PROMPTS[:2]), epochs=2)
    assert not [key for line in lines_of(tmp_path) for key in line if "clip" in key]
    said = [record.getMessage() for record in caplog.records if "is not shown" in record.getMessage()]
    assert len(said) == 1
    assert said[0].startswith("clip_score_fake is not shown: its gain is")
