"""Low-rank adapters: only they train, they are saved alone, and merged into plain weights."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModel, JanusForConditionalGeneration

from sjd2_lightning.models.lora import LoraSettings, merged_state
from sjd2_lightning.models.registry import build_shrunken, load_backbone
from tests.tools.tiny_backbones import tiny_chameleon

SETTINGS = LoraSettings(rank=2, alpha=4.0)


def logits(backbone) -> torch.Tensor:
    """Of a fixed input."""
    embeddings = torch.randn(1, 5, backbone.hidden_size, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()
    return backbone.image_logits(backbone(embeddings, torch.arange(5)[None], mask))


def trained(backbone, settings: LoraSettings = SETTINGS):
    """An adapter as it is after training: all its weights are random."""
    backbone.add_lora(settings)
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in backbone.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=rng))
    return backbone


@pytest.fixture(scope="module")
def tuned():
    return trained(tiny_chameleon(5))


def test_a_new_adapter_changes_nothing_and_freezes_the_rest():
    backbone = tiny_chameleon(5)
    before = logits(backbone)
    backbone.add_lora(SETTINGS)
    assert torch.equal(logits(backbone), before)
    names = {name for name, parameter in backbone.named_parameters() if parameter.requires_grad}
    assert len(names) == 2 * 2 * 7  # two matrices for each of seven linear layers in two layers
    assert all("model.layers." in name and ".lora_" in name for name in names)
    assert not any(module.training for module in backbone.modules())


@pytest.mark.parametrize("family", ["emu3", "janus"])
def test_adapters_go_into_the_trunk_alone(family):
    backbone = build_shrunken(family)
    backbone.add_lora(SETTINGS)
    names = [name for name, parameter in backbone.named_parameters() if parameter.requires_grad]
    assert names
    assert all(name.startswith(f"model.{backbone.TRUNK_PATH}.layers.") for name in names)


def test_saved_alone_and_loaded_again(tuned, tmp_path):
    tuned.save(tmp_path)
    assert not torch.allclose(logits(tuned), logits(tiny_chameleon(5)), atol=1e-2)
    again = tiny_chameleon(5)
    again.add_lora(SETTINGS, tmp_path / "adapter")
    assert torch.equal(logits(again), logits(tuned))
    files = sorted(path.name for path in (tmp_path / "adapter").iterdir())
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(files)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size < 20_000


def test_merged_weights_are_plain(tuned, tmp_path):
    tuned.save(tmp_path)
    assert set(merged_state(tuned.model)) == set(tiny_chameleon(5).model.state_dict())
    assert torch.allclose(logits(load_backbone("chameleon", tmp_path)), logits(tuned), atol=1e-5)
    plain, info = AutoModel.from_pretrained(tmp_path / "trunk", output_loading_info=True)
    assert not info["missing_keys"]
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    with torch.no_grad():
        ours = tuned.model.model(input_ids=ids, use_cache=False).last_hidden_state
        assert torch.allclose(plain(input_ids=ids, use_cache=False).last_hidden_state, ours, atol=1e-5)


def test_peft_reads_the_folder_without_this_package(tmp_path):
    from peft import PeftModel

    backbone = trained(build_shrunken("janus"))
    backbone.save(tmp_path)
    plain = build_shrunken("janus").model
    assert isinstance(plain, JanusForConditionalGeneration)
    model = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    with torch.no_grad():
        ours = backbone.model.model.language_model(input_ids=ids, use_cache=False).last_hidden_state
        theirs = model.base_model.model.model.language_model(input_ids=ids, use_cache=False).last_hidden_state
    assert torch.allclose(theirs, ours, atol=1e-5)


def test_wrong_adapters_are_refused(tuned, tmp_path):
    with pytest.raises(ValueError, match="no linear layer gone"):
        tiny_chameleon(5).add_lora(replace(SETTINGS, targets=("q_proj", "gone")))
    with pytest.raises(ValueError, match=r"adapter_config\.json is missing"):
        tiny_chameleon(5).add_lora(SETTINGS, tmp_path)
    tuned.save(tmp_path)
    with pytest.raises(ValueError, match="of another model or other sizes"):
        tiny_chameleon(5, num_layers=3).add_lora(SETTINGS, tmp_path / "adapter")


def test_recomputed_activations_give_the_same_gradients():
    plain, lean = trained(tiny_chameleon(5)), trained(tiny_chameleon(5))
    lean.checkpoint_activations()
    for backbone in (plain, lean):
        backbone.train()
        logits(backbone).square().sum().backward()
    assert lean.trunk.gradient_checkpointing or lean.trunk.layers[0].gradient_checkpointing
    for ours, wanted in zip(lean.parameters(), plain.parameters(), strict=True):
        if wanted.requires_grad:
            assert torch.allclose(ours.grad, wanted.grad, atol=1e-5)
