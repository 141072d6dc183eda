"""What a run is doing while nothing else is printed: stages that take long say so, and how long they took."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sjd2_lightning.run.processes import is_first_process

log = logging.getLogger(__name__)

FIRST_WORD = 4.0  # seconds until a stage is heard of, and between its lines in its first minute
LATER_WORD = 30.0  # seconds between its lines after that
_MINUTE = 60.0
_WORTH_A_LINE = 1.0  # seconds; a stage that took less is not mentioned


@contextmanager
def stage(name: str, detail: Callable[[], str] = lambda: "") -> Iterator[None]:
    """Logs that a stage goes on, every few seconds, and its time at the end if it took more than a second.

    A thread of its own writes the lines, so that they come while one call of a library takes minutes. Only
    the first process of a run writes.

    Args:
        name: what is being done, such as "loading the weights".
        detail: how far it is, asked for at each line; "" where nothing is known.
    """
    if not is_first_process():
        yield
        return
    start, ended = time.perf_counter(), threading.Event()

    def report() -> None:
        while not ended.wait(FIRST_WORD if time.perf_counter() - start < _MINUTE else LATER_WORD):
            far = detail()
            log.info("%s: %.0f s so far%s", name, time.perf_counter() - start, f", {far}" if far else "")

    reporter = threading.Thread(target=report, daemon=True)
    reporter.start()
    try:
        yield
    finally:
        ended.set()
        reporter.join()
    if (taken := time.perf_counter() - start) >= _WORTH_A_LINE:
        log.info("%s: %.1f s", name, taken)
