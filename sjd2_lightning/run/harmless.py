"""What is kept of a run for people to see must not end it: a failure is said once, and the run goes on."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

log = logging.getLogger(__name__)

_said: set[str] = set()


@contextmanager
def harmless(what: str, kind: type[Exception] = Exception) -> Iterator[None]:
    """Guards loggers, caches and files for people: an exception inside is a warning, said once a process.

    Also a decorator: the function then returns None where it fails.

    Args:
        what: what is being done, and where: it names the failure, and is said once.
        kind: exceptions that end nothing, such as OSError; others are raised.
    """
    try:
        yield
    except kind as error:  # a full disk, an unwritable home, an absent server, a library's own fault
        if what not in _said:
            _said.add(what)
            reason = " ".join(str(error).split()) or type(error).__name__
            log.warning("%s failed; the run goes on without it: %s", what, reason[:500])
            log.debug("%s", what, exc_info=True)
