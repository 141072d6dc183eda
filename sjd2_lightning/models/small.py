"""Models with random weights: releases made small, with their true ids and layouts, and tiny trunks to train.

Small releases are for trying the whole path of a family without its weights (`model.init=random_tiny`) and
for tests. What they draw is noise. Only sizes that the ids do not depend on are shrunk, so the number of
codes is the true one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import VQModel
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import nn
from transformers import (
    ChameleonConfig,
    ChameleonForConditionalGeneration,
    Emu3Config,
    Emu3ForConditionalGeneration,
    JanusConfig,
    JanusForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from sjd2_lightning.models.chameleon import LUMINA_MGPT, ChameleonBackbone, ChameleonTokens, load_chameleon
from sjd2_lightning.models.emu3 import Emu3Backbone, Emu3Tokens
from sjd2_lightning.models.image_tokenizer import VQImageTokenizer, load_image_tokenizer
from sjd2_lightning.models.janus import JanusBackbone, JanusTokens

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
JANUS_SIDE = 4  # codes on a side; the released model has 24


def byte_tokenizer(first_id: int, special: Mapping[str, int]) -> PreTrainedTokenizerFast:
    """A text tokenizer of single bytes, at ids from `first_id` on, that knows the special tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: first_id + place for place, letter in enumerate(letters)} | dict(special)
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in special])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def code_name(code: int) -> str:
    """The name of a code in the vocabulary of Chameleon."""
    return f"IMGIMG{str(code).translate(str.maketrans('0123456789', 'ABCDEFGHIJ'))}Z"


def small_vq(num_codes: int, num_levels: int) -> VQImageTokenizer:
    """An image tokenizer of taming's layout with `num_levels` halvings and random weights."""
    return VQImageTokenizer(
        VQModel(
            block_out_channels=(8,) * (num_levels + 1),
            down_block_types=("DownEncoderBlock2D",) * (num_levels + 1),
            up_block_types=("UpDecoderBlock2D",) * (num_levels + 1),
            layers_per_block=1,
            latent_channels=4,
            num_vq_embeddings=num_codes,
            norm_num_groups=4,
            vq_embed_dim=4,
        )
    ).eval()


def shrunken_chameleon(seed: int = 0, sizes: Mapping[str, int] = SIZES) -> ChameleonBackbone:
    """Lumina-mGPT's layout: sizes are multiples of 32 pixels, a code covers 16.

    Args:
        seed: seed of the weights.
        sizes: sizes of the trunk, by the names of `SIZES`.
    """
    torch.manual_seed(seed)
    tokens = LUMINA_MGPT
    config = ChameleonConfig(
        **sizes,
        vocab_size=65536,
        vocabulary_map={"<image>": 8711, **{code_name(code): 4 + code for code in range(8192)}},
        vq_config={
            "embed_dim": 4,
            "num_embeddings": 8192,
            "latent_channels": 4,
            "base_channels": 32,
            "channel_multiplier": [1],
            "num_res_blocks": 1,
            "attn_type": "none",
        },
    )
    text = byte_tokenizer(60000, {"<s>": tokens.bos, "<reserved08706>": tokens.separator})
    model = random_weights(ChameleonForConditionalGeneration, config)
    return ChameleonBackbone(model, text, small_vq(8192, 4), tokens)


def shrunken_emu3(seed: int = 0, sizes: Mapping[str, int] = SIZES) -> Emu3Backbone:
    """Emu3-Gen's layout: sizes are multiples of 8 pixels, a code covers 8.

    Args:
        seed: seed of the weights.
        sizes: sizes of the trunk, by the names of `SIZES`.
    """
    torch.manual_seed(seed)
    tokens = Emu3Tokens()
    codes = {f"<|visual token {code:06d}|>": 151854 + code for code in range(32768)}
    config = Emu3Config(
        text_config={**sizes, "attention_dropout": 0.0},
        vocabulary_map={"<|extra_200|>": tokens.newline, "<image>": 151859, **codes},
        vq_config={
            "base_channels": 32,
            "channel_multiplier": [1, 1, 1, 1],
            "num_res_blocks": 1,
            "attn_resolutions": [],
            "hidden_size": 32,
            "temporal_downsample_factor": 2,
        },
    )
    special = {"<|extra_203|>": tokens.bos, "<|image start|>": tokens.boi, "<|image token|>": tokens.img}
    return Emu3Backbone(
        random_weights(Emu3ForConditionalGeneration, config), byte_tokenizer(1000, special), tokens
    )


def shrunken_janus(seed: int = 0, sizes: Mapping[str, int] = SIZES, side: int = JANUS_SIDE) -> JanusBackbone:
    """Janus-Pro's layout without newlines; one size, by default 64 x 64 pixels.

    Args:
        seed: seed of the weights.
        sizes: sizes of the trunk, by the names of `SIZES`.
        side: number of codes on a side of the image; each covers 16 pixels.
    """
    torch.manual_seed(seed)
    tokens = JanusTokens()
    config = JanusConfig(
        text_config={"model_type": "llama", **sizes, "vocab_size": 102400},
        vision_config={
            "hidden_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "image_size": 16 * side,
            "patch_size": 16,
            "projection_dim": sizes["hidden_size"],
            "num_image_tokens": side**2,
            "mlp_ratio": 1.0,
        },
        vq_config={
            "base_channels": 32,
            "channel_multiplier": [1, 1, 1, 1, 1],
            "num_res_blocks": 1,
            "latent_channels": 4,
            "projection_dim": sizes["hidden_size"],
            "image_token_embed_dim": sizes["hidden_size"],
        },
    )
    model = random_weights(JanusForConditionalGeneration, config)
    generation = model.generation_config
    generation.bos_token_id, generation.pad_token_id = tokens.bos, tokens.pad
    generation.generation_kwargs = {"boi_token_id": tokens.boi}
    special = {
        "<｜begin▁of▁sentence｜>": tokens.bos,
        "<begin_of_image>": tokens.boi,
        "<｜▁pad▁｜>": tokens.pad,
    }
    return JanusBackbone(model, byte_tokenizer(1000, special), tokens)


def random_weights(model_class: Any, config: Any) -> PreTrainedModel:
    """A model whose laws depend on their context; the 0.02 of the classes makes them nearly uniform."""
    config._attn_implementation = "sdpa"
    model = model_class(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "norm" not in name and "vqmodel" not in name:
            nn.init.normal_(parameter, std=1.5 * parameter.shape[1] ** -0.5)
    nn.init.normal_(model.get_input_embeddings().weight)
    return model


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
    num_positions: int,
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
        max_position_embeddings=num_positions,
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
    num_positions: int = 1024,
    start: str | Path | None = None,
) -> ChameleonBackbone:
    """A tiny backbone with random weights and the text tokenizer of the given captions.

    Args:
        captions: the text tokenizer is trained on them.
        image_tokenizer: folder of the trained image tokenizer.
        text_vocab_size: size of the whole vocabulary, codes and control tokens included.
        hidden_size, intermediate_size, num_layers, num_heads: sizes of the trunk.
        num_positions: most tokens of a prompt and its image.
        start: folder of a trained backbone whose text tokenizer and, where they fit, weights are taken.

    Raises:
        ValueError: the model to start with has another number of codes than the image tokenizer.
    """
    images = load_image_tokenizer(image_tokenizer)
    trained = None if start is None else load_chameleon(start)
    if trained is None:
        text = train_text_tokenizer(captions, images.num_codes, text_vocab_size)
    elif trained.num_codes == images.num_codes:
        text = trained.text_tokenizer
    else:
        raise ValueError(
            f"model.scratch.start={start}: it has {trained.num_codes} codes, and the image tokenizer in "
            f"{image_tokenizer} has {images.num_codes}: train one with as many by tokenizer.num_codes"
        )
    ids = text.convert_tokens_to_ids
    first_code = ids("<code0>")
    config = tiny_trunk_config(
        text,
        images.num_codes,
        first_code,
        hidden_size,
        intermediate_size,
        num_layers,
        num_heads,
        num_positions,
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
    backbone = ChameleonBackbone(ChameleonForConditionalGeneration(config), text, images, tokens)
    if trained is not None:
        copy_weights(trained, backbone)
    return backbone


@torch.no_grad()
def copy_weights(source: ChameleonBackbone, target: ChameleonBackbone) -> None:
    """Copies the weights whose names and shapes are the same, but not the rows of codes.

    A code of one image tokenizer says nothing about the code of that number in another.
    """
    weights = dict(source.model.named_parameters())
    codes = target.slot_token_ids[: target.num_codes]
    by_token = {"model.embed_tokens.weight", "lm_head.weight"}
    for name, own in target.model.named_parameters():
        if name in weights and weights[name].shape == own.shape:
            fresh = own[codes].clone() if name in by_token else None
            own.copy_(weights[name])
            if fresh is not None:
                own[codes] = fresh
