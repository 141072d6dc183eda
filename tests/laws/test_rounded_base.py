"""An adapter on a base in int8, by the command: going on is bitwise, what is exported is what was trained."""

import copy

import pytest
import torch
from safetensors.torch import load_file

from sjd2_lightning.cli import build
from sjd2_lightning.models.registry import load_backbone
from sjd2_lightning.models.rounding import Int8Linear
from tests.models.test_lora import logits
from tests.tools.training_runs import differences, make_folder, places, run, state_of

SETTINGS = ("model.peft=lora", "model.quantize=int8", "optimizer.lr=0.02", "trainer.max_steps=4")
SETTINGS += ("trainer.val_check_interval=4", "callbacks.checkpoint.every_n_train_steps=1")


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Folder of a run that was not stopped, the backbone it trained, and the folder of one that was."""
    folder = make_folder(tmp_path_factory.mktemp("model"))
    trained = []
    with pytest.MonkeyPatch.context() as patched:
        export = build.export_model
        note = trained.append
        patched.setattr(build, "export_model", lambda *given: note(given[1].backbone) or export(*given))
        run([*places(folder, folder / "first"), *SETTINGS, "trainer.max_steps=1"])  # imports, shards
        _, status = run([*places(folder, folder / "whole"), *SETTINGS])
    assert status == 0
    place = [*places(folder, folder / "stopped"), *SETTINGS, "ckpt_path=auto"]
    assert run(place, stop_at=1)[1] == 143
    assert run(place)[1] == 0
    return folder, trained[-1].eval()


def test_it_goes_on_bitwise_from_checkpoints_of_the_adapter_alone(ran):
    folder, _ = ran
    states = [state_of(folder / name / "checkpoints" / "last.ckpt") for name in ("whole", "stopped")]
    assert states[0]["global_step"] == 4
    assert not differences(*states)
    assert all(".lora_" in name for name in states[0]["state_dict"])


def test_the_exported_adapter_is_the_trained_one_merged_into_whole_weights(ran):
    folder, trained = ran
    base, exported = (load_backbone("chameleon", folder / name) for name in ("model", "whole/model"))
    assert any(isinstance(part, Int8Linear) for part in trained.modules()), "it was rounded"
    saved = load_file(folder / "whole/model/adapter/adapter_model.safetensors")
    names = {
        f"base_model.{name.replace('.default', '')}": value
        for name, value in trained.named_parameters()
        if value.requires_grad
    }
    assert saved.keys() == names.keys()
    for name, value in names.items():
        assert torch.equal(saved[name], value), name
    merged = 0
    for name, value in exported.model.state_dict().items():
        wanted = base.model.state_dict()[name]
        module = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{module}.lora_A.weight" in saved:
            update = saved[f"{module}.lora_B.weight"] @ saved[f"{module}.lora_A.weight"]
            assert update.abs().max() > 1e-4, "nothing was learnt"
            wanted, merged = wanted + 32.0 / 16 * update, merged + 1
        assert torch.allclose(value, wanted, atol=1e-6), name
    assert merged == 7


def test_what_is_exported_computes_what_was_trained_but_for_the_rounding(ran):
    folder, trained = ran
    with torch.no_grad():
        wanted, found = logits(trained), logits(load_backbone("chameleon", folder / "whole/model"))
        plain = logits(load_backbone("chameleon", folder / "model"))
    learnt, rounding = (plain - wanted).abs().max(), (found - wanted).abs().max()
    assert rounding < 0.1 * learnt


def test_rounded_weights_are_never_saved(ran, tmp_path):
    _, trained = ran
    with pytest.raises(ValueError, match=r"model\.quantize=int8: cannot save rounded weights"):
        copy.copy(trained).save(tmp_path)
