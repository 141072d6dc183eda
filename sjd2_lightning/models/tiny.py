"""The embedded default: a miniature of Lumina-mGPT with its layout, built from nothing but the captions."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import ChameleonConfig, ChameleonForConditionalGeneration, PreTrainedTokenizerFast

from sjd2_lightning.models.chameleon import ChameleonBackbone, ChameleonTokens
from sjd2_lightning.models.image_tokenizer import load_image_tokenizer

SIZE_UNIT = 32  # pixels a size token counts, as in Lumina-mGPT
_NUM_SIZES = 8


def train_text_tokenizer(captions: Iterable[str], num_codes: int, vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of lower-cased captions whose first ids are control tokens and image codes."""
    control = ["<pad>", "<s>", "</s>", "<unk>"]
    codes = [f"<code{code}>" for code in range(num_codes)]
    structure = ["<image>", "<boi>", "<newline>", "<separator>", *(f"<size{n}>" for n in range(_NUM_SIZES))]
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[*control, *codes, *structure],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(sorted(captions), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def tiny_trunk_config(
    text_tokenizer: PreTrainedTokenizerFast,
    num_codes: int,
    first_code: int,
    hidden_size: int,
    intermediate_size: int,
    num_layers: int,
    num_heads: int,
) -> ChameleonConfig:
    """Configuration of a small Chameleon whose vocabulary map names its codes as the released one does."""
    letters = str.maketrans("0123456789", "ABCDEFGHIJ")
    codes = {f"IMGIMG{str(code).translate(letters)}Z": first_code + code for code in range(num_codes)}
    return ChameleonConfig(
        vocab_size=len(text_tokenizer),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        max_position_embeddings=1024,
        bos_token_id=text_tokenizer.bos_token_id,
        eos_token_id=text_tokenizer.eos_token_id,
        pad_token_id=None,
        vocabulary_map={"<image>": first_code + num_codes, **codes},
        # the encoder inside Chameleon is not used here (the image tokenizer has its own): as small as it goes
        vq_config={
            "embed_dim": 4,
            "num_embeddings": num_codes,
            "latent_channels": 4,
            "base_channels": 32,
            "channel_multiplier": [1],
            "num_res_blocks": 1,
            "attn_type": "none",
        },
    )


def build_tiny(
    captions: Iterable[str],
    image_tokenizer: str | Path,
    text_vocab_size: int = 2048,
    hidden_size: int = 192,
    intermediate_size: int = 512,
    num_layers: int = 6,
    num_heads: int = 6,
) -> ChameleonBackbone:
    """A tiny backbone with random weights and the text tokenizer of the given captions.

    Args:
        captions: the text tokenizer is trained on them.
        image_tokenizer: folder of the trained image tokenizer.
        text_vocab_size: size of the whole vocabulary, codes and control tokens included.
        hidden_size, intermediate_size, num_layers, num_heads: of the trunk.
    """
    images = load_image_tokenizer(image_tokenizer)
    text = train_text_tokenizer(captions, images.num_codes, text_vocab_size)
    ids = text.convert_tokens_to_ids
    first_code = ids("<code0>")
    config = tiny_trunk_config(
        text, images.num_codes, first_code, hidden_size, intermediate_size, num_layers, num_heads
    )
    config._attn_implementation = "sdpa"
    tokens = ChameleonTokens(
        bos=ids("<s>"),
        separator=ids("<separator>"),
        boi=ids("<boi>"),
        newline=ids("<newline>"),
        size_base=ids("<size0>"),
        size_unit=SIZE_UNIT,
        template="{prompt}",
    )
    return ChameleonBackbone(ChameleonForConditionalGeneration(config), text, images, tokens)
