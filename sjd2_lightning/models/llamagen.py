"""LlamaGen, from texts or from classes: its trunk as transformers' Llama with positions of a grid.

Its prompts are features, of T5 or of a class, and stand at no position: their queries and keys are zero.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, T5EncoderModel

from sjd2_lightning.models.backbone import ImageLayout
from sjd2_lightning.models.image_tokenizer import VQImageTokenizer, load_image_tokenizer
from sjd2_lightning.models.imagenet import class_number
from sjd2_lightning.models.pretrained import PretrainedBackbone, PromptTokens
from sjd2_lightning.models.weights import TOKENIZER, LoadOptions, load_parts, open_weights

NUM_CODES, DOWNSAMPLE = 16384, 16
ENCODER, PREFIX = "text_encoder", "prefix.safetensors"  # parts of a folder, beside those of all families
_XL = {
    "hidden_size": 1280,
    "intermediate_size": 3584,
    "num_hidden_layers": 36,
    "num_attention_heads": 20,
    "num_key_value_heads": 20,
}


@dataclass(frozen=True)
class LlamaGenTokens(PromptTokens):
    """What a LlamaGen is drawn from.

    Layout: features of the prompt, then codes in raster order, without newlines or an end.

    Attributes:
        condition: "text" is T5's features of a caption, "class" one of `num_classes`.
        side: codes on each side of the only size there is.
        most_features: features of a caption, at most.
        eos: token id that T5 has behind a caption.
        num_classes: number of classes; the one behind them is that of guidance.
        unconditional: "learned": the feature of no class, or as many of no caption as the caption has.
    """

    CONTEXTS: ClassVar[tuple[str, ...]] = ("learned",)

    condition: str = "text"
    side: int = 32
    most_features: int = 120
    eos: int = 1
    num_classes: int = 1000
    unconditional: str = "learned"


class GridRotation(nn.Module):
    """Cosines and sines of rows and columns; both are zero in front of the image, as in the release.

    Half of a head turns with the row, the other half with the column. The release turns numbers that lie side
    by side, transformers numbers half a head apart: conversion has put them there.

    Args:
        head_dim: size of a head, a multiple of 4.
        base: base of the rates.
    """

    def __init__(self, head_dim: int, base: float = 10000.0) -> None:
        super().__init__()
        rates = base ** (-torch.arange(0, head_dim // 2, 2).float() / (head_dim // 2))
        self.rates = nn.Buffer(rates, persistent=False)

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L, head_dim) cosines and sines of positions (2, B, L), in the type of `x`.

        Positions (B, L) are those of a row and a column alike.
        """
        position_ids = position_ids.expand(2, *position_ids.shape[-2:])
        angles = (position_ids[..., None] * self.rates.float()).transpose(0, 1).transpose(1, 2).flatten(2)
        inside = (position_ids[0] >= 0)[..., None]
        found = (torch.cat([turn, turn], dim=-1) * inside for turn in (angles.cos(), angles.sin()))
        cosines, sines = (each.to(x.dtype) for each in found)
        return cosines, sines


class Prefix(nn.Module):
    """What stands in front of the codes: a class's embedding, or T5's features made as wide as the trunk.

    Args:
        tokens: what the model is drawn from.
        width: width of the trunk.
        text_width: width of T5's features.
    """

    def __init__(self, tokens: LlamaGenTokens, width: int, text_width: int) -> None:
        super().__init__()
        if tokens.condition == "class":
            self.classes = nn.Embedding(tokens.num_classes + 1, width)
        else:
            self.fc1 = nn.Linear(text_width, width, bias=False)
            self.fc2 = nn.Linear(width, width, bias=False)
            self.empty = nn.Buffer(torch.zeros(tokens.most_features, text_width))

    def project(self, features: Tensor) -> Tensor:
        """(..., D) what the trunk is fed for features (..., F)."""
        return self.fc2(F.gelu(self.fc1(features.to(self.fc1.weight)), approximate="tanh"))


class LlamaGenBackbone(PretrainedBackbone):
    """`LlamaForCausalLM` behind the Backbone protocol, its rotation replaced by that of a grid.

    Ids of a prompt are T5's, from its vocabulary's end on those of features of no caption; or one class.

    Args:
        model: the trunk, whose vocabulary is the codes.
        text_tokenizer: T5's; of a model of classes, any.
        image_tokenizer: both ways.
        tokens: what the model is drawn from.
        text_encoder: T5's encoder, frozen; None for a model of classes.
    """

    FAMILY = "llamagen"
    MODEL = LlamaForCausalLM
    TRUNK_PATH = "model"
    UNTRAINED = ()
    CONVERTED = True
    from_image = True

    def __init__(
        self,
        model: LlamaForCausalLM,
        text_tokenizer: PreTrainedTokenizerFast,
        image_tokenizer: VQImageTokenizer,
        tokens: LlamaGenTokens,
        text_encoder: T5EncoderModel | None,
    ) -> None:
        config = model.config
        rotation = GridRotation(config.hidden_size // config.num_attention_heads)
        model.model.rotary_emb = rotation.to(model.device)
        super().__init__(model, text_tokenizer, image_tokenizer, tokens)
        if (text_encoder is None) is (tokens.condition == "text"):
            raise ValueError(
                f"a LlamaGen drawn from {tokens.condition}: T5's encoder is for texts, and needed there"
            )
        self.tokens = tokens
        self.shortest_prompt = "0" if tokens.condition == "class" else "a"
        self.image_tokenizer: VQImageTokenizer = image_tokenizer
        self.text_encoder = text_encoder
        text_width = 0 if text_encoder is None else text_encoder.config.d_model
        self.prefix = Prefix(tokens, config.hidden_size, text_width).to(model.dtype)
        self.num_texts = 0 if text_encoder is None else text_encoder.config.vocab_size
        self.num_positions = tokens.side**2 + (tokens.most_features if tokens.condition == "text" else 1)
        if text_encoder is not None:
            text_encoder.requires_grad_(False).eval()

    @classmethod
    def release_config(cls, name: str) -> Any:
        return cls.MODEL.config_class(**_XL, vocab_size=NUM_CODES, rms_norm_eps=1e-5)

    @classmethod
    def codes_of_config(cls, config: Any) -> tuple[int, int]:
        return NUM_CODES, DOWNSAMPLE

    def train(self, mode: bool = True) -> LlamaGenBackbone:
        super().train(mode)
        encoder = getattr(self, "text_encoder", None)  # not there yet while the base class is made
        if encoder is not None:
            encoder.eval()
        return self

    def layout(self, height: int, width: int) -> ImageLayout:
        side = self.tokens.side
        pixels = side * self.image_tokenizer.downsample
        if (height, width) != (pixels, pixels):
            raise ValueError(f"image size {width}x{height}: this model draws {pixels}x{pixels} pixels only")
        rows = tuple(row for row in range(side) for _ in range(side))
        columns = tuple(column for _ in range(side) for column in range(side))
        return ImageLayout(side, side, (-1,) * side**2, (height, width), (rows, columns))

    def prompt_ids(self, prompt: str, layout: ImageLayout) -> list[int]:
        if not prompt.strip():
            raise ValueError("empty prompt: give at least one word")
        if self.tokens.condition == "text":
            return [*self.text_ids(["", ""], cleaned(prompt) or prompt.strip()), self.tokens.eos]
        return [class_number(prompt, self.tokens.num_classes)]

    def unconditional_ids(self, layout: ImageLayout, prompt_ids: Sequence[int] = ()) -> list[int]:
        if self.tokens.condition == "class":
            return [self.tokens.num_classes]
        # features are aligned at their right ends, those of no caption too
        end = self.num_texts + self.tokens.most_features
        return list(range(end - max(1, len(prompt_ids)), end))

    def excess(self, ids: Sequence[int], layout: ImageLayout) -> str:
        most = self.tokens.most_features
        if self.tokens.condition == "class" or len(ids) <= most:
            return ""
        return f"{len(ids):,} tokens, and the model reads {most} of T5's features; shorten it"

    def embed_tokens(self, token_ids: Tensor) -> Tensor:
        flat = token_ids.reshape(-1, token_ids.shape[-1])
        found = self.embed_prompts(flat, torch.zeros_like(flat[:, 0]))
        return found.view(*token_ids.shape, -1)

    def embed_prompts(self, token_ids: Tensor, starts: Tensor) -> Tensor:
        if self.text_encoder is None:
            return self.prefix.classes(token_ids)
        features = self.prefix.empty.new_zeros(*token_ids.shape, self.text_encoder.config.d_model)
        for row, (ids, start) in enumerate(zip(token_ids, starts.tolist(), strict=True)):
            features[row, start:] = self._features(ids[start:])  # alone: a prompt has one image in any batch
        return self.prefix.project(features)

    @torch.no_grad()
    def _features(self, ids: Tensor) -> Tensor:
        """(n, F) features of a caption's ids (n,), or of no caption."""
        if int(ids[0]) >= self.num_texts:
            return self.prefix.empty[ids - self.num_texts]
        assert self.text_encoder is not None
        return self.text_encoder(input_ids=ids[None]).last_hidden_state[0].to(self.prefix.empty)

    def slot_table(self) -> Tensor:
        return self.model.model.embed_tokens.weight

    def image_logits(self, hidden: Tensor) -> Tensor:
        return self.model.lm_head(hidden)

    def save(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        self._refuse_quantized("save")  # before anything is written
        folder = Path(folder)
        self.image_tokenizer.save(folder / TOKENIZER, half=None)
        state = {name: value.to(dtype or value.dtype) for name, value in self.prefix.state_dict().items()}
        save_file({name: value.contiguous() for name, value in state.items()}, folder / PREFIX)
        if self.text_encoder is not None:
            self.text_encoder.save_pretrained(folder / ENCODER)
        super().save(folder, dtype)


def cleaned(caption: str) -> str:
    """A caption as the release cleans it for T5, as far as that touches plain captions."""
    caption = re.sub(r"\bhttps?://\S+|\bwww\.\S+|<[^>]*>|@\w+\b", "", caption.lower())
    caption = re.sub(r"[\u02d7\u058a\u2010-\u2015\u2212\ufe58\ufe63\uff0d]+", "-", caption)
    caption = re.sub(r"[`´«»“”¨]", '"', caption)
    caption = re.sub(r"[‘’]", "'", caption)
    caption = re.sub(r"[#®•©™&@·º½¾¿¡§~()\[\]{}|\\/*]+", " ", caption)
    caption = re.sub(r"\s+\.\s+", " ", caption)
    if len(re.findall(r"[-_]", caption)) > 3:  # this-is-a-file's_name
        caption = re.sub(r"[-_]", " ", caption)
    caption = re.sub(r"\s+:\s+", ": ", caption)
    caption = re.sub(r"(\D[,./])\b", r"\1 ", caption)
    caption = re.sub(r"\s+", " ", caption).strip()
    caption = re.sub(r"^[\"'](.+)[\"']$", r"\1", caption)
    return re.sub(r"^['_,\-:;]|['_,\-:+]$", "", caption).strip()


def load_llamagen(
    folder: str | Path, trunk: str = "trunk", options: LoadOptions | None = None
) -> LlamaGenBackbone:
    """Loads what `sjd2 convert` or this backbone wrote.

    Args:
        folder: a local folder.
        trunk: its sub-folder with the trunk's weights, or any other path to them.
        options: how weights are read.

    Raises:
        ValueError: if a part is missing or of another family; the message names it.
    """
    folder, options = Path(folder), options or LoadOptions()
    if not (folder / "backbone.json").is_file():
        raise ValueError(
            f"no backbone in {folder}: backbone.json is missing; a released LlamaGen is brought into this "
            f"layout by `sjd2 convert --gpt`, or {options.remedy}"
        )
    model, text, fields = load_parts(LlamaForCausalLM, folder, trunk, "llamagen", options)
    tokens = options.tokens(LlamaGenTokens(), fields, folder)
    encoder = None
    if tokens.condition == "text":
        try:
            encoder = T5EncoderModel.from_pretrained(
                folder / ENCODER, dtype=options.dtype, use_safetensors=True, local_files_only=True
            )
        except Exception as error:  # transformers has many kinds
            where = folder / ENCODER
            raise ValueError(f"no encoder of T5 in {where} ({error}); {options.remedy}") from error
    images = load_image_tokenizer(folder / TOKENIZER)
    if not isinstance(images, VQImageTokenizer):
        raise ValueError(f"{folder / TOKENIZER} is no VQ model, which LlamaGen draws with; {options.remedy}")
    backbone = LlamaGenBackbone(model, text, images, tokens, encoder).eval()
    if not (folder / PREFIX).is_file():
        raise ValueError(f"no backbone in {folder}: {PREFIX} is missing; {options.remedy}")
    with open_weights(folder / PREFIX) as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no dictionary
    try:
        backbone.prefix.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{folder / PREFIX} does not fit backbone.json: {error}") from error
    return backbone
