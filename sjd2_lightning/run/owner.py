"""A run's folder has one owner: a second process is refused by name, what a killed one left is taken over.

The kernel's lock says whether the owner lives, and ends with it. Other machines may not see that lock (some
network file systems keep it to one of them), so the owner also touches its file, and a process on another
machine takes over only what stays untouched.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from sjd2_lightning.run.harmless import harmless
from sjd2_lightning.run.processes import is_first_process, slurm_job
from sjd2_lightning.run.stages import stage

log = logging.getLogger(__name__)

BEAT_S = 20.0  # seconds between touches
_BEATS = 5  # without a touch, after which an owner on another machine counts as ended


@dataclass(frozen=True)
class Owner:
    """The process that writes in a folder.

    Attributes:
        host: name of its machine.
        pid: its number there.
        since: when it began.
        job: its Slurm job; "" outside one.
    """

    host: str
    pid: int
    since: str
    job: str = ""

    @classmethod
    def current(cls) -> Owner:
        """This process."""
        since = datetime.now().astimezone().isoformat(" ", "seconds")
        return cls(socket.gethostname(), os.getpid(), since, slurm_job() or "")

    @classmethod
    def read(cls, path: Path) -> Owner | None:
        """Who a lock file names; None where it names nobody."""
        try:
            return cls(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError):
            return None

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


class Taken(ValueError):
    """Another process writes in a folder."""


@contextmanager
def owned(folder: Path, command: str) -> Iterator[None]:
    """Owns a folder as long as the block runs; of a run of several processes the first one does.

    Args:
        folder: folder of the run; made if it is missing.
        command: what writes there, "train" or "evaluate": each has an owner of its own.

    Raises:
        Taken: another process writes there.
    """
    if not is_first_process():
        yield
        return
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    path, own = folder / f".{command}.lock", Owner.current()
    lock = FileLock(path, timeout=0, fallback_to_soft=False)  # forked children do not keep it
    try:
        lock.acquire()
    except Timeout as error:
        raise Taken(_refusal(folder, command, Owner.read(path))) from error
    except (OSError, NotImplementedError) as error:
        log.warning("%s has no locks (%s): another process is recognised by its touches alone", folder, error)
    try:
        _take_over(folder, command, path, own, lock.is_locked)
        with _touching(path):
            yield
    finally:
        if Owner.read(path) == own:
            path.unlink(missing_ok=True)
        lock.release()
        if is_new:
            with suppress(OSError):  # a run that wrote nothing leaves nothing
                path.unlink(missing_ok=True)
                folder.rmdir()


def _refusal(folder: Path, command: str, owner: Owner | None) -> str:
    who = "another process" if owner is None else str(owner)
    end = "" if owner is None else f", end it (on {owner.host}: kill {owner.pid})"
    return f"run_dir={folder}: {command} runs here already ({who}); wait for it{end}, or give another run_dir"


def _take_over(folder: Path, command: str, path: Path, own: Owner, locked: bool) -> None:
    """Makes the folder ours, once the one that the file names has ended.

    Raises:
        Taken: it has not.
    """
    before = Owner.read(path)
    if before is not None:
        ended = locked and before.host == own.host  # the kernel of this machine says so
        requeued = own.job != "" and before.job == own.job  # Slurm ends a job before it starts it again
        if not (ended or requeued) and _is_touched(path, before):
            raise Taken(_refusal(folder, command, before))
        log.warning("%s: going on where %s ended without a word", folder, before)
    with harmless(f"naming the owner of {folder}"):
        path.write_text(json.dumps(asdict(own)))


def _is_touched(path: Path, owner: Owner) -> bool:
    """Whether an owner shows that it lives, within some of its beats."""
    last, end = _touched(path), time.monotonic() + _BEATS * BEAT_S
    with stage(f"waiting whether {owner} still writes here"):
        while time.monotonic() < end and path.is_file():  # it removes the file when it ends in order
            if _touched(path) > last:
                return True
            time.sleep(BEAT_S / 20)
    return False


def _touched(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


@contextmanager
def _touching(path: Path) -> Iterator[None]:
    ended = threading.Event()

    def touch() -> None:
        while not ended.wait(BEAT_S):
            with suppress(OSError):
                os.utime(path)

    thread = threading.Thread(target=touch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
