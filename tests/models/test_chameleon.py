"""The adapter of Chameleon: ids of the released model, maps in any order, folders, and the forward."""

import json
import shutil

import pytest
import torch
from transformers import ChameleonConfig, ChameleonForConditionalGeneration

from sjd2_lightning.masks import attention_mask
from sjd2_lightning.models.chameleon import ChameleonBackbone, ChameleonTokens, load_chameleon
from sjd2_lightning.models.registry import load_backbone
from tests.tools.tiny_backbones import code_names, tiny_chameleon, tiny_image_tokenizer, word_tokenizer

PROMPT_WORDS = [
    "Generate",
    "an",
    "image",
    "of",
    "768x768",
    "512x768",
    "according",
    "to",
    "the",
    "following",
    "prompt:",
    "cat",
]


@pytest.fixture(scope="module")
def lumina():
    """Lumina-mGPT's vocabulary and control tokens around a trunk of width 8; words are ids 9000 and on."""
    config = ChameleonConfig(
        vocab_size=9013,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        vocabulary_map={"<image>": 8711, **code_names(range(4, 8196))},
        vq_config={
            "num_embeddings": 16,
            "base_channels": 32,
            "channel_multiplier": [1],
            "num_res_blocks": 1,
            "attn_type": "none",
        },
    )
    model = ChameleonForConditionalGeneration(config).eval()
    images = tiny_image_tokenizer(8192, patch=16)
    return ChameleonBackbone(model, word_tokenizer(9000, PROMPT_WORDS), images, ChameleonTokens())


def test_prompt_of_the_released_model(lumina):
    """bos, "Generate an image of WxH according to the following prompt:\\n...", 8710, 8197, sizes."""
    layout = lumina.layout(768, 768)
    words = [9000 + number for number in (0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11)]
    assert lumina.prompt_ids("cat", layout) == [0, *words, 8710, 8197, 8828, 8828]
    assert lumina.unconditional_ids(layout) == [8197, 8828, 8828]


def test_height_comes_before_width_in_ids_and_after_it_in_text(lumina):
    layout = lumina.layout(768, 512)
    assert lumina.unconditional_ids(layout) == [8197, 8804 + 24, 8804 + 16]
    assert 9005 in lumina.prompt_ids("cat", layout), "the template says width x height: 512x768"


def test_layout_of_the_released_model(lumina):
    """48 rows of 48 codes and a newline; the last newline is behind the image: 2352 tokens with it."""
    layout = lumina.layout(768, 768)
    assert (layout.height, layout.width, layout.num_slots) == (48, 48, 2351)
    assert lumina.num_codes == 8192
    assert [layout.forced[slot] for slot in (47, 48, 49, 97, 2350)] == [-1, 8192, -1, 8192, -1]
    assert lumina.slot_token_ids[[0, 1, 8191, 8192]].tolist() == [4, 5, 8195, 8803]


@pytest.mark.parametrize("size", [(0, 64), (64, 40), (-32, 64), (31, 31)])
def test_sizes_that_no_size_token_names_are_refused(lumina, size):
    with pytest.raises(ValueError, match="multiple of 32"):
        lumina.layout(*size)


@pytest.mark.parametrize("prompt", ["", "   ", "\n\t"])
def test_empty_prompts_are_refused(lumina, prompt):
    with pytest.raises(ValueError, match="empty prompt"):
        lumina.prompt_ids(prompt, lumina.layout(64, 64))


def test_ids_map_both_ways_in_any_order():
    """Code i has token id 4 + order[i]: embeddings and logits follow the map, as transformers' does."""
    order = [3, 0, 4, 1, 2, 5]
    backbone = tiny_chameleon(6, code_order=order)
    assert backbone.slot_token_ids[:6].tolist() == [4 + place for place in order]
    mapping = backbone.model.model.vocabulary_mapping
    assert mapping.convert_img2bpe(torch.arange(6)).tolist() == backbone.slot_token_ids[:6].tolist()
    assert [mapping.bpe2img[4 + place] for place in order] == list(range(6))
    ids = torch.tensor([4 + place for place in order])
    assert torch.equal(backbone.slot_table()[:6], backbone.model.model.embed_tokens(ids))
    newline = torch.tensor(backbone.tokens.newline)
    assert torch.equal(backbone.slot_table()[6], backbone.model.model.embed_tokens(newline))
    hidden = torch.randn(2, 3, backbone.hidden_size, generator=torch.Generator().manual_seed(0))
    wanted = backbone.model.lm_head(hidden)[..., ids]
    assert torch.allclose(backbone.image_logits(hidden), wanted, atol=1e-6)


def test_forward_is_that_of_transformers():
    backbone = tiny_chameleon(5)
    ids = torch.randint(backbone.model.config.vocab_size, (3, 9), generator=torch.Generator().manual_seed(0))
    columns = torch.arange(9).expand(3, -1)
    mask = attention_mask(columns, torch.zeros_like(columns), torch.zeros(3, dtype=torch.long), 9)
    with torch.no_grad():
        ours = backbone(backbone.embed_tokens(ids), columns, mask)
        theirs = backbone.model.model(input_ids=ids, use_cache=False).last_hidden_state
    assert torch.allclose(ours, theirs, atol=1e-5)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    backbone = tiny_chameleon(6, code_order=[3, 0, 4, 1, 2, 5])
    folder = tmp_path_factory.mktemp("backbone")
    backbone.save(folder)
    return backbone, folder


def test_round_trip_through_a_folder(saved):
    backbone, folder = saved
    again = load_backbone("chameleon", folder)
    layout = again.layout(4, 6)
    assert layout == backbone.layout(4, 6)
    assert again.tokens == backbone.tokens
    assert again.prompt_ids("a red cat", layout) == backbone.prompt_ids("a red cat", layout)
    assert not again.model.training
    assert not again.image_tokenizer.training
    ids = torch.randint(backbone.model.config.vocab_size, (2, 7), generator=torch.Generator().manual_seed(0))
    columns = torch.arange(7).expand(2, -1)
    mask = attention_mask(columns, torch.zeros_like(columns), torch.zeros(2, dtype=torch.long), 7)
    with torch.no_grad():
        hidden = [model(model.embed_tokens(ids), columns, mask) for model in (backbone, again)]
    assert torch.equal(backbone.image_logits(hidden[0]), again.image_logits(hidden[1]))
    image_ids = torch.randint(6, (2, 2, 3), generator=torch.Generator().manual_seed(0))
    assert torch.equal(again.decode_images(image_ids), backbone.decode_images(image_ids))
    # shards made with the tokenizer before training fit the exported model
    assert again.image_tokenizer.identity == backbone.image_tokenizer.identity


def test_half_precision_on_disk_loads_in_single(saved, tmp_path):
    backbone, _ = saved
    backbone.save(tmp_path, torch.float16)
    again = load_backbone("chameleon", tmp_path)
    assert again.model.dtype == torch.float32
    assert torch.allclose(again.slot_table(), backbone.slot_table(), atol=5e-3)
    assert backbone.model.dtype == torch.float32


def test_another_trunk_by_name_or_path(saved, tmp_path):
    backbone, folder = saved
    other = tmp_path / "tuned"
    shutil.copytree(folder / "trunk", other)
    loaded = load_chameleon(folder, trunk=str(other))
    assert torch.equal(loaded.slot_table(), backbone.slot_table())


@pytest.mark.parametrize(
    "part",
    [
        "backbone.json",
        "trunk/model.safetensors",
        "text/tokenizer.json",
        "tokenizer/diffusion_pytorch_model.safetensors",
    ],
)
def test_a_missing_part_is_one_clear_error(saved, tmp_path, part):
    folder = tmp_path / "broken"
    shutil.copytree(saved[1], folder)
    (folder / part).unlink()
    with pytest.raises(ValueError) as error:
        load_backbone("chameleon", folder)
    assert part.rsplit("/", 1)[-1] in str(error.value)
    assert str(folder) in str(error.value)


def test_other_families_are_refused(saved, tmp_path):
    with pytest.raises(ValueError, match=r"emu9.*chameleon"):
        load_backbone("emu9", saved[1])
    folder = tmp_path / "other"
    shutil.copytree(saved[1], folder)
    fields = json.loads((folder / "backbone.json").read_text())
    (folder / "backbone.json").write_text(json.dumps({**fields, "family": "emu3"}))
    with pytest.raises(ValueError, match="of the family 'emu3', not 'chameleon'"):
        load_chameleon(folder)
