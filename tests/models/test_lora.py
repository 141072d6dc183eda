"""Adapters: only they train, they are saved alone, and merged into plain weights, whatever tool made them."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, JanusForConditionalGeneration

from sjd2_lightning.decoding import DecodingConfig, decode
from sjd2_lightning.models.lora import LoraSettings, layers_alike, plain_state
from sjd2_lightning.models.registry import build_shrunken, load_backbone
from sjd2_lightning.models.trunk import LayeredTrunk
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
    assert set(plain_state(tuned.model)) == set(tiny_chameleon(5).model.state_dict())
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


ATTENTION = ["q_proj", "v_proj"]
LORA = {"peft_type": "LORA", "r": 2, "target_modules": ATTENTION}
# adapters as other tools make them, and whether all layers of the trunk are alike with them
MERGED = {
    "rslora": (LORA | {"use_rslora": True}, True),
    "dora": (LORA | {"use_dora": True}, True),
    "pissa": (LORA | {"init_lora_weights": "pissa"}, True),
    "all-linear": (LORA | {"target_modules": "all-linear"}, True),
    "ranks": (LORA | {"rank_pattern": {"layers.1.self_attn.q_proj": 4}}, False),
    "factors": (LORA | {"alpha_pattern": {"layers.0.self_attn.v_proj": 32}}, False),
    "one layer": (LORA | {"layers_to_transform": [1], "layers_pattern": "layers"}, False),
    "bias": (LORA | {"bias": "all"}, True),
    "head": (LORA | {"target_modules": ["q_proj", "lm_head"]}, True),
    "embeddings": (LORA | {"target_modules": ["q_proj", "embed_tokens"]}, True),
    "dora of both": (LORA | {"target_modules": ["embed_tokens", "lm_head"], "use_dora": True}, True),
    "saved head": (LORA | {"modules_to_save": ["lm_head"]}, True),
    "saved embeddings": (LORA | {"modules_to_save": ["embed_tokens", "model.norm"]}, True),
    "tokens": (LORA | {"trainable_token_indices": [4, 5]}, True),
    "ia3": (
        {
            "peft_type": "IA3",
            "target_modules": ["k_proj", "down_proj"],
            "feedforward_modules": ["down_proj"],
        },
        True,
    ),
    "loha": (LORA | {"peft_type": "LOHA"}, True),
    "oft": ({"peft_type": "OFT", "r": 0, "oft_block_size": 4, "target_modules": ATTENTION}, True),
    "norms": ({"peft_type": "LN_TUNING", "target_modules": ["input_layernorm"]}, True),
}
REFUSED = {
    "prompts": {"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 3},
    "shared": {"peft_type": "VERA", "r": 2, "target_modules": ["q_proj", "k_proj"]},
    "more layers": LORA | {"layer_replication": [[0, 2], [1, 2]]},
    "new bias": LORA | {"lora_bias": True},
    "invoked": LORA | {"alora_invocation_tokens": [5, 6], "task_type": "CAUSAL_LM"},
}


def seen(backbone) -> torch.Tensor:
    """What prompts and codes are fed as, and the logits behind them, by the whole head and by its codes."""
    mask, places = torch.ones(1, 1, 7, 7, dtype=torch.bool).tril(), torch.arange(7)[None]
    with torch.no_grad():
        table = backbone.slot_table()
        fed = torch.cat([backbone.embed_tokens(torch.tensor([[20, 4, 5, 21]])), table[None, 1:4]], dim=1)
        hidden = backbone(fed, places, mask)
        whole = backbone.model.lm_head(hidden)[..., 4:9]
        return torch.cat([part.flatten() for part in (table, whole, backbone.image_logits(hidden))])


def made_elsewhere(fields, folder):
    """A backbone whose adapter peft itself made and saved; all its weights are random."""
    from peft import PeftConfig, get_peft_model

    backbone = tiny_chameleon(5)
    model = get_peft_model(backbone.model, PeftConfig.from_peft_type(**fields)).eval()
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=rng))
    model.save_pretrained(folder)
    return backbone


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", MERGED)
def test_adapters_of_other_tools_are_exported_as_they_were_loaded(kind, tmp_path):
    fields, alike = MERGED[kind]
    wanted = seen(made_elsewhere(fields, tmp_path / "theirs"))
    assert (seen(tiny_chameleon(5)) - wanted).abs().max() > 0.5, "the adapter changes nothing"
    loaded = tiny_chameleon(5)
    loaded.add_lora(SETTINGS, tmp_path / "theirs")
    assert torch.equal(seen(loaded), wanted)
    assert layers_alike(loaded.trunk.layers) == alike
    assert isinstance(loaded.decoding_trunk(True, False), LayeredTrunk) == alike, "layers are compiled as one"
    loaded.save(tmp_path / "out")
    assert torch.equal(seen(loaded), wanted), "saving changes nothing"
    plain = load_backbone("chameleon", tmp_path / "out")
    assert torch.allclose(seen(plain), wanted, atol=1e-4)
    again = tiny_chameleon(5)
    again.add_lora(SETTINGS, tmp_path / "out" / "adapter")
    assert torch.equal(seen(again), wanted)
    method, layout = DecodingConfig("sjd2", 4, 1), plain.layout(6, 4)
    tokens = [decode(one, ["red cat"], [3], method, layout).slot_ids for one in (loaded, plain)]
    assert torch.equal(*tokens)


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_of_janus_codes_is_part_of_what_the_trunk_is_fed(tmp_path):
    from peft import LoraConfig, get_peft_model

    backbone = build_shrunken("janus")
    model = get_peft_model(
        backbone.model, LoraConfig(r=2, target_modules=["generation_embeddings", "q_proj"])
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(0.5 * ("lora_" in name))
    model.save_pretrained(tmp_path / "theirs")
    loaded = build_shrunken("janus")
    loaded.add_lora(SETTINGS, tmp_path / "theirs")
    loaded.save(tmp_path / "out")
    wanted, plain = loaded.slot_table(), load_backbone("janus", tmp_path / "out").slot_table()
    assert (wanted - build_shrunken("janus").slot_table()).abs().max() > 0.1
    assert torch.allclose(plain, wanted, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", REFUSED)
def test_adapters_that_cannot_become_plain_weights_are_refused_before_training(kind, tmp_path):
    made_elsewhere(REFUSED[kind], tmp_path)
    with pytest.raises(ValueError, match=rf"^model\.adapter={tmp_path}: .*(peft cannot|structure)"):
        tiny_chameleon(5).add_lora(SETTINGS, tmp_path)


def test_a_merge_that_gives_another_model_is_seen(tmp_path, monkeypatch):
    from peft.tuners.lora.layer import Linear

    trained(tiny_chameleon(5)).save(tmp_path)
    monkeypatch.setattr(Linear, "merge", lambda self, **_: None)
    with pytest.raises(ValueError, match=r"merge of model\.layers\.0\.self_attn\.q_proj gives another layer"):
        tiny_chameleon(5).add_lora(SETTINGS, tmp_path / "adapter")


@pytest.mark.parametrize("damage", ["cut", "wide", "nan"])
def test_broken_weights_of_an_adapter_are_named(tuned, tmp_path, damage):
    tuned.save(tmp_path)
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    state = load_file(path)
    if damage == "wide":
        state = {name: value.repeat(2, 2) for name, value in state.items()}
    if damage == "nan":
        next(iter(state.values()))[0, 0] = torch.nan
    save_file(state, path)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-9])
    named = {"cut": "no whole safetensors file", "wide": "or other sizes", "nan": "holds NaN or infinity"}
    with pytest.raises(ValueError, match=named[damage]):
        tiny_chameleon(5).add_lora(SETTINGS, tmp_path / "adapter")
