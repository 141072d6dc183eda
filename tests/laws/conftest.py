"""A command as the command line runs it, and a model of random weights for it."""

import sys
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra

from sjd2_lightning.models.small import build_tiny
from tests.tools.tiny_backbones import tiny_image_tokenizer


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory) -> Path:
    """A backbone folder of random weights, and shards of a few pictures beside it."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_image_tokenizer(num_codes=16, patch=8).save(folder / "tokenizer")
    captions = ["red heart", "blue circle", "cat face"]
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_layers": 1, "num_heads": 2}
    build_tiny(captions, folder / "tokenizer", text_vocab_size=512, **sizes).save(folder / "model")
    return folder


@pytest.fixture
def command(tiny_folder, tmp_path, monkeypatch):
    """Runs a script's main as the command line does; returns its exit status."""
    monkeypatch.chdir(tmp_path)

    def run(main, *arguments: str) -> int | str | None:
        monkeypatch.setattr(sys, "argv", ["script", *arguments])
        GlobalHydra.instance().clear()
        try:
            main()
        except SystemExit as end:
            return end.code
        finally:
            GlobalHydra.instance().clear()
        return 0

    return run
