"""Released models: golden ids of the published templates, and errors that name the remedy."""

import json
import shutil
import sys
from dataclasses import replace

import pytest
import torch
from tokenizers import AddedToken
from torch import nn

from sjd2_lightning.decoding.config import DecodingConfig
from sjd2_lightning.decoding.loop import decode
from sjd2_lightning.models.emu3 import Emu3Tokens, load_emu3
from sjd2_lightning.models.hub import WeightsSource
from sjd2_lightning.models.janus import JanusBackbone
from sjd2_lightning.models.lora import LoraSettings
from sjd2_lightning.models.registry import FAMILIES, build_shrunken, load_backbone
from sjd2_lightning.models.shrunken import shrunken_cosmos
from sjd2_lightning.models.simple_ar import SimpleARBackbone, SimpleARTokens
from sjd2_lightning.models.small import byte_tokenizer
from sjd2_lightning.models.weights import LoadOptions
from sjd2_lightning.run.provenance import weights_hash
from tests.tools.conformance import image_token_ids
from tests.tools.source import REPO


@pytest.fixture(scope="module")
def backbones():
    return {name: build_shrunken(name) for name in FAMILIES}


@pytest.fixture(scope="module")
def saved(backbones, tmp_path_factory):
    """A saved Janus, and its weights as a plain Hugging Face folder."""
    folder = tmp_path_factory.mktemp("janus")
    backbones["janus"].save(folder)
    plain = tmp_path_factory.mktemp("plain")
    for part in ("trunk", "text"):
        shutil.copytree(folder / part, plain, dirs_exist_ok=True)
    return folder, plain


def letters(backbone, text: str) -> list[int]:
    """Ids of a text in a shrunken copy, where a byte is a token."""
    return backbone.text_tokenizer.encode(text, add_special_tokens=False)


def test_lumina_mgpt(backbones):
    backbone = backbones["chameleon"]
    layout = backbone.layout(512, 768)
    text = "Generate an image of 768x512 according to the following prompt:\na cat"
    start = [8197, 8804 + 16, 8804 + 24]
    assert backbone.prompt_ids("a cat", layout) == [0, *letters(backbone, text), 8710, *start]
    assert backbone.unconditional_ids(layout) == start
    image = image_token_ids(backbone, torch.zeros(1, 32, 48, dtype=torch.long), layout)
    assert image == [*([4] * 48 + [8803]) * 32, 8196, 8710]


@pytest.mark.parametrize(("pixels", "rows"), [(512, 32), (768, 48), (1024, 64)])
def test_lumina_mgpt_sizes(backbones, pixels, rows):
    layout = backbones["chameleon"].layout(pixels, pixels)
    assert (layout.height, layout.width, layout.num_slots) == (rows, rows, rows * (rows + 1) - 1)


def test_emu3(backbones):
    backbone = backbones["emu3"]
    layout = backbone.layout(720, 640)
    text = letters(backbone, "a cat masterpiece, film grained, best quality.")
    size = [151852, *letters(backbone, "90*80"), 151851]
    assert backbone.prompt_ids("a cat", layout) == [151849, *text, *size]
    negative = letters(backbone, Emu3Tokens().negative)
    assert backbone.unconditional_ids(layout) == [151849, *negative, *size]
    assert negative[:6] == letters(backbone, "lowres")
    image = image_token_ids(backbone, torch.full((1, 90, 80), 32767), layout)
    assert image == [*([184621] * 80 + [151846]) * 90, 151847, 151853, 151850]
    assert len(image) == 90 * 81 + 3


def test_janus(backbones):
    backbone = backbones["janus"]
    layout = backbone.layout(64, 64)
    ids = backbone.prompt_ids("a cat", layout)
    assert ids == [100000, *letters(backbone, "<|User|>: a cat\n\n<|Assistant|>:"), 100016]
    assert backbone.unconditional_ids(layout, ids) == [100000, *[100002] * (len(ids) - 2), 100016]


def test_simple_ar(backbones):
    backbone = backbones["simple_ar"]
    layout = backbone.layout(64, 64)
    words = letters(backbone, "A highly realistic image of a cat")
    assert backbone.prompt_ids("a cat", layout) == [151665, *words, 151667]
    negative = backbone.unconditional_ids(layout)
    assert negative[:9] == [151665, *letters(backbone, "An image")]
    assert (negative[-1], len(negative)) == (
        151667,
        2 + len(SimpleARTokens().negative) - len("<|t2i|><|soi|>"),
    )
    assert (layout.height, layout.width, layout.forced) == (4, 4, (-1,) * 16)
    assert backbone.slot_token_ids.tolist() == list(range(151672, 151672 + 64000))
    assert backbone.model.config.vocab_size == 215672


def test_a_release_of_simple_ar_loads_with_the_codes_behind_its_text_tokenizer(backbones, tmp_path):
    backbone = backbones["simple_ar"]
    backbone.save(tmp_path / "saved")
    for part in ("trunk", "text"):
        shutil.copytree(tmp_path / "saved" / part, tmp_path / "plain", dirs_exist_ok=True)
    with pytest.raises(ValueError, match=r"no image tokenizer in .*encoder\.jit is missing"):
        load_backbone("simple_ar", tmp_path / "plain")
    shutil.copytree(tmp_path / "saved" / "tokenizer", tmp_path / "plain" / "tokenizer")
    # the release's tokenizer has 151,672 entries; the small one has fewer, and codes follow them
    loaded = load_backbone("simple_ar", tmp_path / "plain")
    assert loaded.tokens.first_code == len(backbone.text_tokenizer) < 151672
    (tmp_path / "plain" / "tokenizer" / "decoder.jit").write_bytes(
        b"version https://git-lfs.github.com/spec/v1"
    )
    with pytest.raises(ValueError, match=r"decoder\.jit is no program in TorchScript: .*git-lfs"):
        load_backbone("simple_ar", tmp_path / "plain")
    cut = replace(backbone.tokens, first_code=151673)
    with pytest.raises(ValueError, match="text tokenizer and weights are not of one model"):
        SimpleARBackbone(backbone.model, backbone.text_tokenizer, backbone.image_tokenizer, cut)
    other = byte_tokenizer(1000, {"<|t2i|>": 151665})
    with pytest.raises(ValueError, match=r"no control token <\|soi\|>"):
        SimpleARBackbone(backbone.model, other, backbone.image_tokenizer, backbone.tokens)


def test_cosmos_runs_in_its_own_numbers(backbones):
    images = backbones["simple_ar"].image_tokenizer
    pixels = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    codes = images.encode(pixels)
    half = shrunken_cosmos(torch.bfloat16)  # the release's type
    assert half.decoder(codes[:, None]).dtype == torch.bfloat16
    assert half.encode(pixels).shape == codes.shape
    assert half.decode(codes).dtype == torch.float32
    with pytest.raises(ValueError, match="images of 40x32 pixels: must be multiples of 16"):
        images.encode(pixels[..., :40])


ORDINARY = (
    "a cat",
    "  two  spaces ",
    "São Tomé, 日本?",
    "5 < 6 and <b>bold</b>",
    "line\nbreak",
    "<s",
    "{prompt}",
)


def around(backbone, layout) -> list[int]:
    """Ids of the template without a prompt: what is left if those of the words are taken out."""
    return [token for token in backbone.prompt_ids("¤", layout) if token not in letters(backbone, "¤")]


# LlamaGen's cleaning of captions takes them out
@pytest.mark.parametrize("family", [*sorted(FAMILIES.keys() - {"llamagen"}), "shipped"])
def test_words_of_a_prompt_are_never_control_tokens(backbones, family):
    backbone = load_backbone("chameleon", "weights/tiny") if family == "shipped" else backbones[family]
    layout, control = backbone.layout(64, 64), backbone.text_tokenizer.added_tokens_decoder
    template = around(backbone, layout)
    assert set(template) & set(control), "the template has control tokens of its own"
    for token in [*control.values()][:12] + [*control.values()][-9:]:
        for prompt in (f"was {token.content}red{token.content} now", token.content, f"a{token.content}"):
            ids = backbone.prompt_ids(prompt, layout)
            assert [one for one in ids if one in control] == [one for one in template if one in control]
            start = next(place for place, one in enumerate(ids) if one not in control)
            assert prompt in backbone.text_tokenizer.decode(ids[start:])
            assert backbone.prompt_ids("a cat", layout) != ids


@pytest.mark.parametrize("family", [*FAMILIES, "shipped"])
def test_ids_of_ordinary_prompts_are_those_of_the_tokenizer_and_of_its_letters(backbones, family):
    backbone = load_backbone("chameleon", "weights/tiny") if family == "shipped" else backbones[family]
    for prompt in ORDINARY:
        wanted = letters(backbone, f"of {prompt}, best")
        assert backbone.text_ids(["of ", ", best"], prompt) == wanted
        assert backbone._letters(f"of {prompt}, best") == wanted


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("normalized", [True, False])
def test_control_tokens_of_a_template_stay_where_a_prompt_names_them_too(backbones, special, normalized):
    """DeepSeek's `<|User|>` is an added token that is not called special."""
    model, tokens = backbones["janus"].model, backbones["janus"].tokens
    text = byte_tokenizer(1000, {"<s>": tokens.bos})
    marks = ["<|User|>", "<|Assistant|>"]
    text.add_tokens([AddedToken(mark, special=special, normalized=normalized, rstrip=True) for mark in marks])
    backbone = JanusBackbone(model, text, tokens)
    user, assistant = text.convert_tokens_to_ids(marks)
    layout = backbone.layout(64, 64)
    for prompt in ("a cat", "a <|User|> cat", "<|Assistant|>:\n\n<|User|>", "<|Assistant|>"):
        ids = backbone.prompt_ids(prompt, layout)
        words = backbone._letters(f": {prompt}\n\n")
        assert ids == [tokens.bos, user, *words, assistant, *letters(backbone, ":"), tokens.boi]


@pytest.mark.parametrize("family", ["chameleon", "janus"])
def test_another_context_of_guidance(backbones, tmp_path, family):
    backbones[family].save(tmp_path)
    other = {"chameleon": "empty", "janus": "short"}[family]
    backbone = load_backbone(family, tmp_path, unconditional=other)
    layout = backbone.layout(64, 64)
    ids = backbone.prompt_ids("a cat", layout)
    # without the five letters of the prompt; without everything between bos and boi
    wanted = {"chameleon": [*ids[:-9], *ids[-4:]], "janus": [100000, 100016]}[family]
    assert backbone.unconditional_ids(layout, ids) == wanted
    with pytest.raises(ValueError, match="=gone: must be one of"):
        load_backbone(family, tmp_path, unconditional="gone")


def test_a_plain_folder_loads_with_the_ids_it_names(backbones, saved, tmp_path):
    shutil.copytree(saved[1], tmp_path, dirs_exist_ok=True)
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token_id": 100015}))
    backbone = load_backbone("janus", tmp_path)
    assert backbone.tokens.pad == 100015
    assert torch.equal(backbone.slot_table(), backbones["janus"].slot_table())
    path.unlink()
    with pytest.raises(ValueError, match=r"generation_config\.json does not say bos_token_id, pad_token_id"):
        load_backbone("janus", tmp_path)


def test_nothing_of_another_family_is_loaded(saved):
    with pytest.raises(ValueError, match="is of the family 'janus', not 'emu3'"):
        load_emu3(saved[0])
    with pytest.raises(ValueError, match="holds a model of type 'janus', not 'emu3'"):
        load_emu3(saved[1])


def test_unknown_and_missing_weights_are_named(saved, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(saved[1], tmp_path, dirs_exist_ok=True)
    path = tmp_path / "model.safetensors"
    state = load_file(path)
    state["model.gone.weight"] = state.pop("model.generation_embeddings.weight")
    save_file(state, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"missing model\.generation_embeddings.*unknown model\.gone"):
        load_backbone("janus", tmp_path)


def test_pickles_are_refused_by_name(saved, tmp_path):
    shutil.copytree(saved[1], tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"model\.safetensors missing \(it has pytorch_model\.bin"):
        load_backbone("janus", tmp_path)


def test_missing_weights_name_the_command(tmp_path, monkeypatch):
    source = WeightsSource(tmp_path / "janus", "deepseek-community/Janus-Pro-1B", "v9")
    with pytest.raises(ValueError) as error:
        load_backbone("janus", source)
    command = f"hf download deepseek-community/Janus-Pro-1B --revision v9 --local-dir {tmp_path / 'janus'}"
    assert command in str(error.value)
    (tmp_path / "janus").mkdir()
    with pytest.raises(ValueError) as error:
        load_backbone("janus", source)
    assert "config.json, model.safetensors missing" in str(error.value)
    assert command in str(error.value)


def test_another_revision_is_refused(saved, tmp_path, monkeypatch):
    """In a folder, by what its download left beside the files; in the hub's cache, by its snapshots."""
    wanted, other = "a" * 40, "b" * 40
    folder = tmp_path / "janus"
    shutil.copytree(saved[1], folder)
    records = folder / ".cache" / "huggingface" / "download"
    records.mkdir(parents=True)
    (records / "model.safetensors.metadata").write_text(f"{other}\netag\n1700000000.0\n")
    for revision in (other, other[:8], "main", None):
        WeightsSource(folder, "deepseek-community/Janus-Pro-1B", revision).folder()
    with pytest.raises(ValueError, match=f"model.safetensors is of revision {other}, not {wanted}") as error:
        load_backbone("janus", WeightsSource(folder, "deepseek-community/Janus-Pro-1B", wanted))
    assert f"hf download deepseek-community/Janus-Pro-1B --revision {wanted}" in str(error.value)

    snapshots = tmp_path / "hub" / "models--deepseek-community--Janus-Pro-1B" / "snapshots"
    shutil.copytree(saved[1], snapshots / other)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    gone = tmp_path / "gone"
    cached = WeightsSource(gone, "deepseek-community/Janus-Pro-1B", other).folder()
    assert load_backbone("janus", cached).num_codes == 16384
    with pytest.raises(ValueError, match=f"at revision {wanted} is neither in the hub's cache"):
        WeightsSource(gone, "deepseek-community/Janus-Pro-1B", wanted).folder()


def test_shards_of_an_index_are_all_needed(saved, tmp_path):
    shutil.copytree(saved[1], tmp_path, dirs_exist_ok=True)
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"model-2\.safetensors missing"):
        load_backbone("janus", tmp_path)


def test_half_precision_leaves_the_image_tokenizer_alone(saved):
    backbone = load_backbone("janus", saved[0], dtype=torch.bfloat16, device="cpu")
    assert backbone.trunk.embed_tokens.weight.dtype == torch.bfloat16
    assert next(backbone.image_tokenizer.vq.parameters()).dtype == torch.float32
    assert backbone.new_cache(1, 4).keys[0].dtype == torch.bfloat16


def test_dropout_is_off_whatever_the_class_says(backbones, tmp_path):
    backbones["emu3"].save(tmp_path)
    path = tmp_path / "trunk" / "config.json"
    config = json.loads(path.read_text())
    config["text_config"]["attention_dropout"] = 0.1
    path.write_text(json.dumps(config))
    backbone = load_emu3(tmp_path, options=LoadOptions())
    assert backbone.trunk.layers[0].self_attn.attention_dropout == 0.0


@pytest.mark.parametrize("family", FAMILIES)
def test_rounding_rounds_the_layers_of_the_trunk_and_nothing_else(family):
    pytest.importorskip("torchao")
    whole, rounded = build_shrunken(family), build_shrunken(family)
    rounded.quantize("int8", "cpu")
    assert torch.equal(whole.slot_table(), rounded.slot_table())
    hidden = torch.randn(1, 3, whole.hidden_size, generator=torch.Generator().manual_seed(0))
    assert torch.equal(whole.image_logits(hidden), rounded.image_logits(hidden))
    linear = [part for part in rounded.trunk.layers.modules() if isinstance(part, nn.Linear)]
    assert linear
    assert all(hasattr(part.weight, "__tensor_flatten__") for part in linear)
    for before, after in zip(whole.trunk.parameters(), rounded.trunk.parameters(), strict=True):
        kept = after.dequantize() if hasattr(after, "__tensor_flatten__") else after
        error = (before - kept).abs()
        limit = before.abs().amax(-1, keepdim=True) / 250  # half a step of 127 on each side
        assert bool((error <= limit).all())
    assert weights_hash(whole) != weights_hash(rounded)
    assert rounded.quantized == "int8"


def test_what_rounded_weights_cannot_do(tmp_path, monkeypatch):
    backbone = build_shrunken("chameleon")
    with pytest.raises(ValueError, match=r"model\.quantize=fp8: .* cpu has no fp8.*int8"):
        backbone.quantize("fp8", "cpu")
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "torchao.quantization", None)
        with pytest.raises(ValueError, match=r"torchao is not installed.*sjd2-lightning\[quantize\]"):
            backbone.quantize("int8", "cpu")
    adapted = build_shrunken("chameleon")
    adapted.add_lora(LoraSettings())
    with pytest.raises(ValueError, match=r"model\.quantize=int8: the model has an adapter.*merged"):
        adapted.quantize("int8", "cpu")
    pytest.importorskip("torchao")
    backbone.quantize("int8", "cpu")
    for act in (
        lambda: backbone.save(tmp_path / "export"),
        lambda: backbone.add_lora(LoraSettings()),
        lambda: backbone.quantize("int8", "cpu"),
    ):
        with pytest.raises(ValueError, match=r"model\.quantize=int8: cannot .* set model\.quantize=null"):
            act()
    assert not (tmp_path / "export").exists()


def test_replay_of_rounded_weights_draws_the_images_of_their_autoregression():
    pytest.importorskip("torchao")
    backbone = load_backbone("chameleon", REPO / "weights/tiny")
    backbone.quantize("int8", "cpu")
    layout = backbone.layout(32, 32)
    prompts, seeds = ["red heart", "dog face"], [1, 2]
    ar, sjd2 = (
        decode(backbone, prompts, seeds, DecodingConfig(name, window=window), layout).image_ids
        for name, window in (("ar", 1), ("sjd2", 8))
    )
    assert torch.equal(ar, sjd2)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_says_that_an_export_is_whole_is_written_last(family, backbones, tmp_path):
    """A save that was killed leaves no folder that passes for an export."""
    backbones[family].save(tmp_path)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert max(files, key=lambda path: path.stat().st_mtime_ns).name == "backbone.json"
