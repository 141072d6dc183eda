"""Weights & Biases: an offline run holds everything, online falls back, disabled does nothing."""

import json
import logging
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import wandb

from sjd2_lightning.report import wandb_log
from sjd2_lightning.report.wandb_log import log_to_wandb, media_row, scalar_row
from tests.tools.small_evaluation import METHODS, PROMPTS
from tests.tools.source import REPO
from tests.tools.wandb_files import named_files, offline_run, summaries


def test_keys_of_the_faster_method_are_plain(result):
    row = scalar_row(result)
    assert row["val/nfe"] == result.methods["sjd"].measured["nfe"].value
    assert row["val/nfe_ar"] == result.methods["ar"].measured["nfe"].value
    for name in ("speedup", "step_compression", "clip_score", "fd_Colours", "kid_Colours", "equal_to_ar"):
        assert f"val/{name}" in row
        assert f"val/{name}_sjd2" in row


def test_offline_run_holds_every_figure_and_image_in_one_step(result, provenance, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MY_SERVICE_TOKEN", "s3cr3t-value")
    files = log_to_wandb(result, {**provenance, "note": "s3cr3t-value"}, tmp_path, mode="online")
    assert files is not None
    assert wandb.run is None
    rows, config = offline_run(tmp_path)
    (row,) = [row for row in rows if "eval/nfe" in row]
    assert set(media_row(result, "eval")) <= set(row)
    assert row["eval_ar/nfe"] == result.methods["ar"].measured["nfe"].value
    (path,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert summaries(path)["eval/speedup"] == {"last"}
    assert summaries(path)["val/loss_clean"] == {"min", "last"}
    assert row["eval/images"]["_type"] == row["eval/passes"]["_type"] == "image-file"
    assert row["eval_acceptance/sjd2"]["_type"] == "histogram"
    assert row["eval/prompts"]["_type"] == "html-file"
    assert config["config"]["window"] == 6
    assert "s3cr3t" not in json.dumps(config)


def test_disabled_and_unknown_modes(result, provenance, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert log_to_wandb(result, provenance, tmp_path) is None
    monkeypatch.delenv("WANDB_MODE")
    with pytest.raises(ValueError, match=r"logger\.wandb\.mode=on is unknown"):
        log_to_wandb(result, provenance, tmp_path, mode="on")


@pytest.mark.parametrize("logged_in", [False, True])
def test_online_falls_back_with_one_warning(monkeypatch, tmp_path, logged_in):
    calls = []

    def init(mode, **settings):
        calls.append(mode)
        if mode == "online":
            raise wandb.errors.CommError("no route")

    monkeypatch.setattr(wandb_log, "_stays_offline", False)
    monkeypatch.setattr(wandb_log.wandb, "init", init)
    monkeypatch.setattr(wandb_log.wandb, "login", lambda **_: logged_in)
    with pytest.warns(UserWarning, match="wandb sync .*offline-run") as caught:
        wandb_log.start_run("online", {"dir": str(tmp_path)})
    assert len(caught) == 1
    once = ["online", "offline"] if logged_in else ["offline"]
    assert calls == once
    wandb_log.start_run("online", {"dir": str(tmp_path)})  # the next run of a sweep does not wait again
    assert calls == [*once, "offline"]


def test_a_copy_of_a_run_is_whole_and_home_is_not_needed(result, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/dev/null/x")
    picture = result.store.image_path(next(iter(result.methods.values())).records[0])
    for name in ("first", "second"):  # of a sweep
        folder = Path(log_to_wandb(result, {}, tmp_path / name, pictures={"cost": picture}))
        rows, _ = offline_run(tmp_path / name)  # waits for its end
        (row,) = [row for row in rows if "eval/nfe" in row]
        moved = folder.rename(tmp_path / f"{name}_moved")
        (path,) = moved.glob("*.wandb")
        named = named_files(path)
        pictures = [row[f"eval/{key}"]["path"] for key in ("images", "passes", "prompts", "cost")]
        assert {moved / "files" / picture for picture in pictures} <= set(named)
        assert all(place.stat().st_size for place in named)
        assert str(folder).encode() not in path.read_bytes()
        page = (moved / "files" / row["eval/prompts"]["path"]).read_text()
        assert page.count("data:image/png;base64,") == len(PROMPTS) * len(METHODS)
        assert all(prompt.prompt in page for prompt in PROMPTS)


def test_a_disk_of_wandb_that_is_full_is_said_once(result, caplog, small_disk, monkeypatch):
    monkeypatch.setattr(logging, "raiseExceptions", False)  # as the commands do: lines of W&B's own log
    (small_disk / "filler").write_bytes(bytes(1_000_000))
    assert log_to_wandb(result, {}, small_disk) is not None
    assert log_to_wandb(result, {}, small_disk) is not None
    said = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert len(said) == len(set(said)) <= 2
    assert all("No space left" in line for line in said)
    assert "logging to W&B in" in said[0]


class Broken:
    """A run whose every use fails."""

    disabled, offline, dir = False, True, "gone/files"

    def __getattr__(self, name):
        raise OSError(28, f"No space left on device, {name}")


@pytest.mark.parametrize("error", [OSError("full"), wandb.errors.UsageError("no"), RuntimeError("broken")])
def test_wandb_that_cannot_start_or_end_stops_nothing(result, tmp_path, monkeypatch, caplog, error):
    def init(**settings):
        raise error

    monkeypatch.setattr(wandb_log.wandb, "init", init)
    assert log_to_wandb(result, {}, tmp_path) is None
    assert f"starting W&B in {tmp_path} failed; the run goes on without it: {error}" in caplog.text
    monkeypatch.setattr(wandb_log.wandb, "init", lambda **settings: Broken())
    assert log_to_wandb(result, {}, tmp_path / "other") == "gone"
    assert caplog.text.count("No space left on device, log") == 1


UNREACHABLE = """
import sys, time, warnings
from pathlib import Path
from sjd2_lightning.report.wandb_log import log_to_wandb
from tests.tools.small_evaluation import METHODS, evaluate
folder = Path(sys.argv[1])
result = evaluate(folder / "images", methods={name: METHODS[name] for name in ("ar", "sjd")})
for run in ("first", "second"):
    (folder / run).mkdir()
    start = time.monotonic()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        log_to_wandb(result, {}, folder / run)
    print(run, time.monotonic() - start, sum("wandb sync" in str(w.message) for w in caught))
"""


@pytest.mark.slow
def test_a_server_that_never_answers_costs_under_30_s_once_and_loses_nothing(tmp_path):
    """In a process of its own: W&B reads its address once a process."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(64)
        address = {
            "WANDB_MODE": "online",
            "WANDB_BASE_URL": f"http://127.0.0.1:{silent.getsockname()[1]}",
            "WANDB_API_KEY": "0" * 40,
        }
        command = [sys.executable, "-c", UNREACHABLE, str(tmp_path)]
        ran = subprocess.run(
            command, cwd=REPO, env=os.environ | address, capture_output=True, text=True, timeout=300
        )
    assert ran.returncode == 0, ran.stderr
    timed = {line.split()[0]: line.split()[1:] for line in ran.stdout.splitlines() if line.count(" ") == 2}
    assert float(timed["first"][0]) < 30
    assert int(timed["first"][1]) == 1
    assert float(timed["second"][0]) < 10
    for run in ("first", "second"):
        rows, _ = offline_run(tmp_path / run)
        (row,) = [row for row in rows if "eval/nfe" in row]
        assert {"eval/images", "eval/passes", "eval/prompts", "eval_acceptance/sjd", "eval/speedup"} <= set(
            row
        )
