"""An adapter of noise alone, by the command: the weights below stay, and another training goes on with it."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from sjd2_lightning.cli.build import build_backbone, build_task
from sjd2_lightning.models.lora import LoraSettings
from tests.tools.configurations import typed
from tests.tools.tiny_backbones import tiny_chameleon
from tests.tools.training_runs import differences, make_folder, places, run, state_of

SETTINGS = ("optimizer.lr=0.02", "trainer.max_steps=4", "trainer.val_check_interval=4")
SETTINGS += ("callbacks.checkpoint.every_n_train_steps=1",)
LORA = ("model.peft=lora", "model.lora.noisy_only=true")
ADAPTER = "model/adapter/adapter_model.safetensors"
KEPT = "images are those of the base by the same seeds"


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Folder of a run that was not stopped, and of one that was."""
    folder = make_folder(tmp_path_factory.mktemp("model"))
    run([*places(folder, folder / "first"), *SETTINGS, *LORA, "trainer.max_steps=1"])  # imports, shards
    assert run([*places(folder, folder / "whole"), *SETTINGS, *LORA])[1] == 0
    place = [*places(folder, folder / "stopped"), *SETTINGS, *LORA, "ckpt_path=auto"]
    assert run(place, stop_at=1)[1] == 143
    assert run(place)[1] == 0
    return folder


def test_it_goes_on_bitwise_from_checkpoints_of_the_adapter_alone(ran):
    states = [state_of(ran / name / "checkpoints" / "last.ckpt") for name in ("whole", "stopped")]
    assert not differences(*states)
    assert all(".lora_" in name for name in states[0]["state_dict"])


def test_the_weights_below_are_exported_as_they_were(ran):
    base, exported = (load_file(ran / name / "trunk/model.safetensors") for name in ("model", "whole/model"))
    assert base.keys() == exported.keys()
    assert all(torch.equal(value, exported[name]) for name, value in base.items())
    assert (
        max(value.abs().max() for name, value in load_file(ran / "whole" / ADAPTER).items() if "_B" in name)
        > 0
    )


def test_one_file_of_keys_trains_and_evaluates(ran):
    asked = typed("evaluate", f"model.path={ran / 'whole/model'}", *LORA).model
    backbone = build_backbone(asked)
    assert backbone.noise_gate is not None
    names = [name for name, _ in backbone.named_parameters() if ".lora_A." in name]
    assert len(names) == len(set(names)) == 7
    with pytest.raises(ValueError, match="takes no second one"):
        build_backbone(asked.model_copy(update={"lora": replace(asked.lora, noisy_only=False)}))


def test_its_card_says_what_it_leaves_alone(ran):
    assert KEPT in (ran / "whole/model/README.md").read_text()


def test_an_adapter_of_all_tokens_is_not_taken_for_one_of_noise(ran, tmp_path):
    backbone = tiny_chameleon()
    backbone.add_lora(LoraSettings(rank=2))
    backbone.save(tmp_path)
    tiny_chameleon().save(tmp_path / "base")
    adapter = f"model.adapter={tmp_path / 'adapter'}"
    asked = typed("train", f"model.path={tmp_path / 'base'}", adapter, "model.lora.noisy_only=true").model
    with pytest.raises(ValueError, match=r"it acts on all tokens; set model\.lora\.noisy_only=false"):
        build_backbone(asked)


def test_what_wants_all_weights_is_refused(ran):
    asked = typed(
        "train", f"model.path={ran / 'whole/model'}", "callbacks.ema_decay=0.9", "model.image_size=[64,64]"
    )
    with pytest.raises(ValueError, match=r"its adapter alone is trained; .* callbacks\.ema_decay=null"):
        build_task(asked)


def test_another_training_goes_on_with_it(ran):
    again = [*places(ran, ran / "again"), *SETTINGS, f"model.path={ran / 'whole/model'}"]
    assert run(again)[1] == 0
    before, after = (load_file(ran / name / ADAPTER) for name in ("whole", "again"))
    assert before.keys() == after.keys()
    assert any(not torch.equal(value, after[name]) for name, value in before.items())
    assert KEPT in (ran / "again/model/README.md").read_text()
    trunk = "model/trunk/model.safetensors"
    below, still = load_file(ran / "whole" / trunk), load_file(ran / "again" / trunk)
    assert all(torch.equal(value, still[name]) for name, value in below.items())
