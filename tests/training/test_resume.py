"""What stops a run and what a stopped run leaves: signals, time limits, the queue, old checkpoints."""

import os
import signal
import stat
import time

import lightning as L
import pytest
import torch

from sjd2_lightning.run.files import remove_unfinished
from sjd2_lightning.run.processes import run_id, slurm_job
from sjd2_lightning.training.checkpoints import VerifiedCheckpointIO
from sjd2_lightning.training.resume import RandomStates, Retention, SaveOnTermination, put_back, seconds_of
from tests.training.test_module import QUIET, batch_of, loader, module_of

pytestmark = pytest.mark.filterwarnings(
    "ignore:You're resuming from a checkpoint that ended before the epoch"
)
IO = VerifiedCheckpointIO()
SLURM = {"SLURM_JOB_ID": "42", "SLURM_JOB_NAME": "train"}


def fit(folder, *callbacks, max_steps=6, start=None, **settings):
    """Two batches a step; the module that was trained."""
    module = module_of()
    trainer = L.Trainer(
        max_steps=max_steps,
        plugins=[IO],
        accumulate_grad_batches=2,
        callbacks=list(callbacks),
        **QUIET | {"enable_checkpointing": any(isinstance(c, Retention) for c in callbacks)} | settings,
    )
    trainer.fit(module, loader([batch_of(seed) for seed in range(16)]), loader([batch_of()]), ckpt_path=start)
    return trainer


class Tell(L.Callback):
    """Sends a signal to this process at the n-th call of a hook."""

    def __init__(self, hook, call, number=signal.SIGTERM):
        self.left = call
        setattr(self, hook, lambda *_: self._count(number))

    def _count(self, number):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), number)


@pytest.fixture(autouse=True)
def handlers():
    """Lightning leaves its own handlers behind."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_step_of_several_batches_is_not_cut(tmp_path):
    with pytest.raises(SystemExit) as end:
        fit(tmp_path, Tell("on_train_batch_start", 3), SaveOnTermination(tmp_path / "last.ckpt"))
    assert end.value.code == 143
    assert IO.load_checkpoint(tmp_path / "last.ckpt")["global_step"] == 2


def test_a_signal_during_validation_counts(tmp_path):
    told, save = Tell("on_validation_batch_end", 1), SaveOnTermination(tmp_path / "last.ckpt")
    with pytest.raises(SystemExit) as end:
        fit(tmp_path, told, save, val_check_interval=4, num_sanity_val_steps=0)
    assert end.value.code == 143
    assert IO.load_checkpoint(tmp_path / "last.ckpt")["global_step"] == 2


def test_a_signal_before_training_ends_the_process():
    callback = SaveOnTermination(None)
    trainer = L.Trainer(callbacks=[Tell("on_validation_batch_end", 1), callback], **QUIET)
    with pytest.raises(SystemExit) as end:
        trainer.validate(module_of(), loader([batch_of()]), verbose=False)
    assert end.value.code == 143


def test_a_time_limit_saves_the_last_whole_step_and_counts_from_each_start(tmp_path):
    class Slow(L.Callback):
        def on_train_batch_end(self, *_):
            time.sleep(0.05)

    path = tmp_path / "last.ckpt"
    trainer = fit(tmp_path, Slow(), SaveOnTermination(path, max_seconds=0.05), max_steps=4)
    assert trainer.global_step == 1
    assert IO.load_checkpoint(path)["global_step"] == 1
    again = fit(tmp_path, Slow(), SaveOnTermination(path, max_seconds=0.05), max_steps=4, start=path)
    assert again.global_step == 2


def test_the_last_step_is_saved(tmp_path):
    fit(tmp_path, SaveOnTermination(tmp_path / "last.ckpt"), max_steps=3)
    assert IO.load_checkpoint(tmp_path / "last.ckpt")["global_step"] == 3


def test_a_job_is_put_back_into_the_queue_after_it_was_saved(tmp_path, monkeypatch):
    stub = tmp_path / "scontrol"
    stub.write_text(f'#!/bin/sh\nls {tmp_path} > {tmp_path}/there\necho "$@" >> {tmp_path}/calls\n')
    stub.chmod(stub.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    save = SaveOnTermination(tmp_path / "last.ckpt", requeue=("scontrol", "requeue", "42"))
    with pytest.raises(SystemExit) as end:
        fit(tmp_path, Tell("on_train_batch_start", 1, signal.SIGUSR1), save)
    assert end.value.code == 143
    assert (tmp_path / "calls").read_text() == "requeue 42\n"
    assert "last.ckpt" in (tmp_path / "there").read_text()


def test_a_queue_that_refuses_is_reported_with_the_command(caplog):
    put_back(("false",))
    put_back(("no-such-command", "requeue", "42"))
    assert "run: false" in caplog.text
    assert "run: no-such-command requeue 42" in caplog.text


def test_random_states_are_those_of_the_step(tmp_path):
    class Draw(L.Callback):
        def __init__(self):
            self.seen = []

        def on_train_batch_end(self, *_):
            self.seen.append(float(torch.rand(())))

    whole, first, second = Draw(), Draw(), Draw()
    for draw, steps in ((whole, 6), (first, 3)):
        torch.manual_seed(3)
        fit(
            tmp_path / str(steps),
            draw,
            RandomStates(),
            SaveOnTermination(tmp_path / "last.ckpt"),
            max_steps=steps,
        )
        if steps == 3:
            torch.manual_seed(99)
            fit(tmp_path, second, RandomStates(), start=tmp_path / "last.ckpt")
    assert first.seen == whole.seen[:6]
    # what a plain loader does to its own batches is no matter here
    assert second.seen[: len(whole.seen) - 6] == whole.seen[6:]


def test_checkpoints_that_a_killed_run_had_replaced_are_removed(tmp_path):
    settings = {"every_n_train_steps": 1, "save_top_k": 1}
    fit(tmp_path, Retention(tmp_path, **settings), max_steps=2)
    saved = tmp_path / "epoch_0-step_2.ckpt"
    old = tmp_path / "epoch=0-step=1.ckpt"  # as 0.1.0 named them
    assert {path.name for path in tmp_path.glob("*.ckpt")} == {saved.name, "last.ckpt"}
    for name in (old.name, "epoch_0-step_1.ckpt", "mine.ckpt"):
        IO.save_checkpoint({"global_step": 1}, tmp_path / name)
    (tmp_path / ".epoch_0-step_3.ckpt.abc.writing").write_bytes(b"half")
    remove_unfinished(tmp_path)
    fit(tmp_path, Retention(tmp_path, **settings), max_steps=4, start=saved)
    assert {path.name for path in tmp_path.iterdir()} == {"epoch_0-step_4.ckpt", "last.ckpt", "mine.ckpt"}


class Fail(L.Callback):
    """Ends a run behind its first batch."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx % 2:
            raise InterruptedError


def test_no_checkpoint_is_written_between_accumulated_batches(tmp_path):
    settings = {"every_n_train_steps": 1, "save_top_k": 1}
    fit(tmp_path, Retention(tmp_path, **settings), max_steps=2)
    before = (tmp_path / "last.ckpt").read_bytes()
    with pytest.raises(InterruptedError):
        fit(tmp_path, Retention(tmp_path, **settings), Fail(), max_steps=4, start=tmp_path / "last.ckpt")
    assert (tmp_path / "last.ckpt").read_bytes() == before


def test_a_validation_inside_a_step_saves_behind_it(tmp_path):
    settings = {"every_n_train_steps": None, "save_top_k": -1}
    fit(tmp_path, Retention(tmp_path, **settings), max_steps=4, val_check_interval=3)
    assert {path.name for path in tmp_path.glob("epoch*")} == {"epoch_0-step_2.ckpt", "epoch_0-step_3.ckpt"}
    for path in tmp_path.glob("epoch*"):
        progress = IO.load_checkpoint(path)["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        assert progress["current"]["ready"] % 2 == 0, path


def test_a_checkpoint_of_an_older_name_goes_on(tmp_path):
    settings = {"every_n_train_steps": 1, "save_top_k": 1}
    fit(tmp_path, Retention(tmp_path, **settings), max_steps=2)
    old = (tmp_path / "epoch_0-step_2.ckpt").rename(tmp_path / "epoch=0-step=2.ckpt")
    fit(tmp_path, Retention(tmp_path, **settings), max_steps=3, start=old)
    assert {path.name for path in tmp_path.glob("*.ckpt")} == {"epoch_0-step_3.ckpt", "last.ckpt"}


def test_all_checkpoints_are_kept_where_that_is_asked_for(tmp_path):
    settings = {"every_n_train_steps": 1, "save_top_k": -1}
    fit(tmp_path, Retention(tmp_path, **settings), max_steps=2)
    fit(tmp_path, Retention(tmp_path, **settings), max_steps=3, start=tmp_path / "last.ckpt")
    assert len(list(tmp_path.glob("epoch_*.ckpt"))) == 3


def test_seconds_of_a_limit():
    assert seconds_of("01:02:03:04") == 86400 + 2 * 3600 + 3 * 60 + 4


def test_a_run_has_one_name_for_all_its_processes():
    name = run_id(SLURM, ["a=1"])
    assert name.startswith("slurm-42-")
    assert run_id(SLURM | {"SLURM_PROCID": "3"}, ["a=1"]) == name
    assert run_id(SLURM, ["a=2"]) != name, "two runs of one job do not share a folder"
    assert run_id({"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "4"}) == "x"
    assert run_id({})[:2] == "20"
    with pytest.raises(ValueError, match="run_dir: the processes of this run have no name in common"):
        run_id({"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "4"})


def test_the_number_of_a_slurm_job():
    assert slurm_job(SLURM) == "42"
    assert slurm_job(SLURM | {"SLURM_ARRAY_JOB_ID": "40", "SLURM_ARRAY_TASK_ID": "7"}) == "40_7"
    assert slurm_job(SLURM | {"SLURM_JOB_NAME": "bash"}) is None
    assert slurm_job({"SLURM_JOB_ID": "42; rm"}) is None
    assert slurm_job({}) is None
