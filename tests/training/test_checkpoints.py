"""Checkpoints: whole or absent, checked when read, written on SIGTERM, and resumed to the last bit."""

import errno
import os
import signal
import subprocess
import zipfile

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.distributed.checkpoint import save

from sjd2_lightning.training.checkpoints import (
    VerifiedCheckpointIO,
    check_checkpoint,
    newest_sound_checkpoint,
)
from sjd2_lightning.training.guards import NonFiniteGuard
from sjd2_lightning.training.resume import TERMINATED, SaveOnTermination
from tests.training.test_module import QUIET, batch_of, loader, module_of

STATE = {"state_dict": {"weight": torch.arange(4000.0)}, "global_step": 7, "note": "plain"}
IO = VerifiedCheckpointIO()


@pytest.fixture
def path(tmp_path):
    IO.save_checkpoint(STATE, tmp_path / "run" / "last.ckpt")
    return tmp_path / "run" / "last.ckpt"


def flip(path, position):
    """Changes one bit of a file."""
    content = bytearray(path.read_bytes())
    content[position] ^= 4
    path.write_bytes(content)


def weights_at(path):
    """Where the bytes of the weights lie in a checkpoint."""
    content = path.read_bytes()
    return content.index(STATE["state_dict"]["weight"].numpy().tobytes())


def test_round_trip_leaves_nothing_else(path):
    found = IO.load_checkpoint(path)
    assert torch.equal(found["state_dict"]["weight"], STATE["state_dict"]["weight"])
    assert (found["global_step"], found["note"]) == (7, "plain")
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize("offset", [0, 1, 7999, 15_999])
def test_a_flipped_bit_is_found(path, offset):
    flip(path, weights_at(path) + offset)
    torch.load(path, weights_only=True)  # torch alone does not notice
    with pytest.raises(ValueError, match=r"last\.ckpt is damaged at .*another one in its folder"):
        IO.load_checkpoint(path)


@pytest.mark.parametrize("content", [b"", b"garbage", None], ids=["empty", "garbage", "cut short"])
def test_what_is_no_checkpoint_is_named(path, content):
    path.write_bytes(path.read_bytes()[:9000] if content is None else content)
    with pytest.raises(ValueError, match=r"last\.ckpt cannot be read"):
        IO.load_checkpoint(path)


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"gone\.ckpt cannot be read"):
        IO.load_checkpoint(tmp_path / "gone.ckpt")


class Payload:
    """Runs a command when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch ran",)


def test_pickled_code_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {}, "extra": Payload()}, tmp_path / "hostile.ckpt")
    with pytest.raises(ValueError, match=r"hostile\.ckpt is not one of this project's training"):
        IO.load_checkpoint(tmp_path / "hostile.ckpt", weights_only=False)
    assert not (tmp_path / "ran").exists()


def test_a_full_disk_leaves_the_old_checkpoint(path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"last\.ckpt cannot be written: .*No space left.*is intact"):
        IO.save_checkpoint({"global_step": 8}, path)
    assert IO.load_checkpoint(path)["global_step"] == 7
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]


def test_a_disk_that_fills_up_leaves_the_old_checkpoint(small_disk):
    path = small_disk / "last.ckpt"
    IO.save_checkpoint(STATE, path)
    with pytest.raises(OSError, match=r"disk/last\.ckpt cannot be written.*is intact"):
        IO.save_checkpoint(STATE | {"more": torch.rand(400_000)}, path)
    assert IO.load_checkpoint(path)["global_step"] == 7
    assert [file.name for file in small_disk.iterdir()] == ["last.ckpt"]


def test_a_disk_that_is_read_only_is_named(small_disk):
    path = small_disk / "last.ckpt"
    IO.save_checkpoint(STATE, path)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(OSError, match=r"disk/last\.ckpt cannot be written: .*Read-only"):
        IO.save_checkpoint(STATE | {"global_step": 8}, path)
    assert IO.load_checkpoint(path)["global_step"] == 7


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(OSError, match=r"run/last\.ckpt cannot be written"):
        IO.save_checkpoint(STATE, tmp_path / "run" / "last.ckpt")


def test_leftovers_of_a_killed_run_are_removed(path):
    (path.parent / ".last.ckpt.abc.writing").write_bytes(b"half")
    other = path.parent / ".other.ckpt.abc.writing"
    other.write_bytes(b"of a checkpoint of another name")
    IO.save_checkpoint(STATE, path)
    assert sorted(file.name for file in path.parent.iterdir()) == [other.name, "last.ckpt"]


def test_the_newest_sound_checkpoint_is_chosen(path, caplog):
    assert newest_sound_checkpoint(path.parent / "none") is None
    newer = path.with_name("newer.ckpt")
    IO.save_checkpoint(STATE, newer)
    os.utime(newer, (2**31, 2**31))
    assert newest_sound_checkpoint(path.parent) == newer
    flip(newer, weights_at(newer))
    assert newest_sound_checkpoint(path.parent) == path
    assert "newer.ckpt is damaged" in caplog.text


def test_a_sharded_checkpoint_is_a_folder_and_may_be_the_newest(path):
    sharded = path.with_name("sharded.ckpt")
    save({"state_dict": {"weight": torch.arange(4.0)}, "lr": 0.1}, checkpoint_id=sharded, no_dist=True)
    os.utime(sharded, (2**31, 2**31))
    assert newest_sound_checkpoint(path.parent) == path, "not whole: meta.pt is missing"
    torch.save({"global_step": 7}, sharded / "meta.pt")
    os.utime(sharded, (2**31, 2**31))
    assert newest_sound_checkpoint(path.parent) == sharded


class Terminate(L.Callback):
    """Tells the process to end in the middle of a step."""

    def __init__(self, step):
        self.step = step

    def on_after_backward(self, trainer, module):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def fit(folder, *callbacks, ckpt_path=None, num_steps=6):
    """Six steps on six batches, validated and saved at every third."""
    module = module_of()
    trainer = L.Trainer(
        max_steps=num_steps,
        val_check_interval=3,
        plugins=[VerifiedCheckpointIO()],
        callbacks=[
            *callbacks,
            SaveOnTermination(folder / "last.ckpt"),
            ModelCheckpoint(folder, save_last=True, every_n_train_steps=2),
        ],
        **QUIET | {"enable_checkpointing": True},
    )
    trainer.fit(
        module, loader([batch_of(seed) for seed in range(6)]), loader([batch_of()]), ckpt_path=ckpt_path
    )
    return module


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.parametrize("step", [1, 2, 3])
def test_sigterm_saves_exits_143_and_resuming_is_bitwise(tmp_path, step, request):
    before = signal.getsignal(signal.SIGTERM)
    request.addfinalizer(lambda: signal.signal(signal.SIGTERM, before))  # Lightning leaves its own behind
    whole = fit(tmp_path / "whole")
    with pytest.raises(SystemExit) as end:
        fit(tmp_path / "cut", Terminate(step))
    assert end.value.code == TERMINATED == 143
    assert not isinstance(getattr(signal.getsignal(signal.SIGTERM), "__self__", None), SaveOnTermination)
    saved = tmp_path / "cut" / "last.ckpt"
    assert IO.load_checkpoint(saved)["global_step"] == step + 1
    # the loader here is a plain one, so the batches that were used are left out by hand
    resumed = module_of()
    trainer = L.Trainer(max_steps=6, val_check_interval=3, plugins=[VerifiedCheckpointIO()], **QUIET)
    batches = loader([batch_of(seed) for seed in [*range(step + 1, 6), *range(step + 1)]])
    trainer.fit(resumed, batches, loader([batch_of()]), ckpt_path=saved)
    assert trainer.global_step == 6
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


class Poison(L.Callback):
    """Spoils one gradient at the given steps."""

    def __init__(self, *batches):
        self.batches, self.seen = batches, 0

    def on_after_backward(self, trainer, module):
        if self.seen in self.batches:
            next(p.grad for p in module.parameters() if p.grad is not None)[0] = float("nan")
        self.seen += 1


def test_a_gradient_that_is_not_finite_stops_training_before_it_hurts(tmp_path):
    with pytest.raises(FloatingPointError, match="not finite at step 2"):
        fit(tmp_path, Poison(2), NonFiniteGuard("stop"))
    saved = IO.load_checkpoint(tmp_path / "last.ckpt")
    assert saved["global_step"] == 2
    assert all(value.isfinite().all() for value in saved["state_dict"].values())


def test_without_the_guard_it_hurts(tmp_path):
    assert not all(value.isfinite().all() for value in fit(tmp_path, Poison(2)).state_dict().values())


@pytest.mark.filterwarnings("ignore:You are trying to `self.log")
def test_a_skipped_step_changes_no_weight(tmp_path):
    class Keep(L.Callback):
        weights = None

        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            self.weights = {name: value.clone() for name, value in module.state_dict().items()}

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            same = all(torch.equal(value, self.weights[name]) for name, value in module.state_dict().items())
            assert same == (batch_idx == 2)

    guard = NonFiniteGuard("skip")
    module = fit(tmp_path, Poison(2), guard, Keep())
    assert guard.num_skipped == 1
    assert all(value.isfinite().all() for value in module.state_dict().values())


def test_skipping_has_an_end(tmp_path):
    with pytest.raises(FloatingPointError, match="not finite at step"):
        fit(tmp_path, Poison(*range(6)), NonFiniteGuard("skip", max_in_a_row=3))


def test_the_sums_are_those_of_the_archive(path):
    """What the check relies on: torch writes real sums into its archive."""
    with zipfile.ZipFile(path) as archive:
        assert any(entry.CRC for entry in archive.infolist() if "data/" in entry.filename)
    check_checkpoint(path)
