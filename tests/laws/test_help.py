"""Every command explains itself on one screen, with an example; train and evaluate name keys that exist."""

import re
import shlex
import sys
from contextlib import suppress

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from sjd2_lightning import __main__ as table
from sjd2_lightning.config.reading import conf_dir
from tests.laws.test_documents import first_of_sweep

MOST_LINES, MOST_COLUMNS = 40, 80
BY_HYDRA = ("train", "evaluate")


@pytest.fixture
def shown(monkeypatch, capsys):
    """What `sjd2 NAME --help` prints on a terminal of 80 columns."""

    def run(name: str) -> str:
        monkeypatch.setenv("COLUMNS", str(MOST_COLUMNS))
        monkeypatch.setattr(sys, "argv", ["sjd2", name, "--help"])
        GlobalHydra.instance().clear()
        with suppress(SystemExit):  # argparse ends there, Hydra returns
            table.main([name, "--help"])
        GlobalHydra.instance().clear()
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("name", table.COMMANDS)
def test_help_fits_a_screen_and_has_an_example(name, shown):
    lines = shown(name).rstrip().splitlines()
    assert 5 < len(lines) <= MOST_LINES
    assert max(map(len, lines)) <= MOST_COLUMNS
    examples = [line for line in lines if line.startswith(f"  sjd2 {name}")]
    assert len(examples) >= 1


@pytest.mark.parametrize("root", BY_HYDRA)
def test_what_help_names_is_there(root, shown):
    text = shown(root)
    found = re.findall(rf"^  sjd2 {root} ?(.*?)(?:  .*)?$", text.partition("examples:")[2], re.M)
    assert len(found) == 5
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        for line in found:
            compose(root, [first_of_sweep(word) for word in shlex.split(line) if "=" in word])
        cfg = compose(root)
    keys = re.findall(r"^  ([a-z_.]+)  ", text.partition("keys that are changed most:")[2], re.M)
    assert len(keys) > 8
    gone = object()
    assert not [key for key in keys if OmegaConf.select(cfg, key, default=gone) is gone]


@pytest.mark.parametrize("root", BY_HYDRA)
def test_help_names_all_choices(root, shown):
    part = shown(root).partition("what to choose")[2].partition("keys that")[0]
    groups = dict(re.findall(r"^  (\w+)  +(.*(?:\n {12,}.*)*)$", part, re.M))
    assert groups.keys() >= {"model", "logger", "experiment"}
    for group in groups.keys() - {"experiment"}:
        plain = re.sub(
            r"(\w+)\[(\S+)\]", lambda m: " ".join([m[1], *(m[1] + e for e in m[2].split("|"))]), groups[group]
        )
        named = set(re.findall(r"\w+", re.sub(r"\(.*?\)| and ", " ", plain)))
        assert named == {path.stem for path in (conf_dir() / group).glob("*.yaml")} - {"shared"}
