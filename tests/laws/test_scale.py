"""Two ranks compute what one process does, by DDP and by FSDP2."""

import pickle

import pytest
import torch

from sjd2_lightning.training.checkpoints import check_checkpoint, newest_sound_checkpoint
from tests.tools import scale_runs
from tests.tools.training_runs import on_ranks

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What two ranks found, and their folder."""
    folder = tmp_path_factory.mktemp("ranks")
    on_ranks(2, "tests.tools.scale_runs", str(folder), log_dir=folder)
    return torch.load(folder / "found.pt", weights_only=True), folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process finds on whole batches."""
    return scale_runs.few_steps("auto", tmp_path_factory.mktemp("alone"))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks_are_one_process(ranks, alone, strategy):
    found, _ = ranks
    assert found[strategy]["losses"] == pytest.approx(alone["losses"], abs=1e-5)
    assert len(alone["losses"]) == scale_runs.NUM_STEPS * scale_runs.ACCUMULATE
    for name, value in alone["state"].items():
        assert torch.allclose(found[strategy]["state"][name], value, atol=1e-5), name


def test_a_sharded_run_goes_on_bitwise(ranks):
    found, folder = ranks
    assert found["fsdp resumed"]["losses"] == found["fsdp"]["losses"][4:]
    for name, value in found["fsdp"]["state"].items():
        assert torch.equal(found["fsdp resumed"]["state"][name], value), name
    saved = folder / "fsdp" / "step=2.ckpt"
    assert len(list(saved.glob("*.distcp"))) == 2, "a part of each rank"
    check_checkpoint(saved)
    assert newest_sound_checkpoint(folder / "fsdp") is not None
    assert not list(folder.rglob(".*.writing"))


class Payload:
    """Runs a command when it is unpickled."""

    def __reduce__(self):
        import os

        return os.system, ("touch ran",)


def test_a_sharded_checkpoint_that_is_damaged_or_hostile_is_passed_over(ranks, tmp_path, monkeypatch, caplog):
    import shutil

    _, folder = ranks
    monkeypatch.chdir(tmp_path)
    for name in ("cut", "hostile"):
        shutil.copytree(folder / "fsdp" / "step=4.ckpt", tmp_path / f"{name}.ckpt")
    next((tmp_path / "cut.ckpt").glob("*.distcp")).unlink()
    (tmp_path / "hostile.ckpt" / ".metadata").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(ValueError, match=r"cut\.ckpt cannot be read \(it is not whole: "):
        check_checkpoint(tmp_path / "cut.ckpt")
    with pytest.raises(ValueError, match=r"hostile\.ckpt is damaged at \.metadata"):
        check_checkpoint(tmp_path / "hostile.ckpt")
    (tmp_path / "hostile.ckpt" / "sums.json").unlink()  # as of 0.1.0, or by somebody who writes them anew
    with pytest.raises(ValueError, match=r"hostile\.ckpt is not one .*: it names posix\.system"):
        check_checkpoint(tmp_path / "hostile.ckpt")
    assert newest_sound_checkpoint(tmp_path) is None
    assert not (tmp_path / "ran").exists()
