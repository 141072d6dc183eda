"""DINOv2 and CLIP's image tower by transformers: features for the distances of newer papers.

FD-DINOv2 (Stein et al. 2023, arXiv 2306.04675) is the Frechet distance of the CLS features of DINOv2
ViT-L/14. CMMD (Jayasumana et al. 2024, arXiv 2401.09603) is a kernel distance of the unit image embeddings of
CLIP ViT-L/14 at 336 px. Nothing is fetched here: weights are a folder in the layout of transformers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionModelWithProjection, Dinov2Model
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)
from transformers.utils.logging import disable_progress_bar

from sjd2_lightning.metrics.features import ResizedFeatures


class VisionTransformer(ResizedFeatures):
    """A vision transformer of a folder of transformers, frozen.

    Args:
        folder: folder with `config.json` and weights in safetensors.
        source: what the weights are called in reports, such as `OWNER/NAME@REVISION`.
        device: device that the network runs on.

    Raises:
        ValueError: a file is missing, is of another model or cannot be read.
    """

    MODEL: ClassVar[Any]
    KINDS: ClassVar[tuple[str, ...]]  # `model_type` of its `config.json`
    MEAN: ClassVar[list[float]]
    STD: ClassVar[list[float]]
    PUBLISHED: ClassVar[tuple[int, int, int]]  # layers, width and patch in pixels behind published figures
    LICENCE: ClassVar[str]

    def __init__(self, folder: str | Path, source: str, device: str | torch.device = "cpu") -> None:
        network = load_network(self.MODEL, folder, self.KINDS)
        config = network.config
        self.dim, self.side = self._sizes(config)
        super().__init__(device)
        size = (config.num_hidden_layers, config.hidden_size, config.patch_size)
        said = "the published size" if size == self.PUBLISHED else "NOT the size of published figures"
        self.preprocessing = (
            f"{source}, licence of the release {self.LICENCE}, {size[0]} layers {size[1]} wide, patches of "
            f"{size[2]} px: {said}; {self._resize_rule()}"
        )
        self.network: Any = network.to(self.device)
        self.mean, self.std = (
            nn.Buffer(torch.tensor(values).view(3, 1, 1).to(self.device), persistent=False)
            for values in (self.MEAN, self.STD)
        )

    def _sizes(self, config: Any) -> tuple[int, int]:
        """Number of features, and side of the network's images in pixels."""
        raise NotImplementedError

    def _resize_rule(self) -> str:
        return f"clean-fid bicubic {self.side} px"

    def _normalized(self, batch: Tensor) -> Tensor:
        return (batch / 255 - self.mean) / self.std


class DINOv2(VisionTransformer):
    """CLS features of DINOv2, normalised by its last layer.

    As in the published evaluation the whole picture is resized to 224 x 224 pixels, by clean-fid's resizer;
    the release's own image processor would cut an eighth off at its edges.
    """

    name = "DINOv2"
    MODEL = Dinov2Model
    KINDS = ("dinov2",)
    MEAN, STD = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    PUBLISHED = (24, 1024, 14)
    LICENCE = "Apache-2.0"

    def _sizes(self, config: Any) -> tuple[int, int]:
        return config.hidden_size, 224

    def _features(self, batch: Tensor) -> Tensor:
        return self.network(pixel_values=self._normalized(batch)).pooler_output


class _ImageTower(CLIPVisionModelWithProjection):
    """The image half of a release, whose text half is left where it is."""

    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = ["text_model", "text_projection", "logit_scale"]


class CLIPVision(VisionTransformer):
    """Unit image embeddings of CLIP, of the square in the middle of a picture."""

    name = "CLIPVision"
    MODEL = _ImageTower
    KINDS = ("clip", "clip_vision_model")
    MEAN, STD = OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
    PUBLISHED = (24, 1024, 14)
    LICENCE = "MIT"

    def _sizes(self, config: Any) -> tuple[int, int]:
        return config.projection_dim, config.image_size

    def _resize_rule(self) -> str:
        return f"middle square, {super()._resize_rule()}"

    def _cut(self, image: np.ndarray) -> np.ndarray:
        height, width = image.shape[:2]
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        return image[top : top + side, left : left + side]

    def _features(self, batch: Tensor) -> Tensor:
        return F.normalize(self.network(pixel_values=self._normalized(batch)).image_embeds, dim=-1)


def check_network(folder: str | Path, kinds: tuple[str, ...]) -> None:
    """Refuses a folder that holds no such model; nothing is loaded.

    Args:
        folder: folder with `config.json` and weights.
        kinds: what `model_type` may be.

    Raises:
        ValueError: the message names what is missing or wrong.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"no config.json in {folder}; give a folder that `hf download` has written")
    try:
        kind = json.loads((folder / "config.json").read_text())["model_type"]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ValueError(f"{folder / 'config.json'} is no configuration of transformers: {error}") from error
    if kind not in kinds:
        raise ValueError(f"{folder} is a model of type {kind}, where {' or '.join(kinds)} is needed")
    if not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"no weights (*.safetensors) in {folder}; where a release has pickles alone, load it once by "
            "transformers and write it by save_pretrained"
        )


def load_network(model_class: Any, folder: str | Path, kinds: tuple[str, ...]) -> Any:
    """A frozen model of transformers, every weight of which stands in the folder.

    Args:
        model_class: class of the model.
        folder: folder with `config.json` and weights.
        kinds: what `model_type` may be.

    Raises:
        ValueError: the folder does not hold it, or weights are missing, damaged or of other sizes.
    """
    check_network(folder, kinds)
    disable_progress_bar()  # the stage speaks where it takes long
    try:
        network, told = model_class.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
    except Exception as error:  # transformers and safetensors raise many kinds
        raise ValueError(f"{folder} cannot be loaded: {error}") from error
    if missing := sorted(told["missing_keys"]):
        first = missing[0]
        raise ValueError(f"{folder} lacks {len(missing)} weights, the first is {first}; download it again")
    return network.eval().requires_grad_(False)
