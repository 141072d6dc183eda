"""Two ranks compute what one process does, by DDP and by FSDP2."""

import pickle

import pytest
import torch

from sjd2_lightning.decoding import decode
from sjd2_lightning.training.checkpoints import check_checkpoint, newest_sound_checkpoint
from tests.tools import scale_runs
from tests.tools.tiny_backbones import tiny_chameleon
from tests.tools.training_runs import on_ranks

pytestmark = pytest.mark.slow
BF16 = 0.02  # of a loss


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What two ranks found, and their folder."""
    folder = tmp_path_factory.mktemp("ranks")
    on_ranks(2, "tests.tools.scale_runs", str(folder), log_dir=folder)
    return torch.load(folder / "found.pt", weights_only=True), folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process finds on the batches of both ranks, by kind of run."""
    folder = tmp_path_factory.mktemp("alone")
    return {kind: scale_runs.few_steps("auto", folder / kind, kind=kind) for kind in scale_runs.KINDS}


@pytest.mark.parametrize(
    ("run", "kind"),
    [
        *(
            (f"{name} {kind}", kind)
            for name in ("ddp", "fsdp")
            for kind in ("plain", "trajectory", "adapter", "drafts")
        ),
        ("fsdp adapter compiled", "adapter"),
    ],
)
def test_two_ranks_are_one_process(ranks, alone, run, kind):
    found, wanted = ranks[0][run], alone[kind]
    assert found["losses"] == pytest.approx(wanted["losses"], abs=1e-5)
    assert len(wanted["losses"]) == scale_runs.NUM_STEPS * scale_runs.ACCUMULATE
    for name, value in wanted["state"].items():
        assert torch.allclose(found["state"][name], value, atol=1e-5), name


@pytest.mark.parametrize("kind", ["bf16", "bf16 trajectory"])
def test_weights_gathered_in_half_as_many_bits_give_nearly_the_losses_of_one_process(ranks, alone, kind):
    """docs/scaling.md states this tolerance; the step's own rounding in bfloat16 is of that size."""
    found, wanted = ranks[0][f"fsdp {kind}"], alone[kind]
    assert found["losses"] == pytest.approx(wanted["losses"], rel=BF16)
    assert found["losses"] != wanted["losses"]
    assert {value.dtype for value in found["state"].values() if value.is_floating_point()} == {torch.float32}


def test_an_adapter_on_a_base_in_int8_is_trained_by_two_ranks(ranks, tmp_path):
    found = ranks[0]["ddp int8"]
    wanted = scale_runs.few_steps("auto", tmp_path, kind="adapter", rounded=True)
    assert found["losses"] == pytest.approx(wanted["losses"], abs=1e-5)
    assert found["losses"] != pytest.approx(ranks[0]["ddp adapter"]["losses"], abs=1e-5), "it is rounded"
    for name, value in wanted["state"].items():
        assert torch.allclose(found["state"][name], value, atol=1e-5), name


def test_weights_that_stay_gathered_give_the_same_bits(ranks):
    found, _ = ranks
    assert found["fsdp kept"]["losses"] == found["fsdp plain"]["losses"]


def test_a_sharded_run_goes_on_bitwise(ranks):
    found, folder = ranks
    assert found["fsdp resumed"]["losses"] == found["fsdp plain"]["losses"][4:]
    for name, value in found["fsdp plain"]["state"].items():
        assert torch.equal(found["fsdp resumed"]["state"][name], value), name
    saved = folder / "fsdp" / "plain" / "step=2.ckpt"
    assert len(list(saved.glob("*.distcp"))) == 2, "a part of each rank"
    check_checkpoint(saved)
    assert newest_sound_checkpoint(folder / "fsdp" / "plain") is not None
    assert not list(folder.rglob(".*.writing"))


def test_samples_of_sharded_weights_are_those_of_one_process(ranks):
    """Before training, and behind two steps, of weights that all ranks have gathered."""
    found, _ = ranks
    sampled = found["fsdp sampled"]
    assert sampled["codes"][0] != sampled["codes"][2], "training changes the pictures"
    for step, codes in sampled["codes"].items():
        assert len(codes) == len(scale_runs.PROMPTS) * len(scale_runs.METHODS)
        backbone = tiny_chameleon(7, seed=4, scale=0.3)
        if step:
            backbone.load_state_dict(sampled["state"])
        layout = backbone.layout(6, 6)
        for name, config in scale_runs.METHODS.items():
            for item in scale_runs.PROMPTS:
                wanted = decode(backbone, [item.prompt], [item.seed], config, layout).image_ids
                assert codes[f"{name} {item.key}"] == wanted.flatten().tolist()


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
        shutil.copytree(folder / "fsdp" / "plain" / "step=4.ckpt", tmp_path / f"{name}.ckpt")
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
