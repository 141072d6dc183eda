"""Emu3-Gen: adapter of transformers' Emu3."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor
from transformers import Emu3ForConditionalGeneration, PreTrainedTokenizerFast

from sjd2_lightning.models.backbone import ImageLayout, rows_with_newlines
from sjd2_lightning.models.image_tokenizer import InnerTokenizer
from sjd2_lightning.models.pretrained import PromptTokens, VocabularyBackbone
from sjd2_lightning.models.weights import LoadOptions, load_parts


@dataclass(frozen=True)
class Emu3Tokens(PromptTokens):
    """Control tokens and prompt texts of Emu3-Gen.

    Layout: bos, text, boi, the digits of "height*width" in codes, img, then rows of codes with `newline`
    behind each, then `closing`: end of frame, end of image, end of sequence.

    Attributes:
        positive: behind every prompt, and
        negative: instead of the prompt on the unconditional side, both as the released script has them.
        unconditional: "negative" is the sequence of that text with its size (the released script), "empty"
            the sequence of an empty text (ours).
    """

    CONTEXTS: ClassVar[tuple[str, ...]] = ("negative", "empty")

    bos: int = 151849
    boi: int = 151852
    img: int = 151851
    newline: int = 151846
    closing: tuple[int, ...] = (151847, 151853, 151850)
    positive: str = " masterpiece, film grained, best quality."
    negative: str = (
        "lowres, bad anatomy, bad hands, text, error, missing fingers, extra digit, fewer digits, cropped, "
        "worst quality, low quality, normal quality, jpeg artifacts, signature, watermark, username, blurry."
    )
    unconditional: str = "negative"


class Emu3Backbone(VocabularyBackbone):
    """`Emu3ForConditionalGeneration` behind the Backbone protocol."""

    FAMILY = "emu3"
    MODEL = Emu3ForConditionalGeneration
    TRUNK_PATH = "model.text_model"
    UNTRAINED = ("model.vqmodel",)

    def __init__(
        self,
        model: Emu3ForConditionalGeneration,
        text_tokenizer: PreTrainedTokenizerFast,
        tokens: Emu3Tokens,
    ) -> None:
        vq = model.model.vqmodel
        images = Emu3Tokenizer(vq, vq.config.codebook_size, vq.spatial_scale_factor)
        codes = model.vocabulary_mapping.img2bpe
        if model.vocabulary_mapping.eol_token_id != tokens.newline:
            raise ValueError(
                f"the model ends rows with token {model.vocabulary_mapping.eol_token_id}, its control tokens "
                f"say {tokens.newline}: correct `newline` in backbone.json"
            )
        super().__init__(model, text_tokenizer, images, tokens, codes, tokens.newline, tokens.closing)
        self.tokens = tokens

    def layout(self, height: int, width: int) -> ImageLayout:
        step = self.image_tokenizer.downsample
        if min(height, width) < step or height % step or width % step:
            raise ValueError(f"image size {width}x{height} must be a positive multiple of {step} pixels")
        return rows_with_newlines(height // step, width // step, self.num_codes, (height, width))

    def prompt_ids(self, prompt: str, layout: ImageLayout) -> list[int]:
        if not prompt.strip():
            raise ValueError("empty prompt: give at least one word")
        return self._sequence(self.text_ids(["", self.tokens.positive], prompt), layout)

    def unconditional_ids(self, layout: ImageLayout, prompt_ids: Sequence[int] = ()) -> list[int]:
        negative = self.tokens.unconditional == "negative"
        return self._sequence(self.text_ids([self.tokens.negative if negative else ""]), layout)

    def _sequence(self, text_ids: Sequence[int], layout: ImageLayout) -> list[int]:
        t = self.tokens
        # the parts are put into ids apart, as special tokens between them cut the text anyway
        size = self.text_ids([f"{layout.height}*{layout.width}"])
        return [t.bos, *text_ids, t.boi, *size, t.img]


def load_emu3(folder: str | Path, trunk: str = "trunk", options: LoadOptions | None = None) -> Emu3Backbone:
    """Loads a folder in Hugging Face layout (`BAAI/Emu3-Gen-hf`), or one that this backbone saved.

    Args:
        folder: a local folder.
        trunk: for a saved one its sub-folder with the weights, or any other path to them.
        options: how weights are read.

    Raises:
        ValueError: if a part is missing or of another family; the message names it.
    """
    options = options or LoadOptions()
    model, text, fields = load_parts(Emu3ForConditionalGeneration, Path(folder), trunk, "emu3", options)
    return Emu3Backbone(model, text, options.tokens(Emu3Tokens(), fields, folder))


class Emu3Tokenizer(InnerTokenizer):
    """Emu3's: a video tokenizer that takes a picture as frames that are all alike."""

    def _codes(self, pixels: Tensor) -> Tensor:
        sizes = torch.tensor([pixels.shape[-2:]] * len(pixels))
        return torch.stack(list(self.vq.encode(pixels, sizes).image_tokens))

    def _pixels(self, image_ids: Tensor) -> Tensor:
        return self.vq.decode(image_ids)
