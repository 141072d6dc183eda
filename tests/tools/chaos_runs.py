"""Training that is killed again and again, at random moments and while it saves.

As a program (`python -m tests.tools.chaos_runs FOLDER NUM_KILLS SEED`) it imports once and forks: a start
costs a second. What it found is written to FOLDER/found.json.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from sjd2_lightning.training.checkpoints import VerifiedCheckpointIO, newest_sound_checkpoint
from tests.tools.training_runs import digest, make_folder, places, run

NUM_STEPS, INTERVAL = 40, 2
SETTINGS = (
    *(f"trainer.max_steps={NUM_STEPS}", f"callbacks.checkpoint.every_n_train_steps={INTERVAL}"),
    *("trainer.val_check_interval=12", "trainer.accumulate_grad_batches=2", "callbacks.ema_decay=0.9"),
    "ckpt_path=auto",
)


class Start:
    """One start of a run, in a process of its own that notes each step it begins."""

    def __init__(self, folder: Path, run_dir: Path) -> None:
        self.run_dir, self.steps = run_dir, run_dir.parent / "steps.txt"
        self.batches = run_dir.parent / "batches.txt"  # of all starts
        run_dir.mkdir(parents=True, exist_ok=True)
        self.steps.write_text("")
        self.pid = os.fork()
        if self.pid == 0:
            self._train(folder)

    def _train(self, folder: Path) -> None:
        from sjd2_lightning.training.module import SJD2Module

        step = SJD2Module.training_step

        def training_step(module: Any, batch: Any, batch_idx: int) -> Any:
            with self.steps.open("a") as file:
                file.write(f"begin {module.global_step}\n")
            loss = step(module, batch, batch_idx)
            seen = digest(list(batch.keys), float(loss.detach()).hex())
            with self.batches.open("a") as file:
                file.write(f"{module.global_step}.{batch_idx} {seen}\n")
            return loss

        SJD2Module.training_step = training_step  # type: ignore[method-assign]
        log = os.open(self.run_dir.parent / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        status = 1
        try:
            _, status = run([*places(folder, self.run_dir), *SETTINGS])
        finally:
            os._exit(status)

    @property
    def begun(self) -> list[int]:
        """Steps begun so far."""
        return [int(line.split()[1]) for line in self.steps.read_text().splitlines()]

    def ended(self) -> int | None:
        """The wait status, or None while it runs."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        return status if pid else None

    def wait(self) -> int:
        """Until it ends by itself."""
        return os.waitpid(self.pid, 0)[1]

    def kill(self) -> None:
        """SIGKILL."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def temporaries(run_dir: Path) -> set[Path]:
    """Files that are not whole."""
    return set(run_dir.rglob(".*.writing"))


def newest_step(run_dir: Path) -> int:
    """The step of the newest checkpoint, which must load; 0 without one."""
    path = newest_sound_checkpoint(run_dir / "checkpoints")
    return 0 if path is None else int(VerifiedCheckpointIO().load_checkpoint(path)["global_step"])


def kill_once(start: Start, rng: random.Random, longest: float, while_saving: bool) -> bool:
    """Kills a start at a random moment of its training, or while it writes; False if it ended before."""
    moment = time.monotonic() + rng.uniform(0, longest)
    before = temporaries(start.run_dir)
    armed = False
    while start.ended() is None:
        if not armed and start.begun:
            armed, moment = True, time.monotonic() + rng.uniform(0, longest)
        if armed and time.monotonic() >= moment and (not while_saving or temporaries(start.run_dir) - before):
            start.kill()
            return True
        time.sleep(0.0005)
    return False


def chaos(folder: Path, num_kills: int, seed: int) -> dict[str, Any]:
    """Kills runs until there were enough; complete ones are compared by the caller."""
    rng, kills, complete = random.Random(seed), [], []
    make_folder(folder)
    reference = Start(folder, folder / "whole" / "run")
    began = time.monotonic()
    while not reference.begun and reference.ended() is None:
        time.sleep(0.001)
    began = time.monotonic()
    assert reference.wait() == 0, (folder / "whole" / "log.txt").read_text()[-2000:]
    seconds = time.monotonic() - began
    number = 0
    while len(kills) < num_kills or not complete:
        run_dir = folder / f"killed{number}" / "run"
        left, saved = temporaries(run_dir), newest_step(run_dir)
        start = Start(folder, run_dir)
        if len(kills) < num_kills:
            killed = kill_once(start, rng, seconds / 8, while_saving=len(kills) % 2 == 1)
        else:
            assert start.wait() == 0
            killed = False
        if start.begun:
            assert start.begun[0] == saved, "it goes on from the newest checkpoint"
            assert not left & temporaries(run_dir), "leftovers are removed"
        if killed:
            done = max([saved, *start.begun])  # a step begun has those before it behind it
            kills.append({"done": done, "saved": newest_step(run_dir), "left": len(temporaries(run_dir))})
        else:
            complete.append(str(run_dir))
            number += 1
    return {"kills": kills, "complete": complete, "seconds": seconds}


if __name__ == "__main__":
    torch.set_num_threads(1)
    target = Path(sys.argv[1])
    found = chaos(target, int(sys.argv[2]), int(sys.argv[3]))
    (target / "found.json").write_text(json.dumps(found))
