"""Runs a build in worker processes, with a progress bar.

Workers end with the process that started them, whatever ends it. Source: ours.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sjd2_lightning.data.build import (
    Build,
    Made,
    complete_build,
    finish_build,
    make_shard,
    move_tokenizer,
    publish,
    start_build,
)
from sjd2_lightning.data.index import ShardIndex


class StoppedError(RuntimeError):
    """The build was stopped from outside."""


def build_folder(
    build: Build,
    *,
    num_workers: int = 0,
    device: str = "cpu",
    show_progress: bool = True,
    max_bad_share: float = 0.0,
) -> ShardIndex:
    """Build a folder of shards, or finish a build that was killed (ours).

    Args:
        build: What to build. The caller sees to it that no other process builds the same folder.
        num_workers: Processes that read and encode, each with one thread; 0 does it in this process.
        device: Of the image tokenizer: cpu, or cuda for all GPUs in turn.
        show_progress: Show a progress bar.
        max_bad_share: Share of the pictures that may be unusable before the build stops.

    Returns:
        The index of the folder.

    Raises:
        ValueError: Nothing to build, too many unusable pictures, or a sample that does not fit.
    """
    if complete_build(build):
        return publish(build)
    made = start_build(build)
    todo = [number for number in range(build.num_shards) if number not in made]
    allowed = max_bad_share * len(build.pictures.records)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not show_progress) as progress:
        label = f"{build.meta.kind}/{build.meta.split}"
        task = progress.add_task(label, total=len(build.pictures.records))
        progress.advance(task, sum(_num_records(build, number) for number in made))
        num_skipped = 0

        def check(one: Made) -> None:
            nonlocal num_skipped
            num_skipped += len(one.skipped)
            if num_skipped:
                progress.update(task, description=f"{label}, {num_skipped} unusable")
            if num_skipped > allowed:
                key, reason = one.skipped[-1]
                raise ValueError(
                    f"{num_skipped} pictures cannot be used and {int(allowed)} are allowed, e.g. {key}: "
                    f"{reason}; repair the source or raise --max-bad-share, finished shards are kept."
                )

        for one in made.values():
            check(one)

        def tick(count: int) -> None:
            progress.advance(task, count)

        run = _in_workers(build, todo, num_workers, device, tick) if num_workers else None
        for number, one in run or _here(build, todo, device, tick):
            made[number] = one
            check(one)
    finish_build(build, made)
    return publish(build)


def _num_records(build: Build, number: int) -> int:
    return min(build.samples_per_shard, len(build.pictures.records) - number * build.samples_per_shard)


def _here(build: Build, todo: list[int], device: str, tick: Any) -> Iterator[tuple[int, Made]]:
    move_tokenizer(build.tokenizer, device)
    for number in todo:
        yield number, make_shard(build, number, device, tick)


def _in_workers(
    build: Build, todo: list[int], num_workers: int, device: str, tick: Any
) -> Iterator[tuple[int, Made]]:
    # a forked worker shares the records and the tokenizer; CUDA cannot be forked
    method = "fork" if device == "cpu" and "fork" in multiprocessing.get_all_start_methods() else "spawn"
    context: Any = multiprocessing.get_context(method)
    done, started, stop = context.Value("q", 0), context.Value("q", 0), context.Event()
    arguments = (os.getpid(), build, device, started, done, stop)
    ticked = 0
    with ProcessPoolExecutor(min(num_workers, max(1, len(todo))), context, _start, arguments) as pool:
        waiting: dict[Future[Made], int] = {pool.submit(_work, number): number for number in todo}
        try:
            while waiting:
                finished, _ = wait(waiting, timeout=0.2, return_when=FIRST_COMPLETED)
                tick(done.value - ticked)
                ticked = done.value
                for future in finished:
                    yield waiting.pop(future), future.result()
        except BrokenProcessPool as error:
            raise ValueError(
                "A worker was killed, most often for memory: use fewer --workers or a smaller "
                "--encode-batch; finished shards are kept."
            ) from error
        finally:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)


_job: tuple[Build, str, Any] | None = None  # of a worker


def _start(parent: int, build: Build, device: str, started: Any, done: Any, stop: Any) -> None:
    global _job
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent says when to stop
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    torch.set_num_threads(1)
    with started.get_lock():
        number, started.value = started.value, started.value + 1
    if device == "cuda":
        device = f"cuda:{number % torch.cuda.device_count()}"
    move_tokenizer(build.tokenizer, device)

    def tick(count: int) -> None:
        with done.get_lock():
            done.value += count
        if stop.is_set():
            raise StoppedError

    _job = (build, device, tick)


def _work(number: int) -> Made:
    assert _job is not None
    build, device, tick = _job
    return make_shard(build, number, device, tick)


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)
