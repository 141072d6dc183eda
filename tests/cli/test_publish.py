"""From an export to the hub and back: the folder, the card, the upload, the download, refusals."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sjd2_lightning.cli import publish
from sjd2_lightning.cli.card import Card
from sjd2_lightning.cli.publish import export_of, write_folder
from sjd2_lightning.cli.settings import write_settings
from sjd2_lightning.models.lora import LoraSettings
from sjd2_lightning.models.registry import load_backbone
from sjd2_lightning.run.provenance import write_trainings
from tests.tools.configurations import typed
from tests.tools.hub import hub_on_this_machine
from tests.tools.source import REPO
from tests.tools.tiny_backbones import tiny_chameleon

SIZE = "model.image_size=[8,8]"


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """What a training with a low-rank adapter leaves."""
    folder = tmp_path_factory.mktemp("run") / "model"
    backbone = tiny_chameleon(num_codes=16, num_layers=1, hidden_size=16)
    backbone.add_lora(LoraSettings(rank=2))
    backbone.save(folder)
    config = typed("train", f"export_dir={folder}", SIZE, "noise=trajectory", "data.data_dir=data/photos")
    write_settings(config, Card.of(config, 30, "CC-BY 4.0, by me"))
    write_trainings(folder, [{"data": "photos", "steps": 30, "noise": {"enabled": True}}])
    (folder / "trunk" / "training_args.bin").write_bytes(b"a pickle")
    return folder


@pytest.fixture
def report(export, tmp_path):
    """As much of an evaluation's folder as the card is made of."""
    folder = tmp_path / "measured"
    (folder / "figures").mkdir(parents=True)
    (folder / "figures" / "grid.png").write_bytes(b"png")
    provenance = {"weights": str(export), "versions": {"torch": "2.14", "numpy": "2"}}
    (folder / "report.json").write_text(json.dumps({"provenance": provenance}))
    table = "| method | speedup |\n|---|---:|\n| sjd2 | 2.00 [1.90, 2.10] |"
    last = f"Prompts: 8. Weights {export} sums-1. Commit abc. CPU, 1 threads."
    text = (
        f"# Decoding methods\n\n{table}\n\n- a warning\n\n![images](figures/grid.png)\n\n## Cost\n\n{last}\n"
    )
    (folder / "report.md").write_text(text)
    return folder


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_the_folder_holds_weights_settings_and_card(export, report, tmp_path):
    out = tmp_path / "out"
    write_folder(export_of(export.parent), out, "me/mine", report, "mit")
    assert {"README.md", "settings.json", "trainings.json", "backbone.json", "figures/grid.png"} < files(out)
    assert not [name for name in files(out) if name.endswith(".bin") or name.startswith("adapter/")]
    linked = out / "trunk" / "model.safetensors"
    assert linked.samefile(export / "trunk" / "model.safetensors"), "no room on the disk"
    card = (out / "README.md").read_text()
    for text in (
        "license: mit",
        "with noisy codes",
        "30 steps on `photos`",
        'Pipeline.load("me/mine")',
        "`sjd2 evaluate weights=me/mine`",
        "| sjd2 | 2.00 [1.90, 2.10] |",
        "- a warning",
        "![images](figures/grid.png)",
        "Prompts: 8. Weights of this repository sums-1. Commit abc.",
        "Measured with torch 2.14.",
        "- `optimizer.lr=",
        "Licence: that of the base, weights/tiny, holds for these weights too. These are given under mit.",
        "Pictures: CC-BY 4.0, by me",
    ):
        assert text in card
    assert str(export) not in card, "no place of a machine"


def test_an_adapter_of_noise_goes_with_the_weights_below_it(tmp_path):
    backbone = tiny_chameleon(num_codes=16, num_layers=1, hidden_size=16)
    backbone.add_lora(LoraSettings(rank=2, noisy_only=True))
    backbone.save(tmp_path / "model")
    asked = (f"export_dir={tmp_path / 'model'}", SIZE, "model.peft=lora", "model.lora.noisy_only=true")
    config = typed("train", *asked)
    write_settings(config, Card.of(config, 30, "", noisy_only=True))
    write_folder(tmp_path / "model", tmp_path / "out", "me/mine", None)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "images are those of the base by the same seeds" in card
    assert "- `model.lora.noisy_only=True`" in card
    assert "adapter/adapter_model.safetensors" in files(tmp_path / "out")
    assert load_backbone("chameleon", tmp_path / "out").noise_gate is not None


def test_the_adapter_alone(export, tmp_path):
    out = tmp_path / "out"
    write_folder(export, out, "me/mine", None, is_adapter=True)
    assert files(out) == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "settings.json",
        "trainings.json",
    }
    card = (out / "README.md").read_text()
    assert "a low-rank adapter" in card
    assert "Nothing yet: `sjd2 evaluate` measures" in card


def test_the_base_is_named_as_the_hub_wants_it():
    config = typed("train", "model=emu3", "model.init=random_tiny")
    assert "base_model" not in Card.of(config, 1, "").text("me/mine"), "random weights are no release's"
    released = Card.of(
        config.model_copy(update={"model": config.model.model_copy(update={"init": "none"})}), 1, ""
    )
    assert "base_model: BAAI/Emu3-Gen-hf\nbase_model_relation: finetune\n" in released.text("me/mine")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e, r, o: write_folder(e, o, "mine", None), "--repo mine: must be OWNER/NAME"),
        (lambda e, r, o: write_folder(e, o, "me/mine@v1", None), "must be OWNER/NAME"),
        (lambda e, r, o: export_of(o), r"neither backbone\.json nor model/backbone\.json"),
        (lambda e, r, o: write_folder(e, r, "me/mine", None), "holds files that this command did not write"),
        (lambda e, r, o: write_folder(e, o, "me/mine", o), "there is no report of an evaluation"),
        (lambda e, r, o: _aged(r, lambda: write_folder(e, o, "me/mine", r)), "it is older than the weights"),
        (lambda e, r, o: _of_others(r, lambda: write_folder(e, o, "me/mine", r)), "of the weights elsewhere"),
        (lambda e, r, o: write_folder(Path("weights/tiny"), o, "me/mine", None), "an older version exported"),
        (
            lambda e, r, o: write_folder(Path("weights/tiny"), o, "me/mine", None, is_adapter=True),
            r"--adapter: there is none in weights/tiny/adapter; train one with model\.peft=lora",
        ),
    ],
)
def test_what_cannot_be_published_is_named(export, report, tmp_path, change, message):
    before = files(export)
    with pytest.raises(ValueError, match=message):
        change(export, report, tmp_path / "out")
    assert files(export) == before


def _aged(report, then):
    os.utime(report / "report.json", (1, 1))
    then()


def _of_others(report, then):
    found = json.loads((report / "report.json").read_text())
    found["provenance"]["weights"] = "elsewhere"
    (report / "report.json").write_text(json.dumps(found))
    then()


def test_a_dry_run_uploads_nothing(export, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(publish, "upload", None)
    publish.main([str(export), "--repo", "me/mine", "--dry-run", "--folder", str(tmp_path / "out")])
    assert "nothing was uploaded" in capsys.readouterr().out
    assert (tmp_path / "out" / "README.md").is_file()


def sjd2(folder: Path, hub: str, *words: str) -> subprocess.CompletedProcess:
    """A command in an empty folder, with a hub on this machine: its address is read when Python starts."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub,
        "HF_HOME": str(folder / "home"),
        "HF_TOKEN": "hf_none",
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "PYTHONPATH": str(REPO),
    }
    command = [sys.executable, "-m", "sjd2_lightning", *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)


def test_to_the_hub_and_back(export, tmp_path):
    """A refused upload loses nothing; the same command again succeeds; an evaluation needs the name alone."""
    with hub_on_this_machine() as (hub, address):
        words = ("publish", str(export.parent), "--repo", "me/mine")
        for hub.refuse in ("/lfs/", "/commit/"):
            refused = sjd2(tmp_path, address, *words)
            assert refused.returncode == 2
            assert "Traceback" not in refused.stderr
            assert re.search(
                r"--repo me/mine: the upload failed .*Nothing is lost: .* is in outputs/publish/",
                refused.stderr,
            )
            assert not hub.commits
        hub.refuse = ""
        sent = sjd2(tmp_path, address, *words)
        assert sent.returncode == 0, sent.stderr
        commit = hub.commits["me/mine"]
        assert sent.stdout.strip().endswith(f"/me/mine/commit/{commit}")
        assert set(hub.files["me/mine"]) == files(tmp_path / "outputs" / "publish" / "me--mine")
        run = (
            "compare=[ar,sjd2]",
            "num_prompts=2",
            "metrics=none",
            "logger=none",
            "device=cpu",
            "run_dir=out",
        )
        done = sjd2(tmp_path, address, "evaluate", "model=tiny", "weights=me/mine@v1", *run)
        assert done.returncode == 0, done.stderr
        gone = sjd2(tmp_path, address, "evaluate", "weights=me/mine@v2", *run)
        assert (gone.returncode, "Traceback" in gone.stderr) == (2, False)
        assert "weights=me/mine@v2: it has no revision v2; leave out @ for its newest" in gone.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["provenance"]["weights"] == f"me/mine@{commit}"
    config = report["provenance"]["config"]
    assert config["model"]["image_size"] == [8, 8]
    assert config["methods"]["sjd2"]["noise"]["source"] == "mean"
    assert report["methods"]["sjd2"]["equal_to_ar"] == 1
