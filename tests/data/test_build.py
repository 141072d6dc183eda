"""Building in parallel: the same bytes for any number of processes and any number of kills."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from sjd2_lightning.data import build as building
from sjd2_lightning.data import ensure as parallel
from sjd2_lightning.data.ensure import Coder, Wanted, ensure_shards
from sjd2_lightning.data.index import ShardIndex
from sjd2_lightning.data.reading import read_all
from tests.tools.shards import GreyTokenizer


@dataclass(frozen=True)
class Noise:
    """Made-up pictures with two captions each; some cannot be read, and each takes its time."""

    num_pictures: int = 40
    bad: tuple[int, ...] = (7, 23)
    seconds: float = 0.0
    records: list[tuple[int, int]] = field(init=False)

    def __post_init__(self) -> None:
        records = [(picture, caption) for picture in range(self.num_pictures) for caption in range(2)]
        object.__setattr__(self, "records", records)

    def picture(self, record: tuple[int, int]) -> int:
        return record[0]

    def image(self, record: tuple[int, int]) -> np.ndarray:
        time.sleep(self.seconds)
        if record[0] in self.bad:
            raise ValueError("torn")
        return np.random.default_rng(record[0]).integers(0, 256, (8, 8, 3), dtype=np.uint8)

    def facts(self, record: tuple[int, int]) -> dict[str, Any]:
        return {"key": f"p{record[0]}_c{record[1]}", "caption": f"caption {record[1]} of {record[0]}"}


def build(folder: Path, noise: Noise | None = None, inputs: str = "noise", **options: Any) -> ShardIndex:
    noise = noise or Noise()
    coder = Coder(GreyTokenizer(), "grey", batch=3)
    wanted = Wanted(folder, "train", "noise", "ours", "none", (8, 8), inputs, lambda: noise, coder, 6)
    return ensure_shards(wanted, show_progress=False, **{"max_bad": 8} | options)


def digest(folder: Path) -> dict[str, str]:
    """Hash of every file that is meant to stay."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".prepare.lock"]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}


@pytest.fixture
def unbroken(tmp_path: Path) -> dict[str, str]:
    build(tmp_path / "unbroken")
    return digest(tmp_path / "unbroken")


def test_what_is_built(tmp_path: Path) -> None:
    index = build(tmp_path)
    assert index == ShardIndex.load(tmp_path / "codes" / "train")
    assert index.num_samples == 76
    assert index.meta.num_skipped == 4
    assert (index.meta.tokenizer_hash, index.meta.tokenizer) == ("grey-1", "grey")
    assert (index.meta.height, index.meta.width, index.meta.pixel_size) == (2, 2, (8, 8))
    samples = list(read_all(tmp_path / "codes" / "train"))
    assert [s.caption for s in samples[:2]] == ["caption 0 of 0", "caption 1 of 0"]
    low = min(int(s.image_ids.min()) for s in samples)
    high = max(int(s.image_ids.max()) for s in samples)
    ranges = [shard.code_range for shard in index.shards if shard.code_range]
    assert (min(low for low, _ in ranges), max(high for _, high in ranges)) == (low, high)
    skipped = (tmp_path / "codes" / "train" / "skipped.jsonl").read_text().splitlines()
    assert json.loads(skipped[0]) == {"key": "p7_c0", "reason": "torn"}


def test_a_picture_is_encoded_once_for_all_its_captions(tmp_path: Path) -> None:
    tokenizer = GreyTokenizer()
    wanted = Wanted(tmp_path, "train", "noise", "", "", (8, 8), 0, lambda: Noise(bad=()), Coder(tokenizer), 6)
    ensure_shards(wanted, show_progress=False)
    assert tokenizer.num_encoded == 40


def test_workers_change_no_byte(tmp_path: Path, unbroken: dict[str, str]) -> None:
    build(tmp_path / "workers", num_workers=2)
    assert digest(tmp_path / "workers") == unbroken


def killed_build(folder: Path, seconds: float, num_workers: int, slow: float) -> None:
    """A build in a process of its own that SIGKILL ends after so many seconds."""
    child = os.fork()
    if not child:
        try:
            build(folder, Noise(seconds=slow), num_workers=num_workers)
        finally:
            os._exit(0)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_killed_at_random_moments(tmp_path: Path, unbroken: dict[str, str], num_workers: int) -> None:
    rng, folder = Random(num_workers), tmp_path / "killed"
    for attempt in range(6):
        killed_build(folder, 0.02 + 0.15 * rng.random(), num_workers, 0.02)  # a whole build sleeps 0.8 s
        finished = (folder / "codes" / "train" / "index.json").exists()
        assert not (finished and attempt == 0), "the kill came too late to interrupt anything"
        assert not finished or digest(folder) == unbroken
    build(folder, num_workers=num_workers)
    assert digest(folder) == unbroken


@pytest.mark.slow
def test_killed_often(tmp_path: Path, unbroken: dict[str, str]) -> None:
    rng = Random(5)
    for attempt in range(20):
        folder = tmp_path / f"killed{attempt}"
        while not (folder / "codes" / "train" / "index.json").exists():
            killed_build(folder, 0.3 * rng.random(), attempt % 3, 0.002)
        build(folder)
        assert digest(folder) == unbroken


def test_finished_shards_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    make_shard = parallel.make_shard

    def stops(build: Any, number: int, device: str, tick: Any) -> Any:
        if number == 4:
            raise KeyboardInterrupt
        made.append(number)
        return make_shard(build, number, device, tick)

    monkeypatch.setattr(parallel, "make_shard", stops)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path)
    waiting = tmp_path / "codes" / ".train-building"
    (waiting / "train-00002.tar").write_bytes(b"damaged meanwhile")
    monkeypatch.setattr(parallel, "make_shard", lambda b, n, d, t: made.append(n) or make_shard(b, n, d, t))
    build(tmp_path)
    assert made == [0, 1, 2, 3, 2, *range(4, 14)]


def test_killed_while_publishing(tmp_path: Path, unbroken: dict[str, str], monkeypatch: Any) -> None:
    monkeypatch.setattr(building, "replace_folder", lambda new, folder: (_ for _ in ()).throw(SystemExit))
    with pytest.raises(SystemExit):
        build(tmp_path / "killed")
    monkeypatch.undo()
    monkeypatch.setattr(parallel, "make_shard", lambda *_: pytest.fail("made again"))
    build(tmp_path / "killed")
    assert digest(tmp_path / "killed") == unbroken


def test_other_inputs_start_anew(tmp_path: Path) -> None:
    killed_build(tmp_path, 0.1, 0, 0.003)
    build(tmp_path, inputs="other")
    other = digest(tmp_path)
    build(tmp_path / "fresh", inputs="other")
    assert digest(tmp_path / "fresh") == {k: v for k, v in other.items() if not k.startswith("fresh")}


def test_too_many_unusable_pictures_stop_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot be used and 1 are allowed, e\.g\. p7_c1: torn"):
        build(tmp_path, max_bad=1)
    assert build(tmp_path, max_bad=4).meta.num_skipped == 4


def test_an_error_in_a_worker_arrives_and_ends_the_others(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be used"):
        build(tmp_path, num_workers=2, max_bad=0)


def test_a_killed_worker_is_reported(tmp_path: Path) -> None:
    class Kills(Noise):
        def image(self, record: tuple[int, int]) -> np.ndarray:
            if record[0] == 20:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().image(record)

    with pytest.raises(ValueError, match="A worker was killed, most often for memory"):
        build(tmp_path, Kills(), num_workers=2)
    build(tmp_path)


def test_workers_end_with_a_killed_parent(tmp_path: Path) -> None:
    started = tmp_path / "pids"
    started.mkdir()

    class Notes(Noise):
        def image(self, record: tuple[int, int]) -> np.ndarray:
            (started / str(os.getpid())).touch()
            time.sleep(0.05)
            return super().image(record)

    child = os.fork()
    if not child:
        try:
            build(tmp_path / "out", Notes(), num_workers=2)
        finally:
            os._exit(0)
    while len(list(started.iterdir())) < 2:
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    workers, until = [int(path.name) for path in started.iterdir()], time.monotonic() + 5
    while any(_alive(pid) for pid in workers) and time.monotonic() < until:
        time.sleep(0.05)
    assert not [pid for pid in workers if _alive(pid)]


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_size_that_the_tokenizer_does_not_divide_is_refused(tmp_path: Path) -> None:
    wanted = Wanted(tmp_path, "train", "n", "", "", (8, 10), 0, Noise, Coder(GreyTokenizer()), 6)
    with pytest.raises(ValueError, match="image size 8x10: must be multiples of 4"):
        ensure_shards(wanted)


def test_repeated_keys_are_refused(tmp_path: Path) -> None:
    class Twice(Noise):
        def facts(self, record: tuple[int, int]) -> dict[str, Any]:
            return {"key": f"p{record[0]}", "caption": "same"}

    with pytest.raises(ValueError, match="'p0' repeats"):
        build(tmp_path, Twice())
