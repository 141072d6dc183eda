"""GLM-Image: adapter of transformers' GlmImage, its autoregressive stage; pixels are a stage of their own.

The model draws a small draft of an image and then the image, as two grids of codes in one sequence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GlmImageForConditionalGeneration, PreTrainedTokenizerFast

from sjd2_lightning.models.backbone import ImageLayout
from sjd2_lightning.models.image_codes import check_image_ids, weights_identity
from sjd2_lightning.models.pretrained import PromptTokens, VocabularyBackbone
from sjd2_lightning.models.weights import LoadOptions, load_parts

_HALVED = 2  # the model looks at pictures of half their size
_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of its pixels, CLIP's
_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class GlmImageTokens(PromptTokens):
    """Control tokens and template of GLM-Image.

    Layout: prompt, the size of the image and of its draft in codes, start; then the codes of the draft and
    those of the image, each in raster order.

    Attributes:
        start: token id in front of the first code.
        size: text of a grid's size in codes.
        draft_side: codes on each side of a square image's draft; others have as many in another shape.
        unconditional: "empty" is the sequence without a prompt (ours: the release uses no guidance).
    """

    CONTEXTS: ClassVar[tuple[str, ...]] = ("empty",)

    start: int = 16384
    size: str = "<sop>{height} {width}<eop>"
    draft_side: int = 16
    unconditional: str = "empty"


def draft_of(height: int, width: int, side: int = GlmImageTokens.draft_side) -> tuple[int, int]:
    """(height, width) in codes of the draft of an image of (height, width) codes."""
    ratio = height / width
    return int(math.sqrt(ratio) * side), int(math.sqrt(1 / ratio) * side)


class GlmImageTokenizer:
    """Codes of a picture by the model's own encoder; there is no decoder beside it.

    A picture's codes lie in one row, those of its draft first. What `decode` gives are the codes as colours,
    alike where their entries of the codebook are: see `glm_pixels` for the picture itself.

    Args:
        model: the model, whose encoder and codebook are used in the type of their numbers.
        draft_side: see `GlmImageTokens`.
    """

    def __init__(self, model: Any, draft_side: int) -> None:
        self.model, self.draft_side = model, draft_side
        self.num_codes = int(model.config.vq_config.num_embeddings)
        self.patch = int(model.config.vision_config.patch_size)
        self.downsample = _HALVED * self.patch

    @property
    def identity(self) -> str:
        """Hash of encoder and codebook: shards say with it which tokenizer made them."""
        parts = nn.ModuleList([self.model.visual, self.model.vqmodel])
        return weights_identity(parts, f"draft of {self.draft_side}".encode())

    def codes_shape(self, height: int, width: int) -> tuple[int, int]:
        """(1, n) of the codes of a picture of (height, width) codes and of its draft."""
        return 1, math.prod(draft_of(height, width, self.draft_side)) + height * width

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Image ids (B, 1, n) int64 of images (B, 3, h, w) in [0, 1]: of their drafts, then of themselves.

        A draft is the picture made as small as it (ours: the release does not say what its training showed).

        Raises:
            ValueError: if the size is no multiple of `downsample`.
        """
        height, width = images.shape[-2:]
        if height % self.downsample or width % self.downsample:
            raise ValueError(f"images of {width}x{height} pixels: must be multiples of {self.downsample}")
        grid = (height // self.downsample, width // self.downsample)
        return torch.cat(
            [self._codes(images, each) for each in (draft_of(*grid, self.draft_side), grid)], dim=1
        )[:, None]

    def _codes(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, h * w) codes of pictures seen as a grid of (h, w)."""
        height, width = grid
        size = (height * self.patch, width * self.patch)
        # by steps of 1 / 256, as transformers' processor resizes pictures of bytes
        seen = (
            F.interpolate(images, size, mode="bicubic", antialias=True).mul(255).round().clamp(0, 255) / 255
        )
        mean, std = (torch.tensor(each).view(3, 1, 1).to(images) for each in (_MEAN, _STD))
        # (B, 3 * p * p, h * w) patches, in raster order
        patches = F.unfold((seen - mean) / std, self.patch, stride=self.patch)
        grids = torch.tensor([[1, height, width]] * len(images), device=images.device)
        pixels = patches.transpose(1, 2).flatten(0, 1).to(self.model.visual.dtype)
        hidden = self.model.visual(pixels, grid_thw=grids).last_hidden_state
        hidden = hidden.view(len(images), height, width, -1).permute(0, 3, 1, 2)
        return self.model.vqmodel.encode(hidden).image_tokens.view(len(images), -1).long()

    @torch.no_grad()
    def decode(self, image_ids: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Images (B, 3, h, w) in [0, 1] of image ids (B, 1, n): colours of the codes.

        Args:
            image_ids: codes of draft and image.
            grid: (height, width) of the image in codes; None = it is a square.

        Raises:
            ValueError: outside the codebook, or if the codes have another number than the grid's.
        """
        check_image_ids(image_ids, self.num_codes)
        num = image_ids.shape[-1]
        height, width = grid or [max(1, math.isqrt(num - self.draft_side**2))] * 2
        drafted = math.prod(draft_of(height, width, self.draft_side))
        if num != drafted + height * width:
            raise ValueError(f"{num} codes are no draft and image of {height}x{width}: give the grid")
        picture = self._colours(image_ids.device)[image_ids.view(-1, num)[:, drafted:]]
        picture = picture.view(-1, height, width, 3).permute(0, 3, 1, 2)
        return picture.repeat_interleave(self.downsample, 2).repeat_interleave(self.downsample, 3)

    def _colours(self, device: torch.device) -> Tensor:
        """(K, 3) a colour for every code: three fixed directions of the codebook."""
        entries = F.normalize(self.model.vqmodel.quantize.embedding.weight.float(), dim=-1)
        rng = torch.Generator().manual_seed(0)
        found = entries @ torch.randn(entries.shape[1], 3, generator=rng).to(entries.device)
        return ((found - found.mean(0)) / found.std(0, correction=0).clamp_min(1e-6)).sigmoid().to(device)


class GlmImageBackbone(VocabularyBackbone):
    """`GlmImageForConditionalGeneration` behind the Backbone protocol.

    Codes are the first entries of the text's table, and have a head of their own.
    """

    FAMILY = "glm_image"
    MODEL = GlmImageForConditionalGeneration
    TRUNK_PATH = "model.language_model"
    UNTRAINED = ("model.visual", "model.vqmodel")
    PLACES = ("vision_language_encoder", "processor")
    GRIDS = 2
    NEWLINE = False

    def __init__(
        self,
        model: GlmImageForConditionalGeneration,
        text_tokenizer: PreTrainedTokenizerFast,
        tokens: GlmImageTokens,
    ) -> None:
        images = GlmImageTokenizer(model.model, tokens.draft_side)
        super().__init__(
            model, text_tokenizer, images, tokens, {code: code for code in range(images.num_codes)}
        )
        self.tokens = tokens
        self.image_tokenizer: GlmImageTokenizer = images

    @classmethod
    def release_config(cls, name: str) -> Any:
        return cls.MODEL.config_class()

    @classmethod
    def codes_of_config(cls, config: Any) -> tuple[int, int]:
        return int(config.vq_config.num_embeddings), _HALVED * int(config.vision_config.patch_size)

    @classmethod
    def num_slots(cls, height: int, width: int) -> int:
        return math.prod(draft_of(height, width)) + height * width

    def layout(self, height: int, width: int) -> ImageLayout:
        step = self.image_tokenizer.downsample
        if min(height, width) < step or height % step or width % step:
            raise ValueError(f"image size {width}x{height} must be a positive multiple of {step} pixels")
        grid = (height // step, width // step)
        draft = draft_of(*grid, self.tokens.draft_side)
        if min(draft) < 1:
            raise ValueError(f"image size {width}x{height}: too long and narrow for a draft of the model")
        first, second, third, base = [], [], [], 0
        for rows, columns in (draft, grid):  # a grid starts behind the longer side of the one before
            first += [base] * (rows * columns)
            second += [base + row for row in range(rows) for _ in range(columns)]
            third += [base + column for _ in range(rows) for column in range(columns)]
            base += max(rows, columns)
        num = len(first)
        axes = (tuple(first), tuple(second), tuple(third))
        return ImageLayout(1, num, (-1,) * num, (height, width), axes, (draft, grid))

    def prompt_ids(self, prompt: str, layout: ImageLayout) -> list[int]:
        if not prompt.strip():
            raise ValueError("empty prompt: give at least one word")
        return self._sequence(prompt, layout)

    def unconditional_ids(self, layout: ImageLayout, prompt_ids: Sequence[int] = ()) -> list[int]:
        return self._sequence("", layout)

    def _sequence(self, prompt: str, layout: ImageLayout) -> list[int]:
        draft, grid = layout.grids
        sizes = "".join(
            self.tokens.size.format(height=rows, width=columns) for rows, columns in (grid, draft)
        )
        return [*self.text_ids(["", sizes], prompt), self.tokens.start]

    def decode_images(self, image_ids: Tensor, layout: ImageLayout | None = None) -> Tensor:
        return self.image_tokenizer.decode(image_ids, layout.grid if layout else None)


def load_glm_image(
    folder: str | Path, trunk: str = "trunk", options: LoadOptions | None = None
) -> GlmImageBackbone:
    """Loads a folder of the release (`zai-org/GLM-Image`), or one that this backbone saved.

    Args:
        folder: a local folder.
        trunk: for a saved one its sub-folder with the weights, or any other path to them.
        options: how weights are read.

    Raises:
        ValueError: if a part is missing or of another family; the message names it.
    """
    options = options or LoadOptions()
    model, text, fields = load_parts(
        GlmImageForConditionalGeneration,
        Path(folder),
        trunk,
        "glm_image",
        options,
        (),
        GlmImageBackbone.PLACES,
    )
    return GlmImageBackbone(model, text, options.tokens(GlmImageTokens(), fields, folder))
