"""A run that is killed and goes on gives what a run in one go gives: tokens, numbers, nothing lost."""

import json
import multiprocessing
import os
import signal
import socket
import time

import numpy as np
import pytest
import torch

from sjd2_lightning.data.pictures import read_image
from sjd2_lightning.evaluation.compare import decode_methods
from sjd2_lightning.evaluation.store import RecordStore
from tests.tools.small_evaluation import METHODS, PROMPTS, SIDE, evaluate, numbers, small_backbone, tokens

pytestmark = [pytest.mark.slow, pytest.mark.resume]

SOME = {name: METHODS[name] for name in ("ar", "sjd2")}
FORK = multiprocessing.get_context("fork")
MAX_KILLS = 3


def decode(folder, rank=0, world_size=1, port=0):
    """What a killed process was doing."""
    torch.set_num_threads(1)
    if world_size > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        torch.distributed.init_process_group("gloo", rank=rank, world_size=world_size)
    backbone = small_backbone()
    layout = backbone.layout(SIDE, SIDE)
    decode_methods(backbone, SOME, PROMPTS, layout, folder, batch_size=2, warm_up=False, progress=False)
    if world_size > 1:
        torch.distributed.destroy_process_group()


def start(folder, world_size):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [FORK.Process(target=decode, args=(folder, r, world_size, port)) for r in range(world_size)]
    for process in processes:
        process.start()
    return processes


def end(processes):
    for process in processes:
        process.join(240)
    assert [process.exitcode for process in processes] == [0] * len(processes)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The result of a run in one go."""
    return evaluate(tmp_path_factory.mktemp("whole"), methods=SOME)


@pytest.fixture(scope="module")
def duration(tmp_path_factory):
    """Seconds of a run in one go, by number of ranks."""
    found = {}
    for world_size in (1, 2):
        begin = time.monotonic()
        end(start(tmp_path_factory.mktemp("timed") / "out", world_size))
        found[world_size] = time.monotonic() - begin
    return found


def kill_at_random(folder, world_size, rng, seconds):
    """Kills all processes of a run at a random moment; whether they were still at it."""
    processes = start(folder, world_size)
    time.sleep(rng.uniform(0, seconds))
    running = [process for process in processes if process.is_alive()]
    for process in running:
        os.kill(process.pid, signal.SIGKILL)
    for process in processes:
        process.join(60)
    return bool(running)


def check_what_lies_there(folder):
    """Whatever the moment: every image that has its name is whole, and every record has its image."""
    for path in folder.glob("images/*/[!.]*.png"):
        assert read_image(path).shape == (SIDE, SIDE, 3)
    if (folder / "run.json").is_file():
        identity = json.loads((folder / "run.json").read_text())["identity"]
        for record in RecordStore(folder, identity).load():
            assert len(record.image_ids) == 16


def check_end(folder, whole):
    """The same as in one go, by a process that only has to measure."""
    stamps = {path: path.stat().st_mtime_ns for path in folder.glob("images/*/*")}
    result = evaluate(folder, methods=SOME)
    assert stamps == {path: path.stat().st_mtime_ns for path in folder.glob("images/*/*")}
    assert tokens(result) == tokens(whole)
    assert numbers(result) == numbers(whole)
    for name in SOME:
        for own, other in zip(result.methods[name].records, whole.methods[name].records, strict=True):
            assert torch.equal(
                read_image(result.store.image_path(own)), read_image(whole.store.image_path(other))
            )
    assert len(stamps) == len(SOME) * len(PROMPTS)
    assert not list(folder.rglob(".*")), "temporary files are left"


@pytest.mark.parametrize("trial", range(10))
def test_killed_at_random_moments(whole, duration, tmp_path, trial):
    rng, num_kills, seconds = np.random.default_rng(trial), 0, duration[1]
    folder = tmp_path / "out"
    while num_kills < MAX_KILLS:
        if not kill_at_random(folder, 1, rng, seconds):
            if num_kills:
                break  # it had time to end
            folder, seconds = tmp_path / f"out-{seconds}", seconds / 2
            continue
        num_kills += 1
        check_what_lies_there(folder)
    end(start(folder, 1))
    check_end(folder, whole)


@pytest.mark.parametrize(("before", "after"), [(2, 2), (2, 1), (1, 2)])
def test_killed_and_resumed_by_another_number_of_ranks(whole, duration, tmp_path, before, after):
    rng, folder = np.random.default_rng(10 * before + after), tmp_path / "out"
    for _ in range(2):
        kill_at_random(folder, before, rng, duration[before])
        check_what_lies_there(folder)
    end(start(folder, after))
    check_end(folder, whole)
