"""Races in one thread, one after the other, and what watchers see of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

from sjd2_lightning.playground.frames import Side, sides
from sjd2_lightning.playground.race import Race, StoppedError

INTERVAL = 0.1  # seconds between two frames
SHARE = 0.1  # greatest share of the time that a processor may draw frames
PATIENCE = 10.0  # seconds that a race goes on without being asked for a frame
_LEAST = 0.01  # seconds between two looks at a race


@dataclass(frozen=True)
class Frame:
    """A race at one moment.

    Attributes:
        state: "waiting", "drawing", "done" or "stopped".
        num_before: number of races that come first.
        sides: its methods.
        verdict: what the finished images have in common; None before, and of a stopped race.
    """

    state: str
    num_before: int
    sides: tuple[Side, ...]
    verdict: str | None


class Run:
    """A race that was handed to a `Player`, as its watcher sees it."""

    def __init__(self, race: Race) -> None:
        self.race = race
        self.stopped = self.ended = False
        self._left: float | None = None  # when the watcher was given the frame that it still looks at

    def stop(self) -> None:
        """Ends the race before its next pass."""
        self.stopped = True

    def to_stop(self) -> bool:
        """Whether it was stopped, or is watched no more."""
        left = self._left
        return self.stopped or (left is not None and time.monotonic() - left > PATIENCE)

    def work(self) -> None:
        """Runs the race; called in the player's thread."""
        try:
            self.race.run(self.to_stop)
        except StoppedError:
            self.stopped = True
        finally:
            self.ended = True

    def frames(self, future: Future[None], before: Callable[[], int]) -> Iterator[Frame]:
        """The race as it goes on, its end included: each frame is of the moment at which it is asked for.

        Whoever stops asking ends the race.

        Args:
            future: future of `work`, whose errors are raised here.
            before: says how many races come first.
        """
        shown = None
        try:
            while not future.done():
                start, work, cost = time.monotonic(), time.thread_time(), 0.0
                now = before(), sum(runner.seen.num_passes for runner in self.race.runners)
                if now != shown:
                    state = "waiting" if now[0] else "drawing"
                    frame = Frame(state, now[0], tuple(sides(self.race)), None)
                    # what it worked: that it waited for a processor is no reason to show less
                    shown, cost = now, time.thread_time() - work
                    self._left = time.monotonic()
                    yield frame
                    self._left = None
                since = time.monotonic() - start
                wait([future], max(INTERVAL - since, cost / SHARE - since, _LEAST))
                if self.stopped:
                    future.cancel()  # it may not have begun
            if not future.cancelled():
                future.result()
            state = "done" if self.race.done else "stopped"
            yield Frame(state, 0, tuple(sides(self.race)), self.race.verdict())
        finally:
            self.stop()


class Player:
    """Decodes for several watchers, one race at a time, in the order in which they come."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="decoding")
        self._runs: list[tuple[str, Run]] = []  # of all watchers, in the order in which they came

    def watch(self, watcher: str, race: Race) -> Iterator[Frame]:
        """Runs a race and yields its frames; see `Run.frames`.

        Args:
            watcher: who asks, for `stop`.
            race: the race.
        """
        mine = watcher, Run(race)
        self._runs.append(mine)
        try:
            yield from mine[1].frames(self._thread.submit(mine[1].work), lambda: self._num_before(mine))
        finally:
            self._runs.remove(mine)

    def stop(self, watcher: str) -> None:
        """Ends a watcher's races before their next pass."""
        for owner, run in list(self._runs):
            if owner == watcher:
                run.stop()

    def _num_before(self, mine: tuple[str, Run]) -> int:
        # a race that is done holds nobody up, though its thread may have a moment's tidying left
        before = self._runs[: self._runs.index(mine)]
        return sum(not (run.ended or run.race.done) for _, run in before)

    def close(self) -> None:
        """Ends all races and waits for the thread."""
        for _, run in list(self._runs):
            run.stop()
        self._thread.shutdown(cancel_futures=True)
