"""Folders of shards that are there when they are needed: built in workers, once, killable at any time."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sjd2_lightning.data.build import (
    BATCH_PIXELS,
    SKIPPED_NAME,
    Build,
    Made,
    PictureSet,
    complete_build,
    finish_build,
    make_shard,
    move_tokenizer,
    put_in_place,
    start_build,
    write_skipped,
)
from sjd2_lightning.data.index import FORMAT_VERSION, INDEX_NAME, ShardIndex, ShardMeta
from sjd2_lightning.models.image_tokenizer import ImageTokenizer, codes_shape
from sjd2_lightning.run.files import sha256_of_json
from sjd2_lightning.run.stages import counted, stage


class StoppedError(RuntimeError):
    """The build was stopped from outside."""


def build_folder(
    build: Build,
    *,
    num_workers: int = 0,
    device: str = "cpu",
    show_progress: bool = True,
    max_bad: int = 0,
) -> ShardIndex:
    """Build a folder of shards, or finish a build that was killed (ours).

    Args:
        build: what to build. The caller sees to it that no other process builds the same folder.
        num_workers: processes that read and encode, each with one thread; 0 does it in this process.
        device: device of the image tokenizer: cpu, or cuda for all GPUs in turn.
        show_progress: show a progress bar.
        max_bad: number of samples that may be unusable before the build stops.

    Returns:
        The index of the folder.

    Raises:
        ValueError: nothing to build, too many unusable pictures, or a sample that does not fit.
    """
    if complete_build(build):
        return put_in_place(build)
    with stage("checking what is to be built"):
        made = start_build(build)
    todo = [number for number in range(build.num_shards) if number not in made]
    label = f"{build.meta.kind}/{build.meta.split}"
    with counted(label, len(build.pictures.records), "samples", show_progress) as tick:
        tick(sum(_num_records(build, number) for number in made))
        skipped: list[dict[str, str]] = []

        def check(one: Made) -> None:
            skipped.extend(one.skipped)
            if skipped:
                tick(0, f"{len(skipped)} unusable")
            if len(skipped) > max_bad:
                last, path = skipped[-1], build.building / SKIPPED_NAME
                write_skipped(path, skipped)
                raise ValueError(
                    f"{len(skipped)} samples cannot be used and {max_bad} are allowed, e.g. "
                    f"{last.get('file', last['key'])}: {last['reason']}; those found so far are named in "
                    f"{path}; repair the source or raise --max-bad-share, finished shards are kept"
                )

        for one in made.values():
            check(one)

        run = _in_workers(build, todo, num_workers, device, tick) if num_workers else None
        for number, one in run or _here(build, todo, device, tick):
            made[number] = one
            check(one)
    finish_build(build, made)
    return put_in_place(build)


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
                "--encode-batch; finished shards are kept"
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


CODE_VERSION = 2  # raise it when the same inputs would give other samples


@dataclass(frozen=True)
class Coder:
    """What makes codes of pictures.

    Args:
        tokenizer: the image tokenizer.
        name: where it was read from, for people.
        device: cpu, or cuda.
        batch: pictures that are encoded at once; None: as many as suits their size.
    """

    tokenizer: ImageTokenizer
    name: str | None = None
    device: str = "cpu"
    batch: int | None = None


@dataclass(frozen=True)
class Wanted:
    """A folder of shards that should be there.

    Args:
        out_dir: the shards are in ``<out_dir>/<codes or raw>/<split>``.
        split: train or val.
        source: name of the data set.
        attribution: licence line of the pictures.
        transform: how pictures are brought to size.
        size: height and width in pixels.
        inputs: plain values that say what the shards are made from, apart from the tokenizer.
        pictures: gives the pictures; asked only if the shards must be built.
        coder: makes codes; None wants raw shards.
        samples_per_shard: records of every shard but the last.
    """

    out_dir: Path
    split: str
    source: str
    attribution: str
    transform: str
    size: tuple[int, int]
    inputs: Any
    pictures: Callable[[], PictureSet]
    coder: Coder | None
    samples_per_shard: int

    @property
    def kind(self) -> str:
        """codes or raw."""
        return "raw" if self.coder is None else "codes"

    def meta(self) -> ShardMeta:
        """What the shards' index will say; raises ValueError for a size the tokenizer does not divide."""
        tokenizer = self.coder.tokenizer if self.coder else None
        step = tokenizer.downsample if tokenizer else 1
        height, width = self.size
        if height % step or width % step:
            raise ValueError(f"image size {height}x{width}: must be multiples of {step} for this tokenizer")
        identity = tokenizer.identity if tokenizer else None
        inputs = [self.inputs, self.split, self.source, self.transform, list(self.size)]
        inputs += [self.samples_per_shard, identity, CODE_VERSION, FORMAT_VERSION]
        return ShardMeta(
            self.kind,
            self.split,
            self.source,
            *(codes_shape(tokenizer, height, width) if tokenizer else self.size),
            self.attribution,
            sha256_of_json(inputs),
            tokenizer.num_codes if tokenizer else None,
            identity,
            self.coder.name if self.coder else None,
            self.transform,
            self.size,
        )


def ensure_shards(wanted: Wanted, show_progress: bool = True, **options: Any) -> ShardIndex:
    """The index of the wanted shards, built if they are missing or stale.

    Args:
        wanted: the shards.
        show_progress: show a progress bar.
        options: further arguments of `build_folder`.

    Raises:
        ValueError: the folder holds another data set or lacks shards of its index; or of `build_folder`.
    """
    meta, folder = wanted.meta(), wanted.out_dir / wanted.kind / wanted.split
    index = _fresh_index(folder, meta)  # before the lock: fresh shards may be on a read-only disk
    if index is not None:
        return index
    coder = wanted.coder
    with _locked(wanted.out_dir):
        if index := _fresh_index(folder, meta):
            return index
        folder.parent.mkdir(parents=True, exist_ok=True)
        batch = coder.batch if coder else None
        if batch is None:
            factor = 16 if coder and coder.device == "cuda" else 1
            batch = max(1, factor * BATCH_PIXELS // (wanted.size[0] * wanted.size[1]))
        with stage("listing the pictures"):
            pictures = wanted.pictures()
        build = Build(
            folder,
            meta,
            pictures,
            coder.tokenizer if coder else None,
            wanted.samples_per_shard,
            batch,
        )
        device = coder.device if coder else "cpu"
        return build_folder(build, device=device, show_progress=show_progress, **options)


def _fresh_index(folder: Path, meta: ShardMeta) -> ShardIndex | None:
    """The index of the folder if its shards are what they should be; None if they must be built."""
    if not (folder / INDEX_NAME).is_file():
        if folder.exists() and any(folder.iterdir()):
            raise ValueError(
                f"{folder} holds files but no {INDEX_NAME}; choose another folder or empty this one"
            )
        return None
    try:
        index = ShardIndex.load(folder)
    except ValueError:
        if _source_of_older_format(folder) == meta.source:
            return None
        raise
    if index.meta.source != meta.source:
        raise ValueError(
            f"{folder} holds shards of {index.meta.source!r}, not of {meta.source!r}; choose another folder"
        )
    if index.meta.inputs_hash != meta.inputs_hash:
        return None
    index.check_files()
    return index


def _source_of_older_format(folder: Path) -> str | None:
    try:
        content = json.loads((folder / INDEX_NAME).read_text(encoding="utf-8"))
        return str(content["source"]) if content["format_version"] < FORMAT_VERSION else None
    except (ValueError, KeyError, TypeError):
        return None


@contextmanager
def _locked(out_dir: Path) -> Iterator[None]:
    """One process builds at a time; others wait and then find fresh shards."""
    out_dir.mkdir(parents=True, exist_ok=True)
    with (out_dir / ".prepare.lock").open("w") as stream:
        with stage(f"waiting for another process that prepares {out_dir}"):
            fcntl.flock(stream, fcntl.LOCK_EX)  # the kernel lets go of it when this process and its forks end
        yield
