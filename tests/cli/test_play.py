"""`sjd2 play` before its page: what is missing or wrong is named, and the model is what was asked for."""

import importlib.util
from pathlib import Path

import pytest

from sjd2_lightning.cli import play as command
from sjd2_lightning.cli.launch import composed
from sjd2_lightning.config.reading import evaluate_config
from sjd2_lightning.models.small import build_tiny
from tests.tools.tiny_backbones import tiny_image_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A backbone folder of random weights."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_image_tokenizer(num_codes=16, patch=8).save(folder / "tokenizer")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_layers": 1, "num_heads": 2}
    backbone = build_tiny(["red heart"], folder / "tokenizer", text_vocab_size=512, **sizes)
    backbone.save(folder / "model")
    return folder / "model"


def refused(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as end:
        command.main(list(arguments))
    assert end.value.code == 2
    return capsys.readouterr().err


def test_without_gradio_one_line_says_how_to_get_it(capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert refused(capsys) == command.INSTALL + "\n"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("decoding.windw=3", "decoding.windw: unknown key; did you mean `decoding.window`"),
        ("decoding.window=none", "decoding.window='none': must be"),
        ("weights=nowhere", "weights=nowhere: there is no backbone.json"),
        ("model=unknown", "model=unknown: no such choice; known here: emu3"),
    ],
)
def test_a_wrong_key_is_named_before_anything_is_loaded(capsys, monkeypatch, override, expected):
    monkeypatch.setattr(command, "play", lambda *_, **__: pytest.fail("too late"))
    assert expected in refused(capsys, override)


def test_the_offer_is_what_the_keys_say(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.txt").write_text("red heart\nblue square\n")
    keys = [f"model.path={folder}", "model.image_size=[32,64]", "data.prompt_file=mine.txt"]
    keys += ["methods.sjd.window=auto", "auto_window.windows=[2]", "auto_window.repeats=1"]
    keys += ["decoding.sampling.temperature=0.5", "device=cpu", "compare=[ar,sjd_pp]"]
    offer = command.build_offer(evaluate_config(composed("evaluate", ["metrics=none", "logger=none", *keys])))
    assert offer.prompts == ["red heart", "blue square"]
    assert offer.name == f"{folder} on cpu"
    assert offer.sizes()[0] == "32 x 64"
    assert offer.preferred == "sjd_pp"
    assert offer.methods["sjd"].window == 2, "the page shows a number"
    assert {"ar", "sjd2", "sjd2_exact", "gsd"} <= set(offer.methods)
    assert offer.methods["ar"].sampling.temperature == 0.5
    command.warm_up(offer)
