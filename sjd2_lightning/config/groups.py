"""The typed groups of the configuration: what every key of `conf/` may be.

Values live in `conf/`; there are no defaults here. Source: ours.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, Field

from sjd2_lightning.config.base import Count, Group, Natural, Positive, Share, several
from sjd2_lightning.config.base import shipped as shipped
from sjd2_lightning.data.places import place
from sjd2_lightning.decoding.config import DecodingConfig
from sjd2_lightning.models.lora import LoraSettings
from sjd2_lightning.models.weights import WeightsSource


def _no_decoding_problems(config: DecodingConfig) -> DecodingConfig:
    if found := config.problems():
        raise several([problem.removeprefix("decoding.") for problem in found])
    return config


Decoding = Annotated[DecodingConfig, AfterValidator(_no_decoding_problems)]


class DataConfig(Group):
    """Captioned images: shards of image codes for training, prompts and reference images for measuring."""

    data_dir: str
    kind: Literal["codes", "raw"]
    prepare: bool
    source: Literal["emoji", "scenes"]
    num_scenes: Count
    views: Count
    max_images: Count | None
    batch_size: Count
    val_batch_size: Count
    num_workers: Natural
    shuffle_buffer: Natural
    drop_last: bool
    num_train_samples: Count | None
    max_bad_samples: Natural
    verify_shards: bool
    prompt_dropout: Share
    prompt_file: str | None
    reference_dir: str | None

    def problems(self) -> list[str]:
        """Named files that are not there, an address that is not read or cannot be built in."""
        found = []
        try:
            where = place(self.data_dir)
            if self.prepare and not isinstance(where, Path):
                found.append(f"prepare=True: shards are built in local folders, not in {self.data_dir}")
        except ValueError as error:
            found.append(f"data_dir={error}")
        if self.prompt_file and not Path(self.prompt_file).is_file():
            found.append(
                f"prompt_file={self.prompt_file}: there is no such file; give a .txt or .json of prompts"
            )
        if self.reference_dir and not Path(self.reference_dir).is_dir():
            found.append(
                f"reference_dir={self.reference_dir}: there is no such folder; give a folder of images"
            )
        return found


class OptimizerSettings(Group):
    """`optimizer.OptimizerConfig`, and which weights are trained."""

    name: Literal["adamw", "muon"]
    lr: Positive
    weight_decay: Annotated[float, Field(ge=0)]
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]]
    warmup_steps: Natural
    final_lr_share: Share
    freeze: tuple[str, ...]


class TrainerConfig(Group):
    """Arguments of `lightning.Trainer`."""

    accelerator: Literal["auto", "cpu", "gpu", "mps"]
    devices: Count | Literal["auto"]
    num_nodes: Count
    strategy: str
    precision: Literal["32-true", "bf16-mixed", "16-mixed", "bf16-true"]
    max_steps: Annotated[int, Field(ge=-1)]
    max_epochs: Annotated[int, Field(ge=-1)] | None
    max_time: Annotated[str, Field(pattern=r"^\d+:\d\d:\d\d:\d\d$")] | None
    val_check_interval: Count | Annotated[float, Field(gt=0, le=1)] | None
    check_val_every_n_epoch: Count | None
    limit_train_batches: Natural | Share
    limit_val_batches: Natural | Share
    num_sanity_val_steps: Annotated[int, Field(ge=-1)]
    gradient_clip_val: Positive | None
    accumulate_grad_batches: Count
    log_every_n_steps: Count
    reload_dataloaders_every_n_epochs: Natural
    fast_dev_run: bool | Count
    deterministic: bool | Literal["warn"]


class WandbConfig(Group):
    """Weights & Biases."""

    mode: Literal["offline", "online", "disabled"]
    project: Annotated[str, Field(min_length=1)]
    entity: str | None
    name: str | None
    group: str | None
    tags: tuple[str, ...]


class LoggerConfig(Group):
    """Where metrics go beside the console."""

    csv: bool
    wandb: WandbConfig | None


class ProtocolConfig(Group):
    """`protocols.CocoProtocol`."""

    name: Annotated[str, Field(min_length=1)]
    annotations: str
    images: str
    num_images: Count

    def problems(self) -> list[str]:
        """COCO is not where it should be."""
        remedy = (
            "unpack COCO's archives of images and annotations beside each other and give the places with "
            "metrics.protocol.annotations and metrics.protocol.images"
        )
        found = []
        if not Path(self.annotations).is_file():
            found.append(f"annotations={self.annotations}: there is no such file; {remedy}")
        if not Path(self.images).is_dir():
            found.append(f"images={self.images}: there is no such folder; {remedy}")
        return found


class MetricsConfig(Group):
    """What images are measured with."""

    features: tuple[Literal["EffNetLite0", "InceptionCleanFID"], ...]
    inception_dir: str | None
    allow_download: bool
    clip: str | None
    clip_pretrained: str | None
    num_resamples: Count
    num_distance_resamples: Natural
    nearest_k: Count | None
    protocol: ProtocolConfig | None
    cache_dir: str | None

    def problems(self) -> list[str]:
        """A CLIP folder that is not there."""
        is_folder = self.clip is not None and "/" in self.clip and not self.clip.startswith("hf-hub:")
        if is_folder and not shipped(str(self.clip)).is_dir():
            return [
                f"clip={self.clip}: there is no such folder; train it with "
                "`python train.py experiment=tiny_clip`, or set clip to null"
            ]
        return []


class CheckpointConfig(Group):
    """Lightning's ModelCheckpoint in `<run_dir>/checkpoints`, and `last.ckpt` beside it."""

    every_n_train_steps: Count | None
    monitor: str | None
    mode: Literal["min", "max"]
    save_top_k: Annotated[int, Field(ge=-1)]


class SamplingConfig(Group):
    """Decoding of fixed prompts during validation."""

    num_prompts: Count
    batch_size: Count
    every_n_validations: Count


class CallbacksConfig(Group):
    """What happens beside training steps."""

    sampling: SamplingConfig | None
    checkpoint: CheckpointConfig | None
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None
    nonfinite: Literal["stop", "skip"] | None
    loss_spike: Annotated[float, Field(gt=1)] | None
    lr_monitor: bool
    progress_bar: Literal["rich", "tqdm"] | None
    extra: list[dict[str, Any]]


class AutoWindowConfig(Group):
    """How a window of `auto` is chosen; see `window_choice`. `methods` names those that have one."""

    windows: Annotated[tuple[Count, ...], Field(min_length=1)]
    repeats: Count
    methods: tuple[str, ...]


class ReportConfig(Group):
    """What the report of evaluate.py shows; see `report.observations` and `report.page`."""

    num_images: Count
    page_megabytes: Positive
    num_trajectories: Natural
    num_frames: Annotated[int, Field(ge=2)]
    cost_windows: tuple[Count, ...]
    publish: Literal["none", "wandb"]


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


class TokenizerRecipe(Group):
    """`recipes.tokenizer.TokenizerModule`."""

    num_codes: Count
    code_dim: Count
    channels: tuple[Count, ...]
    patch: Count
    warmup_steps: Natural
    revive_every: Count
    isolate_patches: bool


class ClipRecipe(Group):
    """`recipes.clip.ClipModule`."""

    text_dir: str
    name: str
    patch_size: Count
    vision_width: Count
    vision_layers: Count
    text_width: Count
    text_layers: Count
    head_width: Count
    embed_dim: Count
    context_length: Count
    patch_dropout: Share
    text_dropout: Share
    warmup_share: Share
