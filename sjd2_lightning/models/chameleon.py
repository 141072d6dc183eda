"""Lumina-mGPT and its miniature: adapter of transformers' Chameleon."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from transformers import ChameleonForConditionalGeneration, PreTrainedTokenizerFast

from sjd2_lightning.models.backbone import ImageLayout, rows_with_newlines
from sjd2_lightning.models.image_tokenizer import VQImageTokenizer, load_image_tokenizer
from sjd2_lightning.models.patch_tokenizer import PatchTokenizer
from sjd2_lightning.models.pretrained import PROMPT, PromptTokens, VocabularyBackbone
from sjd2_lightning.models.weights import TOKENIZER, LoadOptions, load_parts


@dataclass(frozen=True)
class ChameleonTokens(PromptTokens):
    """Control tokens and prompt template of a Chameleon-type model; the defaults are Lumina-mGPT's.

    Layout: bos, text, separator, boi, size_base + height / size_unit, size_base + width / size_unit, then
    rows of codes with `newline` behind each, then `closing`.

    Attributes:
        closing: behind the last row; Lumina-mGPT has the end of the image and the separator there.
        unconditional: "boi" is the sequence from boi on (the released script of autoregressive decoding),
            "empty" the template with an empty prompt (ours).
    """

    CONTEXTS: ClassVar[tuple[str, ...]] = ("boi", "empty")

    bos: int = 0
    separator: int = 8710
    boi: int = 8197
    newline: int = 8803
    size_base: int = 8804
    size_unit: int = 32
    template: str = "Generate an image of {width}x{height} according to the following prompt:\n{prompt}"
    closing: tuple[int, ...] = ()
    unconditional: str = "boi"


LUMINA_MGPT = ChameleonTokens(closing=(8196, 8710))


class ChameleonBackbone(VocabularyBackbone):
    """`ChameleonForConditionalGeneration` behind the Backbone protocol.

    `ChameleonForConditionalGeneration.forward` masks every image logit, so trunk and head are called apart.
    Its own image encoder is not used: transformers has no decoder beside it, so the image tokenizer is a
    `diffusers.VQModel` both ways.
    """

    FAMILY = "chameleon"
    MODEL = ChameleonForConditionalGeneration
    TRUNK_PATH = "model"
    UNTRAINED = ("model.vqmodel",)
    CONVERTED = True

    def __init__(
        self,
        model: ChameleonForConditionalGeneration,
        text_tokenizer: PreTrainedTokenizerFast,
        image_tokenizer: VQImageTokenizer | PatchTokenizer,
        tokens: ChameleonTokens,
    ) -> None:
        codes = model.model.vocabulary_mapping.img2bpe
        super().__init__(
            model, text_tokenizer, image_tokenizer, tokens, codes, tokens.newline, tokens.closing
        )
        self.tokens = tokens
        self.image_tokenizer: VQImageTokenizer | PatchTokenizer = image_tokenizer

    def layout(self, height: int, width: int) -> ImageLayout:
        step = self.image_tokenizer.downsample
        unit = self.tokens.size_unit
        if min(height, width) < unit or height % unit or width % unit:
            raise ValueError(f"image size {width}x{height} must be a positive multiple of {unit} pixels")
        if self.tokens.size_base + max(height, width) // unit >= self.model.config.vocab_size:
            raise ValueError(f"image size {width}x{height}: the model's vocabulary has no size token for it")
        return rows_with_newlines(height // step, width // step, self.num_codes, (height, width))

    def unconditional_ids(self, layout: ImageLayout, prompt_ids: Sequence[int] = ()) -> list[int]:
        return self._start(layout) if self.tokens.unconditional == "boi" else self._sequence("", layout)

    def prompt_ids(self, prompt: str, layout: ImageLayout) -> list[int]:
        if not prompt.strip():
            raise ValueError("empty prompt: give at least one word")
        return self._sequence(prompt, layout)

    def _start(self, layout: ImageLayout) -> list[int]:
        t = self.tokens
        height, width = layout.pixels
        return [t.boi, t.size_base + height // t.size_unit, t.size_base + width // t.size_unit]

    def _sequence(self, prompt: str, layout: ImageLayout) -> list[int]:
        height, width = layout.pixels
        parts = [part.format(width=width, height=height) for part in self.tokens.template.split(PROMPT)]
        return [
            self.tokens.bos,
            *self.text_ids(parts, prompt),
            self.tokens.separator,
            *self._start(layout),
        ]

    def save(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        self._refuse_quantized("save")  # before anything is written
        self.image_tokenizer.save(Path(folder) / TOKENIZER, half=None)
        super().save(folder, dtype)


def load_chameleon(
    folder: str | Path, trunk: str = "trunk", options: LoadOptions | None = None
) -> ChameleonBackbone:
    """Loads a local folder: `backbone.json`, `trunk/`, `text/`, `tokenizer/`.

    Args:
        folder: the backbone folder.
        trunk: its sub-folder with the trunk's weights, or any other path to them.
        options: how weights are read.

    Raises:
        ValueError: if a part is missing; the message names it.
    """
    folder = Path(folder)
    options = options or LoadOptions()
    if not (folder / "backbone.json").is_file():
        raise ValueError(
            f"no backbone in {folder}: backbone.json is missing; a released Lumina-mGPT is brought into this "
            f"layout by `sjd2 convert`, or {options.remedy}"
        )
    # nothing here reads the encoder inside Chameleon, which released trunks lack
    model, text, fields = load_parts(
        ChameleonForConditionalGeneration, folder, trunk, "chameleon", options, ("model.vqmodel.",)
    )
    tokens = options.tokens(ChameleonTokens(), fields, folder)
    return ChameleonBackbone(model, text, load_image_tokenizer(folder / TOKENIZER), tokens)
