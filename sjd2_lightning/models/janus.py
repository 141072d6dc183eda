"""Janus-Pro: adapter of transformers' Janus."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import JanusForConditionalGeneration, PreTrainedTokenizerFast

from sjd2_lightning.models.backbone import ImageLayout
from sjd2_lightning.models.image_tokenizer import InnerTokenizer
from sjd2_lightning.models.pretrained import PROMPT, PretrainedBackbone, PromptTokens
from sjd2_lightning.models.weights import LoadOptions, load_parts, read_json

# Sizes of the language models, as far as known; a config.json in the weights' folder replaces them.
_RELEASES = {
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
    },
    "7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 30,
        "num_attention_heads": 32,
    },
}


@dataclass(frozen=True)
class JanusTokens(PromptTokens):
    """Control tokens and chat template of Janus-Pro.

    Layout: bos, chat text, boi, then the codes, without newlines or an end.

    Attributes:
        bos, boi, pad: token ids; pad differs between the sizes of the model, so `load_janus` takes the three
            from the generation_config.json of a released folder.
        template: chat text around the prompt.
        unconditional: "padded" keeps bos and boi and puts pad in place of every other token of the prompt
            (the released script), "short" is bos and boi alone (ours).
    """

    CONTEXTS: ClassVar[tuple[str, ...]] = ("padded", "short")

    bos: int = 100000
    boi: int = 100016
    pad: int = 100002
    template: str = "<|User|>: {prompt}\n\n<|Assistant|>:"
    unconditional: str = "padded"


class JanusBackbone(PretrainedBackbone):
    """`JanusForConditionalGeneration` behind the Backbone protocol.

    Codes have an embedding, an aligner and a head of their own. What the trunk is fed, and so what noise is
    added to, is the aligner's output.
    """

    FAMILY = "janus"
    MODEL = JanusForConditionalGeneration
    TRUNK_PATH = "model.language_model"
    FILES = ("generation_config.json",)
    UNTRAINED = ("model.vqmodel", "model.vision_model", "model.aligner")

    def __init__(
        self,
        model: JanusForConditionalGeneration,
        text_tokenizer: PreTrainedTokenizerFast,
        tokens: JanusTokens,
    ) -> None:
        config = model.config.vq_config
        downsample = 2 ** (len(config.channel_multiplier) - 1)
        images = JanusTokenizer(model.model.vqmodel, config.num_embeddings, downsample)
        super().__init__(model, text_tokenizer, images, tokens)
        self.tokens = tokens
        self.side = config.num_patches  # codes on each side of the only size there is

    @classmethod
    def release_config(cls, name: str) -> Any:
        text = {"model_type": "llama", "vocab_size": 102400, **_RELEASES["7b" if "7b" in name else "1b"]}
        width = {"projection_dim": text["hidden_size"]}
        vq = {**width, "image_token_embed_dim": text["hidden_size"]}
        return cls.MODEL.config_class(text_config=text, vision_config=width, vq_config=vq)

    def layout(self, height: int, width: int) -> ImageLayout:
        pixels = self.side * self.image_tokenizer.downsample
        if (height, width) != (pixels, pixels):
            raise ValueError(f"image size {width}x{height}: this model draws {pixels}x{pixels} pixels only")
        return ImageLayout(self.side, self.side, (-1,) * self.side**2, (height, width))

    def prompt_ids(self, prompt: str, layout: ImageLayout) -> list[int]:
        if not prompt.strip():
            raise ValueError("empty prompt: give at least one word")
        parts = [part.format() for part in self.tokens.template.split(PROMPT)]
        return [self.tokens.bos, *self.text_ids(parts, prompt), self.tokens.boi]

    def unconditional_ids(self, layout: ImageLayout, prompt_ids: Sequence[int] = ()) -> list[int]:
        padded = self.tokens.unconditional == "padded"
        between = max(0, len(prompt_ids) - 2) if padded else 0
        return [self.tokens.bos, *[self.tokens.pad] * between, self.tokens.boi]

    def slot_table(self) -> Tensor:
        codes = torch.arange(self.num_codes, device=self.device)
        return self.model.model.generation_aligner(self.model.model.generation_embeddings(codes))

    def image_logits(self, hidden: Tensor) -> Tensor:
        return self.model.model.generation_head(hidden)


def load_janus(folder: str | Path, trunk: str = "trunk", options: LoadOptions | None = None) -> JanusBackbone:
    """Loads a folder in Hugging Face layout (`deepseek-community/Janus-Pro-1B`), or a saved backbone.

    Args:
        folder: a local folder.
        trunk: for a saved one its sub-folder with the weights, or any other path to them.
        options: how weights are read.

    Raises:
        ValueError: if a part is missing or of another family; the message names it.
    """
    folder = Path(folder)
    options = options or LoadOptions()
    model, text, fields = load_parts(JanusForConditionalGeneration, folder, trunk, "janus", options)
    return JanusBackbone(model, text, options.tokens(JanusTokens(), fields or _released_ids(folder), folder))


def _released_ids(folder: Path) -> dict[str, Any]:
    """Control tokens that transformers' own `generate` takes from the folder.

    The file is read here, since `GenerationConfig` drops its `generation_kwargs`.
    """
    path = folder / "generation_config.json"
    fields = read_json(path) if path.is_file() else {}
    ids = {"bos": fields.get("bos_token_id"), "pad": fields.get("pad_token_id")}
    if unknown := [f"{name}_token_id" for name, value in ids.items() if value is None]:
        raise ValueError(f"{path} does not say {', '.join(unknown)}: get the file of the released model")
    if "boi_token_id" in fields.get("generation_kwargs", {}):
        ids["boi"] = fields["generation_kwargs"]["boi_token_id"]
    return ids


class JanusTokenizer(InnerTokenizer):
    """Janus': its decoder reads codes as directions, so encoding compares directions too.

    The class of transformers compares lengths as well; the original implementation does not.
    """

    def _codes(self, pixels: Tensor) -> Tensor:
        latents = F.normalize(self.vq.quant_conv(self.vq.encoder(pixels)), dim=1)  # (B, C, H, W)
        rows = F.normalize(self.vq.quantize.embedding.weight, dim=-1)
        return torch.einsum("bchw,kc->bhwk", latents, rows).argmax(-1)

    def _pixels(self, image_ids: Tensor) -> Tensor:
        return self.vq.decode(image_ids.flatten(1))
