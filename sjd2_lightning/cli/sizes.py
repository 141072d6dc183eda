"""Sizes of a model from its configuration files alone, or as its release is known here, and what it lacks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sjd2_lightning.config.groups import shipped
from sjd2_lightning.config.model_group import ModelConfig
from sjd2_lightning.models.image_codes import PATCH_SETTINGS, has_image_tokenizer
from sjd2_lightning.models.patch_tokenizer import WEIGHTS as PATCHES
from sjd2_lightning.models.pretrained import PretrainedBackbone
from sjd2_lightning.models.registry import family_of
from sjd2_lightning.models.weights import BACKBONE_FILE, TEXT, TOKENIZER, TRUNK, missing_weights, read_json


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
        plain = Path(folder) / adapter.PLACES[0]
        own, trunk = (Path(folder) / TOKENIZER, Path(folder) / model.trunk) if saved else (None, plain)
    try:
        if own is not None and has_image_tokenizer(own):
            return _saved_codes(own)
        if trunk is None:
            config = adapter.release_config("")
        else:
            config = adapter.MODEL.config_class.from_pretrained(trunk, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError):
        return None  # whatever is wrong there, loading says it
    return Codes(*adapter.codes_of_config(config))


def downsample(adapter: type[PretrainedBackbone], folder: Path, config: Any) -> int:
    """Pixels a code covers; the image tokenizer of a saved Chameleon lies beside its trunk."""
    own = folder / TOKENIZER
    if has_image_tokenizer(own):
        return _saved_codes(own).pixels
    return adapter.codes_of_config(config)[1]


def _saved_codes(folder: Path) -> Codes:
    if (folder / PATCH_SETTINGS).is_file():
        fields = read_json(folder / PATCH_SETTINGS)
        return Codes(int(fields["num_codes"]), int(fields["side"]))
    fields = read_json(folder / "config.json")
    patch = round((fields["in_channels"] / 3) ** 0.5)
    return Codes(int(fields["num_vq_embeddings"]), int(patch * 2 ** (len(fields["block_out_channels"]) - 1)))


def missing_files(folder: Path, weights: Path, saved: bool, adapter: type[PretrainedBackbone]) -> list[str]:
    """Paths of the files that a backbone folder lacks."""
    found = [weights / name for name in missing_weights(weights)]
    wanted = [folder / (TEXT if saved else adapter.PLACES[1]) / "tokenizer.json"]
    wanted += [folder / BACKBONE_FILE] if saved else [folder / name for name in adapter.FILES]
    if weights.name == TRUNK:
        is_patches = (folder / TOKENIZER / PATCH_SETTINGS).is_file()
        wanted.append(folder / TOKENIZER / (PATCHES if is_patches else "diffusion_pytorch_model.safetensors"))
    return [str(path) for path in [*found, *(path for path in wanted if not path.is_file())]]
