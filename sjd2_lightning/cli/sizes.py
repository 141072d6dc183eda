"""Sizes of a model from its configuration files alone, or as its release is known here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sjd2_lightning.config.groups import ModelConfig, shipped
from sjd2_lightning.models.pretrained import PretrainedBackbone
from sjd2_lightning.models.registry import family_of
from sjd2_lightning.models.weights import (
    BACKBONE_FILE,
    PATCH_SETTINGS,
    TOKENIZER,
    has_image_tokenizer,
    read_json,
)

# Sizes of Janus' language models, as far as known; a config.json in the weights' folder replaces them.
_JANUS_TEXT = {
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
class Codes:
    """What a model's image tokenizer makes of pictures, known without its weights.

    Attributes:
        num_codes: size of the codebook.
        pixels: side of the square that a code covers.
    """

    num_codes: int
    pixels: int


def codes_of(model: ModelConfig) -> Codes | None:
    """The codes of a model's images from its configuration files; None where these cannot be read."""
    adapter = family_of(model.family).adapter
    own, trunk = None, None
    if model.scratch is not None:
        own = shipped(model.scratch.image_tokenizer)
    elif model.init == "pretrained":
        folder = model.source.path
        saved = (Path(folder) / BACKBONE_FILE).is_file()
        own, trunk = (Path(folder) / TOKENIZER, Path(folder) / model.trunk) if saved else (None, Path(folder))
    try:
        if own is not None and has_image_tokenizer(own):
            return _saved_codes(own)
        if trunk is None:
            config = known_config(adapter, "1b")
        else:
            config = adapter.MODEL.config_class.from_pretrained(trunk, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError):
        return None  # whatever is wrong there, loading says it
    return Codes(num_codes(config), 2 ** (len(config.vq_config.channel_multiplier) - 1))


def known_config(adapter: type[PretrainedBackbone], size: str) -> Any:
    """Configuration of a release as far as known here, "1b" or "7b" for a family of several sizes."""
    if adapter.FAMILY == "janus":
        text = {"model_type": "llama", "vocab_size": 102400, **_JANUS_TEXT[size]}
        width = {"projection_dim": text["hidden_size"]}
        vq = {**width, "image_token_embed_dim": text["hidden_size"]}
        return adapter.MODEL.config_class(text_config=text, vision_config=width, vq_config=vq)
    return adapter.MODEL.config_class(vocabulary_map={"<image>": 0})


def num_codes(config: Any) -> int:
    """Size of the codebook of a configuration of transformers."""
    vq = config.vq_config
    return int(getattr(vq, "codebook_size", None) or vq.num_embeddings)


def downsample(folder: Path, config: Any) -> int:
    """Pixels a code covers; the image tokenizer of a saved Chameleon lies beside its trunk."""
    own = folder / TOKENIZER
    if has_image_tokenizer(own):
        return _saved_codes(own).pixels
    return 2 ** (len(config.vq_config.channel_multiplier) - 1)


def _saved_codes(folder: Path) -> Codes:
    if (folder / PATCH_SETTINGS).is_file():
        fields = read_json(folder / PATCH_SETTINGS)
        return Codes(int(fields["num_codes"]), int(fields["side"]))
    fields = read_json(folder / "config.json")
    patch = round((fields["in_channels"] / 3) ** 0.5)
    return Codes(int(fields["num_vq_embeddings"]), int(patch * 2 ** (len(fields["block_out_channels"]) - 1)))
