"""SimpleAR 0.5B and 1.5B: adapter of transformers' Qwen2, with NVIDIA's Cosmos tokenizer as released."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

from sjd2_lightning.models.backbone import ImageLayout
from sjd2_lightning.models.image_codes import check_image_ids, check_image_size, weights_identity
from sjd2_lightning.models.pretrained import PROMPT, PromptTokens, VocabularyBackbone
from sjd2_lightning.models.weights import TOKENIZER, LoadOptions, damage, load_parts

NUM_CODES, DOWNSAMPLE = 64000, 16  # of Cosmos-1.0-Tokenizer-DV8x16x16
# sizes of Qwen2.5, which the release grew out of; a config.json in the weights' folder replaces them
_RELEASES = {
    "0.5b": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
    },
    "1.5b": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
    },
}


@dataclass(frozen=True)
class SimpleARTokens(PromptTokens):
    """Control tokens and templates of SimpleAR.

    Layout: the template with its control tokens, then the codes in raster order, without newlines or an end.

    Attributes:
        first_code: token id of code 0, the length of the text tokenizer.
        template: around the prompt.
        negative: instead of it on the unconditional side, as the released script has it.
        empty: the template without words that training showed in place of a dropped prompt.
        unconditional: "negative" (the released script) or "empty" (what training showed).
    """

    CONTEXTS: ClassVar[tuple[str, ...]] = ("negative", "empty")

    first_code: int = 151672
    template: str = "<|t2i|>A highly realistic image of {prompt}<|soi|>"
    negative: str = (
        "<|t2i|>An image of aerial view, overexposed, low quality, deformation, a poor composition, "
        "bad hands, bad teeth, bad eyes, bad limbs, distortion<|soi|>"
    )
    empty: str = "<|t2i|><|soi|>"
    unconditional: str = "negative"


class CosmosTokenizer(nn.Module):
    """Cosmos' discrete tokenizer of videos, whose pictures are videos of one frame; ids in and out.

    The release is two programs in TorchScript, which know neither their number of codes nor pixels. They run
    in the type of their own numbers, which is part of the program.

    Args:
        encoder: from frames (B, 3, 1, h, w) in [-1, 1] to codes (B, 1, H, W), or a tuple that starts so.
        decoder: from these codes to such frames.
    """

    num_codes, downsample = NUM_CODES, DOWNSAMPLE

    def __init__(self, encoder: torch.jit.ScriptModule, decoder: torch.jit.ScriptModule) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    @property
    def identity(self) -> str:
        """Hash of the weights: shards say with it which tokenizer made them."""
        return weights_identity(self)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Image ids (B, H, W) int64 of images (B, 3, h, w) in [0, 1].

        Raises:
            ValueError: if the size is no multiple of `downsample`.
        """
        check_image_size(images, self.downsample)
        number = next(self.encoder.parameters())
        found = self.encoder((images[:, :, None] * 2 - 1).to(number))
        return (found[0] if isinstance(found, tuple) else found)[:, 0].long()

    @torch.no_grad()
    def decode(self, image_ids: Tensor) -> Tensor:
        """Images (B, 3, h, w) in [0, 1] of image ids (B, H, W); raises ValueError outside the codebook."""
        check_image_ids(image_ids, self.num_codes)
        return ((self.decoder(image_ids[:, None])[:, :, 0].float() + 1) / 2).clamp(0, 1)

    def save(self, folder: str | Path) -> None:
        """Writes the two files."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name in ("encoder", "decoder"):
            getattr(self, name).save(str(Path(folder) / f"{name}.jit"))


def load_cosmos(folder: Path, remedy: str) -> CosmosTokenizer:
    """The tokenizer of `encoder.jit` and `decoder.jit`, in eval mode.

    Args:
        folder: holds the two files.
        remedy: what an error about a missing file tells the reader to do.

    Raises:
        ValueError: a file is missing or no TorchScript.
    """
    parts = []
    for path in (folder / "encoder.jit", folder / "decoder.jit"):
        if not path.is_file():
            raise ValueError(f"no image tokenizer in {folder}: {path.name} is missing; {remedy}")
        try:
            with warnings.catch_warnings():
                # torch would like another format, in which Cosmos is not published
                warnings.filterwarnings("ignore", r"`torch\.jit\.load` is deprecated", FutureWarning)
                parts.append(torch.jit.load(path, map_location="cpu"))
        except (RuntimeError, ValueError) as error:
            why = damage(path) or str(error).splitlines()[0]
            raise ValueError(f"{path} is no program in TorchScript: {why}; get the file again") from error
    return CosmosTokenizer(*parts).eval().requires_grad_(False)


class SimpleARBackbone(VocabularyBackbone):
    """`Qwen2ForCausalLM` behind the Backbone protocol; codes follow the text in its vocabulary."""

    FAMILY = "simple_ar"
    MODEL = Qwen2ForCausalLM
    TRUNK_PATH = "model"
    UNTRAINED = ()
    FILES = (f"{TOKENIZER}/encoder.jit", f"{TOKENIZER}/decoder.jit")
    NEWLINE = False

    def __init__(
        self,
        model: Qwen2ForCausalLM,
        text_tokenizer: PreTrainedTokenizerFast,
        image_tokenizer: CosmosTokenizer,
        tokens: SimpleARTokens,
    ) -> None:
        if model.config.vocab_size < tokens.first_code + NUM_CODES:
            raise ValueError(
                f"the model has {model.config.vocab_size:,} tokens, and {NUM_CODES:,} codes from "
                f"{tokens.first_code} on need more: text tokenizer and weights are not of one model"
            )
        codes = {code: tokens.first_code + code for code in range(NUM_CODES)}
        super().__init__(model, text_tokenizer, image_tokenizer, tokens, codes)
        known = {str(token) for token in text_tokenizer.added_tokens_decoder.values()}
        texts = tokens.template + tokens.negative + tokens.empty
        if missing := sorted(set(re.findall(r"<\|\w+\|>", texts)) - known):
            raise ValueError(
                f"the text tokenizer has no control token {', '.join(missing)}: it is not SimpleAR's; get "
                "the tokenizer.json of the release"
            )
        self.tokens = tokens
        self.image_tokenizer: CosmosTokenizer = image_tokenizer

    @classmethod
    def release_config(cls, name: str) -> Any:
        size = "1.5b" if "1.5b" in name else "0.5b"
        vocabulary = SimpleARTokens.first_code + NUM_CODES
        return cls.MODEL.config_class(**_RELEASES[size], vocab_size=vocabulary, tie_word_embeddings=True)

    @classmethod
    def codes_of_config(cls, config: Any) -> tuple[int, int]:
        return NUM_CODES, DOWNSAMPLE

    def layout(self, height: int, width: int) -> ImageLayout:
        if height != width or height < DOWNSAMPLE or height % DOWNSAMPLE:
            raise ValueError(
                f"image size {width}x{height}: this model draws squares, as nothing in its sequence says a "
                f"width; give a multiple of {DOWNSAMPLE} pixels twice"
            )
        side = height // DOWNSAMPLE
        return ImageLayout(side, side, (-1,) * side**2, (height, width))

    def prompt_ids(self, prompt: str, layout: ImageLayout) -> list[int]:
        if not prompt.strip():
            raise ValueError("empty prompt: give at least one word")
        return self.text_ids([part.format() for part in self.tokens.template.split(PROMPT)], prompt)

    def unconditional_ids(self, layout: ImageLayout, prompt_ids: Sequence[int] = ()) -> list[int]:
        negative = self.tokens.unconditional == "negative"
        return self.text_ids([self.tokens.negative if negative else self.tokens.empty])

    def save(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        self._refuse_quantized("save")  # before anything is written
        self.image_tokenizer.save(Path(folder) / TOKENIZER)
        super().save(folder, dtype)


def load_simple_ar(
    folder: str | Path, trunk: str = "trunk", options: LoadOptions | None = None
) -> SimpleARBackbone:
    """Loads a folder of the release with Cosmos' two files in `tokenizer/`, or one that this backbone saved.

    Args:
        folder: a local folder.
        trunk: for a saved one its sub-folder with the weights, or any other path to them.
        options: how weights are read.

    Raises:
        ValueError: if a part is missing or of another family; the message names it.
    """
    folder, options = Path(folder), options or LoadOptions()
    images = load_cosmos(folder / TOKENIZER, options.remedy)
    model, text, fields = load_parts(Qwen2ForCausalLM, folder, trunk, SimpleARBackbone.FAMILY, options)
    tokens = options.tokens(SimpleARTokens(), fields or {"first_code": len(text)}, folder)
    return SimpleARBackbone(model, text, images, tokens)
