"""A W&B Report is built without a login; publishing it says what is missing and how to do it later."""

import json
import logging
import shlex
import sys
from types import SimpleNamespace

import pytest

from sjd2_lightning.cli import evaluate as cli
from sjd2_lightning.report import wandb_report
from sjd2_lightning.report.wandb_report import build_report, later_command, publish_report, run_id_of
from sjd2_lightning.report.write import write_report

OFFLINE = "outputs/my run/wandb/offline-run-20261125_024412-1a2b3c4d"


@pytest.fixture(scope="module")
def folder(result, provenance, tmp_path_factory):
    return write_report(result, provenance, folder=tmp_path_factory.mktemp("published")).json.parent


def test_the_report_holds_table_media_and_provenance(folder):
    pytest.importorskip("wandb_workspaces", reason="the extra `reports` is not installed")
    report, markdown = json.loads((folder / "report.json").read_text()), (folder / "report.md").read_text()
    built = build_report(report, markdown, project="p", run_id="1a2b3c4d")
    text, _, grid, _, provenance = built.blocks
    assert "| sjd2 | replay | 100 % |" in text.text
    assert "](figures/" not in text.text
    assert "1a2b3c4d" in grid.runsets[0].filters
    assert [panel.media_keys for panel in grid.panels[:4]] == [
        ["eval/images"], ["eval/passes"], ["eval/cost"], ["eval/settling"]
    ]  # fmt: skip
    assert grid.panels[4].metrics == [
        "eval_ar/speedup",
        "eval/speedup",
        "eval_sjd2/speedup",
        "eval_sjd2_paper/speedup",
    ]
    assert report["provenance"]["weights_hash"] in provenance.code
    assert built._to_model().spec  # everything but the upload


def test_the_command_for_later_names_run_and_folder():
    command = later_command("outputs/my run", OFFLINE, project="p", entity="team")
    login, sync, publish = command.split(" && ")
    assert login == "wandb login"
    assert shlex.split(sync) == ["wandb", "sync", "--project", "p", "--entity", "team", OFFLINE]
    assert shlex.split(publish)[:4] == [
        "python",
        "-m",
        "sjd2_lightning.report.wandb_report",
        "outputs/my run",
    ]
    assert shlex.split(publish)[-2:] == ["--run", "1a2b3c4d"] == ["--run", run_id_of(OFFLINE)]


def test_what_is_missing_is_said(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(wandb_report, "_workspaces", lambda: None)
    monkeypatch.setattr(wandb_report.wandb, "login", lambda **_: False)
    with pytest.raises(ValueError, match="run `wandb login` first"):
        publish_report(folder, project="p")
    with pytest.raises(ValueError, match=r"there is no report\.json"):
        publish_report(tmp_path, project="p")
    monkeypatch.setattr(sys, "argv", ["wandb_report", str(folder)])
    with pytest.raises(SystemExit) as stopped:
        wandb_report.main()
    assert stopped.value.code == 2
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "wandb_workspaces.reports", None)
    with pytest.raises(ValueError, match="pip install"):
        publish_report(folder, project="p")


def test_a_refusal_of_the_server_is_one_line(folder, monkeypatch):
    monkeypatch.setattr(wandb_report.wandb, "login", lambda **_: True)

    def refuse():
        raise RuntimeError("project\nnot found")

    monkeypatch.setattr(wandb_report, "_workspaces", lambda: None)
    monkeypatch.setattr(wandb_report.wandb, "Api", refuse)
    with pytest.raises(ValueError, match="did not take the report: project not found"):
        publish_report(folder, project="p")


@pytest.mark.parametrize("run_folder", [OFFLINE, OFFLINE.replace("offline-run", "run")])
def test_offline_one_line_says_how_to_publish_later(run_folder, caplog, monkeypatch):
    monkeypatch.setattr(
        wandb_report, "publish_report", lambda *_, **__: (_ for _ in ()).throw(ValueError("no route"))
    )
    config = SimpleNamespace(
        run_dir="outputs/my run", logger=SimpleNamespace(wandb=SimpleNamespace(project="p", entity=None))
    )
    with caplog.at_level(logging.WARNING):
        cli.publish_to_wandb(config, run_folder)
    (line,) = caplog.messages
    assert ("the run was kept offline" if "offline" in run_folder else "no route") in line
    assert line.endswith(later_command("outputs/my run", run_folder, project="p"))


def test_online_the_address_is_logged(caplog, monkeypatch):
    monkeypatch.setattr(wandb_report, "publish_report", lambda *_, run_id, **__: f"https://host/{run_id}")
    config = SimpleNamespace(
        run_dir="x", logger=SimpleNamespace(wandb=SimpleNamespace(project="p", entity=None))
    )
    with caplog.at_level(logging.INFO):
        cli.publish_to_wandb(config, "x/wandb/run-1-abc")
    assert caplog.messages == ["W&B Report: https://host/abc"]
