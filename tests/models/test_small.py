"""The embedded default: the same layout rules as the released model, from captions alone."""

import pytest
import torch

from sjd2_lightning.models.small import build_tiny, train_text_tokenizer
from tests.tools.tiny_backbones import tiny_image_tokenizer

CAPTIONS = ["red heart", "Grinning Cat", "flag: São Tomé & Príncipe", "cat with tears of joy"]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_image_tokenizer(16, patch=4).save(folder)
    torch.manual_seed(0)
    return build_tiny(
        CAPTIONS, folder, text_vocab_size=400, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=2
    )


def test_control_tokens_and_codes_are_apart(backbone):
    tokens = backbone.tokens
    codes = backbone.slot_token_ids[:16].tolist()
    assert codes == list(range(codes[0], codes[0] + 16))
    sizes = [tokens.size_base + number for number in range(8)]
    control = [tokens.bos, tokens.separator, tokens.boi, tokens.newline, *sizes]
    assert len({*control, *codes}) == len(control) + 16
    names = backbone.text_tokenizer.convert_ids_to_tokens(control)
    assert names == ["<s>", "<separator>", "<boi>", "<newline>", *(f"<size{n}>" for n in range(8))]


def test_prompt_and_layout(backbone):
    layout = backbone.layout(64, 32)
    ids = backbone.prompt_ids("grinning cat", layout)
    tokens = backbone.tokens
    tail = [tokens.separator, tokens.boi, tokens.size_base + 2, tokens.size_base + 1]
    assert ids[0] == tokens.bos
    assert ids[-4:] == tail
    assert backbone.unconditional_ids(layout) == tail[1:]
    assert (layout.height, layout.width, layout.num_slots) == (16, 8, 16 * 9 - 1)
    assert backbone.prompt_ids("GRINNING cat", layout) == ids
    assert not set(ids[1:-4]) & {*tail, *backbone.slot_token_ids.tolist()}


@pytest.mark.parametrize("text", ["São Tomé", "日本 <code3> <boi>?", "unseen words 123"])
def test_any_text_survives(backbone, text):
    ids = backbone.text_ids(["", ""], text)
    assert not set(ids) & set(backbone.text_tokenizer.added_tokens_decoder), "words are no control tokens"
    assert backbone.text_tokenizer.decode(ids).strip() == text.lower()


def test_text_tokenizer_does_not_depend_on_the_order_of_captions():
    first = train_text_tokenizer(CAPTIONS, 16, 400)
    second = train_text_tokenizer(CAPTIONS[::-1], 16, 400)
    assert first.get_vocab() == second.get_vocab()
    assert len(first) <= 400


def test_a_model_that_starts_with_another_has_its_weights_but_its_own_codes(backbone, tmp_path):
    backbone.save(tmp_path / "start")
    torch.manual_seed(1)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_layers": 1, "num_heads": 2}
    found = build_tiny([], tmp_path / "start" / "tokenizer", **sizes, start=tmp_path / "start")
    assert found.text_tokenizer.get_vocab() == backbone.text_tokenizer.get_vocab()
    old, new = backbone.model.state_dict(), found.model.state_dict()
    by_token = {"model.embed_tokens.weight", "lm_head.weight"}
    assert all(old[name].equal(new[name]) for name in old.keys() - by_token)
    codes = backbone.slot_token_ids[:16]
    for name in by_token:
        same = (old[name] == new[name]).all(1)
        assert not same[codes].any()
        assert same.sum() == len(same) - 16


def test_weights_of_other_shapes_stay_new(backbone, tmp_path):
    backbone.save(tmp_path / "start")
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_layers": 2, "num_heads": 2}
    found = build_tiny([], tmp_path / "start" / "tokenizer", **sizes, start=tmp_path / "start")
    attention = "model.layers.0.self_attn.q_proj.weight"
    assert backbone.model.state_dict()[attention].equal(found.model.state_dict()[attention])
    assert found.model.model.layers[1].mlp.up_proj.weight.shape == (16, 8)


def test_a_start_with_another_number_of_codes_is_refused(backbone, tmp_path):
    backbone.save(tmp_path / "start")
    tiny_image_tokenizer(32, patch=4).save(tmp_path / "other")
    with pytest.raises(ValueError, match=r"it has 16 codes, and the image tokenizer in .* has 32: train one"):
        build_tiny([], tmp_path / "other", start=tmp_path / "start")
