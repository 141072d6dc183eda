"""One table of commands: each answers, misspelt ones are named, ranks and old addresses find theirs."""

import json
import re
import runpy
import subprocess
import sys

import pytest

from sjd2_lightning import __main__ as table
from sjd2_lightning import __version__
from sjd2_lightning.run.processes import HANDED_DOWN
from tests.tools.source import REPO

OWN_PARSER = [name for name in table.COMMANDS if name not in ("train", "evaluate")]
OLD = {
    "sjd2_lightning.data.prepare": "sjd2 prepare",
    "sjd2_lightning.data.pairs": "sjd2 pairs",
    "sjd2_lightning.teacher_samples": "sjd2 teacher",
    "sjd2_lightning.models.convert": "sjd2 convert",
    "sjd2_lightning.report.wandb_report": "sjd2 wandb",
}


def run(*words: str) -> subprocess.CompletedProcess:
    """A Python command in the repository."""
    return subprocess.run([sys.executable, *words], cwd=REPO, capture_output=True, text=True)


def test_help_names_every_command_and_fits_a_screen(capsys):
    table.main(["--help"])
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in table.COMMANDS)
    assert len(shown.splitlines()) <= 24
    assert max(map(len, shown.splitlines())) <= 80
    assert len(re.findall(r"^  sjd2 \w+ ", shown, re.M)) == 3, "with commands to begin with"
    table.main(["--version"])
    assert capsys.readouterr().out.strip() == __version__


def test_help_waits_for_no_framework():
    code = "import sys; from sjd2_lightning.__main__ import usage; usage(); print('torch' in sys.modules)"
    assert run("-c", code).stdout.strip() == "False"


def test_a_misspelt_command_is_named(capsys):
    with pytest.raises(SystemExit) as end:
        table.main(["trainn"])
    assert end.value.code == 2
    assert "did you mean `sjd2 train`?" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        table.main(["x"])
    assert end.value.code == 2
    assert "commands: generate, train, evaluate" in capsys.readouterr().err


@pytest.mark.parametrize("name", OWN_PARSER)
def test_each_command_explains_itself(name, capsys):
    with pytest.raises(SystemExit) as end:
        table.main([name, "--help"])
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: sjd2 {name}")


def test_train_gets_its_overrides():
    shown = run("-m", "sjd2_lightning", "train", "--cfg", "job", "--resolve", "decoding.window=16")
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.count("window: 16") > 3
    wrong = run("-m", "sjd2_lightning", "evaluate", "decoding.windw=16")
    assert wrong.returncode == 2
    assert "decoding.window" in wrong.stderr


def test_a_further_rank_finds_its_command(monkeypatch):
    """Lightning repeats the command line behind the program's name, from which the command was taken off."""
    called = []
    monkeypatch.setattr("sjd2_lightning.cli.train.main", lambda: called.append(list(sys.argv)))
    monkeypatch.setenv(HANDED_DOWN, json.dumps({"script": "train", "overrides": [], "run_dir": "x"}))
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(sys, "argv", ["sjd2", "seed=1"])
    table.main()
    assert called == [["sjd2", "seed=1"]]


@pytest.mark.filterwarnings("ignore:.*found in sys.modules.*:RuntimeWarning")
@pytest.mark.parametrize("address", OLD)
def test_old_addresses_go_on(address, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["python -m", "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module(address, run_name="__main__")
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: {OLD[address]}")
