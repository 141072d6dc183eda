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
