"""The group `model` of the configuration: which backbone, where its weights are, what of it trains.

Values live in `conf/`; there are no defaults here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import AfterValidator, BeforeValidator, Field

from sjd2_lightning.config.groups import Group, Side, did_you_mean, shipped, sound
from sjd2_lightning.decoding.law import Sampling
from sjd2_lightning.models.hub import HubName, WeightsSource, located
from sjd2_lightning.models.image_codes import has_image_tokenizer
from sjd2_lightning.models.lora import LoraSettings
from sjd2_lightning.models.recompute import Checkpointing
from sjd2_lightning.models.registry import FAMILIES
from sjd2_lightning.models.weights import TRUNK


class ScratchConfig(Group):
    """Sizes of a tiny trunk with random weights."""

    image_tokenizer: str
    text_vocab_size: Annotated[int, Field(ge=1, le=2**20)]
    hidden_size: Annotated[int, Field(ge=1, le=2**16)]
    intermediate_size: Annotated[int, Field(ge=1, le=2**18)]
    num_layers: Annotated[int, Field(ge=1, le=1000)]
    num_heads: Annotated[int, Field(ge=1, le=2**16)]
    num_positions: Annotated[int, Field(ge=1, le=2**20)]
    start: str | None

    def problems(self) -> list[str]:
        """Heads that do not divide the width, a missing image tokenizer, no model to start with."""
        found = []
        if self.hidden_size % self.num_heads:
            found.append(f"hidden_size={self.hidden_size}: must be a multiple of num_heads={self.num_heads}")
        if not has_image_tokenizer(shipped(self.image_tokenizer)):
            found.append(
                f"image_tokenizer={self.image_tokenizer}: there is no image tokenizer; train it with "
                "`sjd2 train experiment=tiny_tokenizer`"
            )
        if self.start is not None and not (shipped(self.start) / "backbone.json").is_file():
            found.append(f"start={self.start}: has no backbone.json; give a folder that training exported")
        return found


class ModelSampling(Group):
    """What a model draws best with: the defaults of `decoding.sampling`; see `decoding.law.Sampling`."""

    temperature: float
    top_k: int
    top_p: float
    guidance_scale: float

    def problems(self) -> list[str]:
        """Those of the same values in `decoding.sampling`."""
        return Sampling(**self.model_dump()).problems()


def _checkpointing(value: object) -> object:
    """What 0.1.0 called true and false."""
    return {True: "full", False: "none"}[value] if isinstance(value, bool) else value


class ModelConfig(Group):
    """The backbone: its family, where its weights are, what of it trains, and the size of the images."""

    family: str
    init: Literal["pretrained", "random_tiny", "none"]
    path: str
    hub_id: str | None
    revision: str | None
    local_files_only: bool
    get: str | None
    trunk: str
    dtype: Literal["float32", "bfloat16", "float16"]
    quantize: Literal["int8", "fp8"] | None
    load_onto: str | None
    unconditional: str | None
    condition: Literal["text", "class"] | None
    pixels: str | None
    image_size: tuple[Side, Side]
    peft: Literal["lora"] | None
    lora: Annotated[LoraSettings, AfterValidator(sound)]
    sampling: ModelSampling
    adapter: str | None
    activation_checkpointing: Annotated[Checkpointing, BeforeValidator(_checkpointing)]
    scratch: ScratchConfig | None

    @property
    def folder(self) -> Path:
        """The folder of `path`; one that is a name on the hub is downloaded, or raises ValueError."""
        return located(shipped(self.path), "model.path")

    @property
    def source(self) -> WeightsSource:
        """Where the weights are."""
        if HubName.of(shipped(self.path)) is not None:
            return WeightsSource(self.folder)
        return WeightsSource(shipped(self.path), self.hub_id, self.revision, self.local_files_only, self.get)

    @property
    def random_name(self) -> str:
        """What a model that no training made is called wherever its figures stand; "" for all others."""
        if self.scratch is not None:
            return "scratch (random weights)"
        return f"random_tiny (a shrunken {self.family}, random weights)" if self.init == "random_tiny" else ""

    def problems(self) -> list[str]:
        """Weights that are not there, a device that is none."""
        found = self._weights_problems() if self.init == "pretrained" and self.scratch is None else []
        if self.family not in FAMILIES:
            found.append(f"family={self.family}: no such family; {did_you_mean(self.family, list(FAMILIES))}")
        if self.condition is not None and self.family != "llamagen":
            found.append(f"condition={self.condition}: {self.family} is drawn from texts; set it to null")
        if self.pixels is not None and self.family != "glm_image":
            found.append(
                f"pixels={self.pixels}: {self.family} has an image decoder of its own; set model.pixels=null"
            )
        elif self.pixels is not None and not (shipped(self.pixels) / "model_index.json").is_file():
            found.append(
                f"pixels={self.pixels}: there is no model_index.json; give a copy of zai-org/GLM-Image"
            )
        try:
            torch.device(self.load_onto or "cpu")
        except RuntimeError:
            found.append(
                f"load_onto={self.load_onto}: must be one device, such as cuda:0; a trunk on several "
                "devices cannot keep its cache beside its layers"
            )
        return [*found, *self._adapter_problems()]

    def _adapter_problems(self) -> list[str]:
        try:
            folder = located(self.adapter or ".", "adapter")
        except ValueError as error:
            return [str(error)]
        if self.adapter is None or (folder / "adapter_config.json").is_file():
            return []
        return [f"adapter={self.adapter}: there is no adapter_config.json; give an exported adapter"]

    def _weights_problems(self) -> list[str]:
        folder = shipped(self.path)
        if not folder.is_dir() and self.hub_id is not None and self.get is None and not self.local_files_only:
            return []  # to be downloaded
        try:
            folder = self.source.folder()
        except ValueError as error:
            return [f"path={self.path}: {str(error).removeprefix(f'model.path={self.path}: ')}"]
        if any((folder / name).is_file() for name in ("backbone.json", "config.json", "model_index.json")):
            if self.trunk == TRUNK or (folder / self.trunk).is_dir() or Path(self.trunk).is_dir():
                return []
            return [f"trunk={self.trunk}: there is no such folder, in {folder} or elsewhere"]
        return [f"path={self.path}: there is no backbone.json; {self.source.remedy()}"]
