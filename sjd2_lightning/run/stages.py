"""What a run is doing while nothing else is printed: stages that take long say so, and how long they took."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Protocol

from sjd2_lightning.run.processes import is_first_process

log = logging.getLogger(__name__)

FIRST_WORD = 4.0  # seconds without a line until a stage is heard of, in its first minute
LATER_WORD = 30.0  # the same after that
A_MINUTE = 60.0
_MEASURED = 10.0  # seconds after which a pace says something
_WORTH_A_LINE = 1.0  # seconds; a stage that took less is not mentioned
_LOOKS = 8  # of the reporter, in the time of a first word


@dataclass
class _Stage:
    name: str
    detail: Callable[[], str]
    start: float


_open: list[_Stage] = []  # that have not ended, outermost first
_last_line = time.perf_counter()  # when the user heard of something; at first, when the process started


@contextmanager
def stage(name: str, detail: Callable[[], str] = lambda: "") -> Iterator[None]:
    """Logs that a stage goes on, every few seconds, and its time at the end if it took more than a second.

    A thread of its own writes the lines, so that they come while one call of a library takes minutes. Only
    the first process of a run writes, and of stages inside one another the innermost speaks.

    Args:
        name: what is being done, such as "loading the weights".
        detail: how far it is, asked for at each line; "" where nothing is known.
    """
    if not is_first_process():
        yield
        return
    own = _Stage(name, detail, time.perf_counter())
    reporting = nullcontext() if _open else _reporter()
    _open.append(own)
    try:
        with reporting:
            yield
    finally:
        _open.remove(own)
    if (taken := time.perf_counter() - own.start) >= _WORTH_A_LINE:
        _say(f"{name}: {taken:.1f} s")


@contextmanager
def _reporter() -> Iterator[None]:
    ended = threading.Event()

    def report() -> None:
        while not ended.wait(FIRST_WORD / _LOOKS):
            inner, now = _open[-1], time.perf_counter()
            if now - _last_line >= (FIRST_WORD if now - inner.start < A_MINUTE else LATER_WORD):
                far = inner.detail()
                _say(f"{inner.name}: {now - inner.start:.0f} s so far{f', {far}' if far else ''}")

    thread = threading.Thread(target=report, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _say(line: str) -> None:
    global _last_line
    _last_line = time.perf_counter()
    log.info("%s", line)


def duration(seconds: float) -> str:
    """A time as people say it: "40 s", "12 min", "3.2 h"."""
    if seconds < 2 * A_MINUTE:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 120 * A_MINUTE else f"{seconds / 3600:.1f} h"


def foretell(name: str, seconds: float) -> None:
    """Says how long something will take, if that is more than a minute; NaN says nothing."""
    if seconds >= A_MINUTE and is_first_process():
        _say(f"{name}: about {duration(seconds)}")


def is_watched() -> bool:
    """Whether output goes to a terminal: bars are drawn there alone, a log file would show their end."""
    from rich.console import Console

    return Console().is_terminal


class Advance(Protocol):
    """Says that a number of things more are done, with a note such as the name of a method."""

    def __call__(self, count: int, note: str = "") -> None: ...


@contextmanager
def counted(name: str, total: int, unit: str, bar: bool = True) -> Iterator[Advance]:
    """A stage of known length: a bar on a terminal, elsewhere lines.

    Args:
        name: what is being done, such as "decoding".
        total: number of things to do.
        unit: what is counted, such as "images".
        bar: whether a bar may be drawn; two at once cannot.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description} {task.fields[note]}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    drawn = bar and is_watched() and is_first_process()
    with ExitStack() as waiting, Progress(*columns, disable=not drawn) as progress:
        progress.add_task(name, total=total, note="", rate="")
        (task,) = progress.tasks
        start = time.perf_counter()

        def far() -> str:
            done, taken = task.completed, time.perf_counter() - start
            left = taken / done * (total - done) if done and taken > _MEASURED else 0.0
            said = f"{done:.0f} of {total} {unit} {task.fields['note']}".rstrip()
            return f"{said}, about {duration(left)} left" if left else said

        if not drawn:
            waiting.enter_context(stage(name, far))

        def advance(count: int, note: str = "") -> None:
            rate = f"{task.speed:.2f} {unit}/s" if task.speed else ""
            progress.update(task.id, advance=count, note=note or task.fields["note"], rate=rate)

        yield advance


def speak() -> None:
    """Sends the lines of this package to stderr, in commands whose logging Hydra does not set up."""
    own = logging.getLogger("sjd2_lightning")
    if not own.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        own.addHandler(handler)
    own.setLevel(logging.INFO)
