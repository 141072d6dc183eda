"""`sjd2 doctor`: what is there, what is missing, and the command for it."""

from types import SimpleNamespace

import pytest
import torch

from sjd2_lightning.__main__ import main
from sjd2_lightning.cli import doctor
from sjd2_lightning.config.reading import conf_dir


def found(findings):
    return {finding.name: finding for finding in findings}


def test_every_model_is_ready_or_has_its_command():
    models = found(doctor.models())
    assert models.keys() == {path.stem for path in (conf_dir() / "model").glob("*.yaml")} - {"shared"}
    assert models["tiny"].found == "ready: model=tiny (weights/tiny)"
    assert models["emu3"].remedy == "hf download BAAI/Emu3-Gen-hf --local-dir weights/emu3_gen"
    assert models["janus_pro_7b"].remedy.startswith("hf download deepseek-community/Janus-Pro-7B ")
    assert "sjd2 convert" in models["lumina_mgpt_512"].remedy
    assert "sjd2 convert" in models["lumina_mgpt"].remedy


def test_missing_files_are_named(tmp_path, monkeypatch):
    """A shard that the index names, in a folder that is named after what lies in it."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "weights" / "emu3_gen"
    folder.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json", "a.safetensors"):
        (folder / name).write_text("{}")
    (folder / "model.safetensors.index.json").write_text(
        '{"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}'
    )
    assert found(doctor.models())["emu3"].found == "missing in weights/emu3_gen: b.safetensors"
    (folder / "b.safetensors").write_text("")
    assert found(doctor.models())["emu3"].found.startswith("ready: model=emu3")


def test_a_login_of_wandb_is_seen(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert found(doctor.tools())["W&B"].found.startswith("not logged in")
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password secret\n")
    assert found(doctor.tools())["W&B"].found == "logged in"
    (tmp_path / "netrc").write_text("nonsense")
    assert found(doctor.tools())["W&B"].found.startswith("not logged in")


@pytest.mark.parametrize("bf16", [True, False])
def test_a_card_is_named(monkeypatch, bf16):
    card = SimpleNamespace(name="A card", total_memory=24 * 2**30)
    for name, value in {
        "is_available": True,
        "device_count": 1,
        "get_device_properties": card,
        "mem_get_info": (20 * 2**30, 24 * 2**30),
        "is_bf16_supported": bf16,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value, **__: value)
    machine = found(doctor.machine())
    assert machine["cuda:0"].found == "A card, 24 GiB, 20 GiB of it free"
    assert (machine["bfloat16"].found == "yes") == bf16 == (machine["bfloat16"].remedy == "")


def test_the_command_prints_all_and_no_secret(capsys, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    main(["doctor"])
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if not line.startswith(" ")] == ["machine", "tools", "models"]
    assert f"torch {torch.__version__}" in out
    assert "secret" not in out
