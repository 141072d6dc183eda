"""One owner a folder: refused by name, taken over when it was killed, on this machine and on others."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict, replace

import pytest
from filelock import FileLock

from sjd2_lightning.run import owner as module
from sjd2_lightning.run.owner import Owner, owned
from tests.tools.source import REPO

HOLD = """
import os, sys, time
from pathlib import Path
from sjd2_lightning.run.owner import owned
with owned(Path(sys.argv[1]), "train"):
    if sys.argv[2:] and os.fork() == 0:  # as a process that loads data
        os.write(1, f"child {os.getpid()}\\n".encode())  # whole, whatever the parent writes
        time.sleep(60)
        os._exit(0)
    os.write(1, f"owned {os.getpid()}\\n".encode())
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Starts a process that owns a folder; gives it, and the numbers it printed."""
    started = []

    def start(*arguments: str):
        command = [sys.executable, "-c", HOLD, str(tmp_path / "run"), *arguments]
        process = subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, text=True)
        lines = dict(process.stdout.readline().split() for _ in range(1 + len(arguments)))
        started.append((process, lines))
        return process, {name: int(pid) for name, pid in lines.items()}

    yield start
    for process, lines in started:
        for pid in lines.values():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        process.wait()
        process.stdout.close()


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(module, "BEAT_S", 0.05)


def leave(folder, **changes) -> Owner:
    """The file of an owner that ended without a word."""
    folder.mkdir()
    left = replace(Owner("elsewhere", 7, "2026-01-01 00:00:00"), **changes)
    (folder / ".train.lock").write_text(json.dumps(asdict(left)))
    return left


def test_a_second_process_is_refused_by_name_and_changes_nothing(tmp_path, holder):
    _, pids = holder()
    before = (tmp_path / "run" / ".train.lock").read_text()
    host = Owner.current().host
    message = (
        rf"run_dir={tmp_path / 'run'}: train runs here already \(process {pids['owned']} on {host}, since"
    )
    with pytest.raises(ValueError, match=message) as error, owned(tmp_path / "run", "train"):
        pass
    assert f"kill {pids['owned']}" in str(error.value)
    assert "\n" not in str(error.value)
    assert (tmp_path / "run" / ".train.lock").read_text() == before
    with owned(tmp_path / "run", "evaluate"):  # has an owner of its own
        pass


def test_nothing_is_left_behind(tmp_path):
    for _ in range(2):
        with owned(tmp_path / "run", "train"):
            assert json.loads((tmp_path / "run" / ".train.lock").read_text())["pid"] == os.getpid()
        assert not list(tmp_path.iterdir()), "a folder that was made for nothing goes too"
    with pytest.raises(KeyError), owned(tmp_path / "run", "train"):
        raise KeyError
    assert not list(tmp_path.iterdir())
    for name in ("mine", "written"):
        (tmp_path / "mine").mkdir(exist_ok=True)
        with owned(tmp_path / name, "train"):
            (tmp_path / "written").mkdir(exist_ok=True)
            (tmp_path / "written" / "file").touch()
    assert not list((tmp_path / "mine").iterdir()), "a folder that was there stays"
    assert [path.name for path in (tmp_path / "written").iterdir()] == ["file"]


@pytest.mark.parametrize("arguments", [(), ("child",)], ids=["alone", "a child of it lives on"])
def test_what_a_killed_process_left_is_taken_over_at_once(tmp_path, holder, arguments, caplog):
    process, pids = holder(*arguments)
    process.kill()
    process.wait()
    start = time.monotonic()
    with owned(tmp_path / "run", "train"):
        assert time.monotonic() - start < 5
    assert f"going on where process {pids['owned']} on" in caplog.text
    if "child" in pids:
        os.kill(pids["child"], 0)  # it was alive all the time


def test_another_machine_that_is_silent_is_taken_over(tmp_path, fast, caplog):
    left = leave(tmp_path / "run")
    with owned(tmp_path / "run", "train"):
        assert Owner.read(tmp_path / "run" / ".train.lock").pid == os.getpid()
    assert str(left) in caplog.text


def test_another_machine_that_still_writes_is_not(tmp_path, fast):
    leave(tmp_path / "run")
    path, ended = tmp_path / "run" / ".train.lock", threading.Event()

    def touch():
        while not ended.wait(0.05):
            os.utime(path)

    thread = threading.Thread(target=touch)
    thread.start()
    try:
        with (
            pytest.raises(ValueError, match="process 7 on elsewhere, since 2026"),
            owned(path.parent, "train"),
        ):
            pass
    finally:
        ended.set()
        thread.join()
    assert Owner.read(path).host == "elsewhere"


def test_an_owner_is_heard_of(tmp_path, fast):
    with owned(tmp_path / "run", "train"):
        path = tmp_path / "run" / ".train.lock"
        os.utime(path, (0, 0))
        deadline = time.monotonic() + 5
        while path.stat().st_mtime == 0:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_a_job_that_is_queued_again_does_not_wait(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "123")
    monkeypatch.setattr(module, "_is_touched", lambda *_: pytest.fail("it waited"))
    leave(tmp_path / "run", job="123")
    with owned(tmp_path / "run", "train"):
        assert Owner.read(tmp_path / "run" / ".train.lock").job == "123"


def test_a_file_system_without_locks_is_said_and_the_touches_count(tmp_path, monkeypatch, fast, caplog):
    def no_locks(self, *_, **__):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(FileLock, "acquire", no_locks)
    here = Owner.current().host
    leave(tmp_path / "run", host=here)
    with owned(tmp_path / "run", "train"):
        assert "No locks available" in caplog.text
        with (
            pytest.raises(ValueError, match=f"process {os.getpid()} on {here}"),
            owned(tmp_path / "run", "train"),
        ):
            pass
    assert not list((tmp_path / "run").iterdir())


@pytest.mark.parametrize("content", ["", "no json", '{"host": 1}', "[]"])
def test_a_file_that_names_nobody_is_taken(tmp_path, content):
    (tmp_path / ".train.lock").write_text(content)
    with owned(tmp_path, "train"):
        pass


def test_further_processes_of_a_run_own_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    with owned(tmp_path / "run", "train"):
        assert not (tmp_path / "run").exists()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d .*", Owner.current().since)
