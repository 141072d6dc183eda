"""The typed group of the backbone: where its weights are, and what of it trains.

Values live in `conf/model`; there are no defaults here. Source: ours.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from sjd2_lightning.config_base import Count, Group, shipped
from sjd2_lightning.models.lora import LoraSettings
from sjd2_lightning.models.sources import WeightsSource


class ScratchConfig(Group):
    """Sizes of a tiny trunk with random weights."""

    image_tokenizer: str
    text_vocab_size: Count
    hidden_size: Count
    intermediate_size: Count
    num_layers: Count
    num_heads: Count

    def problems(self) -> list[str]:
        """Heads that do not divide the width, a missing image tokenizer."""
        found = []
        if self.hidden_size % self.num_heads:
            found.append(f"hidden_size={self.hidden_size}: must be a multiple of num_heads={self.num_heads}")
        if not (shipped(self.image_tokenizer) / "config.json").is_file():
            found.append(
                f"image_tokenizer={self.image_tokenizer}: there is no image tokenizer; train it with "
                "`python train.py experiment=tiny_tokenizer`"
            )
        return found


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
    load_onto: str | None
    unconditional: str | None
    image_size: tuple[Count, Count]
    peft: Literal["lora"] | None
    lora: LoraSettings
    adapter: str | None
    activation_checkpointing: bool
    scratch: ScratchConfig | None

    @property
    def source(self) -> WeightsSource:
        """Where the weights are."""
        return WeightsSource(shipped(self.path), self.hub_id, self.revision, self.local_files_only, self.get)

    def problems(self) -> list[str]:
        """Weights that are not there, a device that is none."""
        found = self._weights_problems() if self.init == "pretrained" and self.scratch is None else []
        try:
            torch.device(self.load_onto or "cpu")
        except RuntimeError:
            found.append(
                f"load_onto={self.load_onto}: must be one device, such as cuda:0; a trunk on several "
                "devices cannot keep its cache beside its layers"
            )
        if self.adapter is not None and not (Path(self.adapter) / "adapter_config.json").is_file():
            found.append(f"adapter={self.adapter}: there is no adapter_config.json; give an exported adapter")
        return found

    def _weights_problems(self) -> list[str]:
        folder = shipped(self.path)
        if not folder.is_dir() and self.hub_id is not None and self.get is None and not self.local_files_only:
            return []  # to be downloaded
        try:
            folder = self.source.folder()
        except ValueError as error:
            return [f"path={self.path}: {error}"]
        if any((folder / name).is_file() for name in ("backbone.json", "config.json")):
            return []
        return [f"path={self.path}: there is no backbone.json; {self.source.remedy()}"]
