"""Exact resumption: random states in checkpoints, saving on SIGTERM, time limits, which checkpoints are kept.

Lightning's own callbacks end a run but do not continue it to the last bit: they keep no random states, save
inside accumulated steps, and queue a job again before it was saved.
"""

from __future__ import annotations

import logging
import random
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import distributed

from sjd2_lightning.run.files import remove
from sjd2_lightning.run.processes import slurm_job, started_by_lightning

log = logging.getLogger(__name__)

TERMINATED = 143  # exit status of a process that SIGTERM ended: 128 + 15
# `=` has a meaning on the command line; it stood in the names of 0.1.0 and Lightning's
_NAME = re.compile(r"epoch[=_]\d+-step[=_](?P<step>\d+)\.ckpt")


class RandomStates(Callback):
    """Keeps the random states of Python, NumPy and torch, of every rank, in the checkpoint.

    They are put back in front of the first step, so that nothing before it counts. Validation leaves them as
    they were: a run that is stopped in front of one is not validated there when it goes on.
    """

    def __init__(self) -> None:
        self._found: list[dict[str, Any]] | None = None
        self._before: dict[str, Any] = {}

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notes the states."""
        self._before = _random_state()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Puts them back."""
        _restore(self._before)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Gathers the states of all ranks; every rank comes here, as saving is a matter of all."""
        states: list[Any] = [_random_state()]
        if trainer.world_size > 1:
            states = [None] * trainer.world_size
            distributed.all_gather_object(states, _random_state())
        checkpoint["random_states"] = states

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Notes the states for the first step, and puts Lightning's count of epochs right."""
        self._found = checkpoint.get("random_states")
        _count_begun_epoch(checkpoint)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Puts this rank's states back, once."""
        found, self._found = self._found, None
        if found is None:
            return
        if len(found) != trainer.world_size:
            log.warning(
                "the checkpoint is of %d ranks, this run has %d: global random states begin anew",
                len(found),
                trainer.world_size,
            )
            return
        _restore(found[trainer.global_rank])


def _count_begun_epoch(checkpoint: dict[str, Any]) -> None:
    """Counts the epoch that a checkpoint was saved in as begun.

    A run that goes on at the end of an epoch forgets to count the next one as begun. Where such a run is
    stopped at the end of an epoch too, Lightning would take the next epoch for the last one, and read its
    data a second time.
    """
    for counts in checkpoint.get("loops", {}).get("fit_loop", {}).get("epoch_progress", {}).values():
        if counts["processed"] == counts["completed"]:  # not saved between two epochs
            counts["ready"] = counts["started"] = counts["processed"] + 1


def _random_state() -> dict[str, Any]:
    """Plain values and tensors, as `weights_only` reads them."""
    name, keys, place, has_gauss, gauss = np.random.get_state()  # noqa: NPY002  the global one is what is kept
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), place, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def _restore(state: Mapping[str, Any]) -> None:
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


class Retention(ModelCheckpoint):
    """Lightning's `ModelCheckpoint`, which a killed run leaves in order.

    A name that exists is written over instead of getting a version behind it, checkpoints that a killed run
    had replaced but not yet removed are removed, and nothing is written after the last step, when averaged
    weights have taken the place of those that training would go on with.
    """

    def __init__(self, folder: Path, **settings: Any) -> None:
        super().__init__(
            folder,
            filename="epoch_{epoch}-step_{step}",
            auto_insert_metric_name=False,
            save_last=True,
            enable_version_counter=False,
            **settings,
        )
        self._newest: str | None = None
        self._step, self._whole, self._due = 0, True, False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Removes older checkpoints that the resumed state does not know."""
        super().on_train_start(trainer, pl_module)
        self._step = trainer.global_step
        self._tidy(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves at its interval, if the batch ended a step: gradients are not part of a checkpoint.

        Lightning alone saves behind the first batch after resuming, whatever it is accumulated with.
        """
        self._whole, self._step = trainer.global_step != self._step, trainer.global_step
        if self._whole:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
            if self._due:
                self.on_validation_end(trainer, pl_module)
            self._tidy(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves at its interval; behind the end of the step, if validation came inside one."""
        self._due = not self._whole
        if self._whole:
            super().on_validation_end(trainer, pl_module)
            self._tidy(trainer)

    def _save_topk_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Any]) -> None:
        """Where a validation could not measure what checkpoints are compared by, saves the last one alone."""
        if self.monitor is None or self.monitor in monitor_candidates:
            super()._save_topk_checkpoint(trainer, monitor_candidates)
        else:
            self._last_global_step_saved = trainer.global_step  # by which Lightning goes on to the last one

    def _tidy(self, trainer: Trainer) -> None:
        """After resuming: removes what is older than the step and not kept, what it started from too."""
        if self.best_model_path == self._newest or self.save_top_k < 0 or trainer.ckpt_path is None:
            return
        self._newest = self.best_model_path
        if trainer.is_global_zero:
            known = {Path(path).name for path in (*self.best_k_models, self.best_model_path)}
            for path in Path(str(self.dirpath)).glob("*.ckpt"):
                found = _NAME.fullmatch(path.name)
                if found and path.name not in known and int(found["step"]) < trainer.global_step:
                    remove(path)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See the class: `SaveOnTermination` has saved the last step."""


class SaveOnTermination(Callback):
    """Saves and ends a run that is told to, at the end of an optimizer step and on all ranks together.

    SIGTERM: exit status 143 (Lightning alone saves nothing and ends with 0). SIGUSR1 under Slurm: the job is
    put back into the queue too. The time limit: training ends as if it were complete. In each case, and after
    the last step, the checkpoint is that of the last whole step, from which the same command goes on.

    The handler only notes the signal, so nothing is cut short; a rank that was not told learns of it from
    the others. Place it behind weight averaging, whose update belongs to the step.

    Args:
        path: path of the checkpoint; None saves nothing.
        max_seconds: seconds of training in this process.
        requeue: command that puts the job back into its queue; () where there is none.
    """

    def __init__(
        self, path: str | Path | None, max_seconds: float | None = None, requeue: Sequence[str] = ()
    ) -> None:
        self.path = None if path is None else Path(path)
        self.max_seconds = max_seconds
        self.requeue = tuple(requeue)
        self._told: set[int] = set()
        self._before: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}
        self._start = 0.0
        self._step, self._whole, self._saved = 0, True, False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes over the signals: Lightning registers its own handlers before this."""
        self._start, self._step = time.monotonic(), trainer.global_step
        for number in (signal.SIGTERM, signal.SIGUSR1) if self.requeue else (signal.SIGTERM,):
            self._take(number, self._note)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before training there is nothing to save: SIGTERM ends the process, where Lightning would go on."""
        self._leave_if_told(trainer)
        if not self._before:
            self._take(signal.SIGTERM, _leave)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves and ends, if any rank was told to or the time is up; not between accumulated batches."""
        self._whole, self._step = trainer.global_step != self._step, trainer.global_step
        if not self._whole:
            return
        late = self.max_seconds is not None and time.monotonic() - self._start >= self.max_seconds
        if trainer.strategy.reduce_boolean_decision(bool(self._told) or late, all=False):
            if trainer.strategy.reduce_boolean_decision(bool(self._told), all=False):
                self._end(trainer)
                return
            log.warning("trainer.max_time is over; the same command with ckpt_path=auto goes on")
            self._save(trainer)
            trainer.should_stop = True
        elif 0 < trainer.max_steps <= trainer.global_step:
            self._save(trainer)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Ends a run that was saved: Lightning logs a step behind `on_train_batch_end`."""
        self._leave_if_told(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ends a run that was saved."""
        self._leave_if_told(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Acts on a signal that came during validation, which may take long, inside training."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            # inside a step the end of that step is waited for
            if self._whole and trainer.strategy.reduce_boolean_decision(bool(self._told), all=False):
                self._end(trainer)
        else:
            self._give_back()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Gives the signals back."""
        self._give_back()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Gives the signals back."""
        self._give_back()

    def _end(self, trainer: Trainer) -> None:
        log.warning("told to end: the same command with ckpt_path=auto goes on from %s", self.path)
        self._save(trainer)
        self._saved = True

    def _leave_if_told(self, trainer: Trainer) -> None:
        if not self._saved:
            return
        again = trainer.strategy.reduce_boolean_decision(signal.SIGUSR1 in self._told, all=False)
        if again and trainer.is_global_zero:
            put_back(self.requeue)
        # Lightning kills the whole run, and what it still has to write, when a process it started fails
        raise SystemExit(0 if started_by_lightning() else TERMINATED)

    def _save(self, trainer: Trainer) -> None:
        if self.path is not None:
            trainer.save_checkpoint(self.path, weights_only=False)  # the default, but said in the log

    def _take(self, number: int, handler: Callable[[int, FrameType | None], Any]) -> None:
        try:
            before = signal.signal(number, handler)
        except ValueError:  # only the main thread of a process may have handlers
            log.warning("training runs outside the main thread: signals will not save a checkpoint")
        else:
            self._before.setdefault(number, before)

    def _give_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
        self._told.clear()
        self._saved = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._told.add(number)


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(TERMINATED)


def put_back(command: Sequence[str]) -> None:
    """Puts a job back into its queue; a failure is reported with the command to run by hand."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        problem = done.stderr.strip() if done.returncode else ""
    except (OSError, subprocess.TimeoutExpired) as error:
        done, problem = None, str(error)
    if done is None or done.returncode:
        log.error("the job is not back in the queue (%s); run: %s", problem, shlex.join(command))
    else:
        log.warning("the job is back in the queue: %s", shlex.join(command))


def requeue_command() -> tuple[str, ...]:
    """Slurm's command for the job this process belongs to; () outside a batch job."""
    job = slurm_job()
    return ("scontrol", "requeue", job) if job else ()


def seconds_of(limit: str) -> float:
    """Seconds of DD:HH:MM:SS."""
    days, hours, minutes, seconds = map(int, limit.split(":"))
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)
