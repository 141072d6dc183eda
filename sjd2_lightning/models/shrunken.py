"""Releases of further families made small: see `small`, whose ways they share."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    GlmImageConfig,
    GlmImageForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5EncoderModel,
)

from sjd2_lightning.models.glm_image import GlmImageBackbone, GlmImageTokens
from sjd2_lightning.models.llamagen import NUM_CODES as LLAMAGEN_CODES
from sjd2_lightning.models.llamagen import LlamaGenBackbone, LlamaGenTokens
from sjd2_lightning.models.simple_ar import (
    DOWNSAMPLE,
    NUM_CODES,
    CosmosTokenizer,
    SimpleARBackbone,
    SimpleARTokens,
)
from sjd2_lightning.models.small import SIZES, byte_tokenizer, random_weights, small_vq

_CONTROL = ("<|t2i|>", "<|i2t|>", "<|soi|>", "<|vtokens|>", "<|t2v|>", "<|v2t|>", "<|sov|>")
_LEVELS = (8, 8, 8, 5, 5, 5)  # of Cosmos' scalar quantisation: their product is the number of codes


class _Frames(nn.Module):
    """Half of a tokenizer with Cosmos' codes: a frame's patches to the digits of a code, or back."""

    def __init__(self) -> None:
        super().__init__()
        levels = torch.tensor(_LEVELS)
        self.levels = nn.Buffer(levels)
        self.worth = nn.Buffer(NUM_CODES // levels.cumprod(0))  # of a digit


class _Encoder(_Frames):
    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, len(_LEVELS), 16, 16)

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        levels = self.levels.view(1, -1, 1, 1)
        shares = torch.sigmoid(4 * self.patch(frames[:, :, 0]))
        digits = torch.minimum((shares * levels).long(), levels - 1)
        return (digits * self.worth.view(1, -1, 1, 1)).sum(1)[:, None], shares


class _Decoder(_Frames):
    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(len(_LEVELS), 3 * 16 * 16, 1)

    def forward(self, codes: Tensor) -> Tensor:
        digits = codes // self.worth.view(1, -1, 1, 1) % self.levels.view(1, -1, 1, 1)
        shares = digits.to(self.patch.weight) / self.levels.view(1, -1, 1, 1)
        return torch.tanh(F.pixel_shuffle(self.patch(shares), 16))[:, :, None]


def shrunken_cosmos(dtype: torch.dtype = torch.float32) -> CosmosTokenizer:
    """Two programs in TorchScript with the inputs and outputs of Cosmos', random weights of a type."""
    assert DOWNSAMPLE == 16
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`torch\.jit\.\w+` is deprecated", FutureWarning)
        parts = [
            torch.jit.trace(_Encoder().to(dtype).eval(), torch.zeros(1, 3, 1, 32, 32, dtype=dtype)),
            torch.jit.trace(_Decoder().to(dtype).eval(), torch.zeros(1, 1, 2, 2, dtype=torch.long)),
        ]
    return CosmosTokenizer(*parts).eval()


def shrunken_simple_ar(seed: int = 0, sizes: Mapping[str, int] = SIZES) -> SimpleARBackbone:
    """SimpleAR's layout: squares of multiples of 16 pixels, a code covers 16.

    Args:
        seed: seed of the weights.
        sizes: sizes of the trunk, by the names of `SIZES`.
    """
    torch.manual_seed(seed)
    tokens = SimpleARTokens()
    text = byte_tokenizer(1000, {name: 151665 + place for place, name in enumerate(_CONTROL)})
    config = Qwen2Config(
        **{**sizes, "num_key_value_heads": max(1, sizes["num_key_value_heads"] // 2)},
        vocab_size=tokens.first_code + NUM_CODES,
        tie_word_embeddings=True,
    )
    model = random_weights(Qwen2ForCausalLM, config)
    return SimpleARBackbone(model, text, shrunken_cosmos(), tokens)


def shrunken_glm_image(seed: int = 0, sizes: Mapping[str, int] = SIZES) -> GlmImageBackbone:
    """GLM-Image's layout: multiples of 32 pixels, a code covers 32; drafts have 2 x 2 codes, not 16 x 16.

    Args:
        seed: seed of the weights.
        sizes: sizes of the trunk, by the names of `SIZES`.
    """
    torch.manual_seed(seed)
    special = {"<|dit_token_16384|>": 16384, "<|dit_token_16385|>": 16385, "<sop>": 167845, "<eop>": 167846}
    head = max(16, sizes["hidden_size"] // sizes["num_attention_heads"])
    axis = head // 4 // 3  # half of a head is rotated, in pairs that the three axes share
    config = GlmImageConfig(
        text_config={
            **sizes,
            "head_dim": head,
            "num_key_value_heads": max(1, sizes["num_key_value_heads"] // 2),
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
                "mrope_section": [head // 4 - 2 * axis, axis, axis],
            },
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "num_heads": 2,
            "intermediate_size": 16,
            "image_size": 64,
        },
        vq_config={"embed_dim": 8, "latent_channels": 16},
    )
    model = random_weights(GlmImageForConditionalGeneration, config)
    return GlmImageBackbone(model, byte_tokenizer(20000, special), GlmImageTokens(draft_side=2))


def shrunken_llamagen(
    seed: int = 0, sizes: Mapping[str, int] = SIZES, side: int = 4, condition: str = "text"
) -> LlamaGenBackbone:
    """LlamaGen's layout; one size, by default 64 x 64 pixels, a code covers 16.

    Args:
        seed: seed of the weights.
        sizes: sizes of the trunk, by the names of `SIZES`.
        side: number of codes on a side of the image.
        condition: "text" or "class", what it is drawn from.
    """
    torch.manual_seed(seed)
    config = LlamaConfig(**sizes, vocab_size=LLAMAGEN_CODES, rms_norm_eps=1e-5)
    model = random_weights(LlamaForCausalLM, config)
    images = small_vq(LLAMAGEN_CODES, 4)  # before what one condition has alone: codes of data suit both
    encoder = None
    if condition == "text":
        t5 = T5Config(
            vocab_size=320,
            d_model=16,
            d_kv=8,
            d_ff=16,
            num_layers=1,
            num_heads=2,
            feed_forward_proj="gated-gelu",
        )
        encoder = random_weights(T5EncoderModel, t5)
    text = byte_tokenizer(3, {"<pad>": 0, "</s>": 1, "<unk>": 2})
    tokens = LlamaGenTokens(condition=condition, side=side)
    backbone = LlamaGenBackbone(model, text, images, tokens, encoder)
    for tensor in (*backbone.prefix.parameters(), *backbone.prefix.buffers()):
        nn.init.normal_(tensor, std=tensor.shape[1] ** -0.5 if condition == "text" else 1.0)
    return backbone.eval()
