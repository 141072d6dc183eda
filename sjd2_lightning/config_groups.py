"""The typed groups of the configuration: what every key of `conf/` may be.

Values live in `conf/`; there are no defaults here. Source: ours.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from sjd2_lightning.config_base import Count, Group, Natural, Positive, Share, several
from sjd2_lightning.config_base import shipped as shipped
from sjd2_lightning.config_model import ModelConfig as ModelConfig
from sjd2_lightning.config_recipes import ClipRecipe as ClipRecipe
from sjd2_lightning.config_recipes import TokenizerRecipe as TokenizerRecipe
from sjd2_lightning.data.places import place
from sjd2_lightning.decoding.methods import DecodingConfig
from sjd2_lightning.noise import NoiseConfig, RampLaw


def _no_decoding_problems(config: DecodingConfig) -> DecodingConfig:
    if found := config.problems():
        raise several([problem.removeprefix("decoding.") for problem in found])
    return config


def _is_checkpoint(path: str) -> str:
    if not Path(path).is_file():
        raise several([f"={path}: there is no such checkpoint; give the path of a .ckpt file"])
    return path


def _is_start(path: str) -> str:
    # a sharded checkpoint is a folder
    is_there = path in ("auto", "last") or (Path(path) / "meta.pt").is_file()
    return path if is_there else _is_checkpoint(path)


def _is_export(path: str) -> str:
    if path not in ("auto", "model") and not (Path(path) / "backbone.json").is_file():
        raise several(
            [
                f"={path}: there is no backbone.json; run train.py with the same experiment first, or use "
                "weights=model for the weights without fine-tuning"
            ]
        )
    return path


Decoding = Annotated[DecodingConfig, AfterValidator(_no_decoding_problems)]
Checkpoint = Annotated[str, AfterValidator(_is_checkpoint)]
Start = Annotated[str, AfterValidator(_is_start)]
Export = Annotated[str, AfterValidator(_is_export)]


class DataConfig(Group):
    """Captioned images: shards of image codes for training, prompts and reference images for measuring."""

    data_dir: str
    kind: Literal["codes", "raw"]
    prepare: bool
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


class NoiseSettings(Group):
    """Noise of training, and the grid of t that decoding shares."""

    enabled: bool
    num_levels: tuple[Count, Count]
    val_levels: Count
    schedule: Literal["linear", "karras"]
    t_min: Annotated[float, Field(gt=0, lt=1)]
    rho: Positive
    ramp: RampLaw
    source: Literal["gaussian", "tied", "tied_white", "mean", "above"]
    trajectory: bool
    state: Literal["blended", "draft"]
    estimate: Literal["drawn", "expected"]
    mark_drafts: bool
    random_grid: bool
    consistency: Share

    @property
    def of_training(self) -> NoiseConfig:
        """What the training module is built with."""
        return NoiseConfig(**self.model_dump(exclude={"val_levels", "ramp"}), ramp=self.ramp)

    def problems(self) -> list[str]:
        """Bounds in the wrong order, choices that do not go together."""
        bounds = {"num_levels": (1, self.num_levels)} | {
            f"ramp.{name}": (least, getattr(self.ramp, name))
            for name, least in (("clean_run", 1), ("segment", 1), ("top_run", 0))
        }
        found = [
            f"{name}=[{low}, {high}]: must be [fewest, most] with {least} <= fewest <= most"
            for name, (least, (low, high)) in bounds.items()
            if not least <= low <= high
        ]
        if not 0 <= self.ramp.clean_share <= 1:
            found.append(f"ramp.clean_share={self.ramp.clean_share}: must lie in [0, 1]")
        return found + [line.removeprefix("noise.") for line in self.of_training.problems()]


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


class SharedConfig(Group):
    """What train.py and evaluate.py have in common."""

    seed: Natural
    run_dir: str
    data: DataConfig
    model: ModelConfig
    noise: NoiseSettings
    metrics: MetricsConfig
    logger: LoggerConfig
    auto_window: AutoWindowConfig
    compare: Annotated[tuple[str, ...], Field(min_length=1)]
    methods: dict[str, Decoding]

    def problems(self) -> list[str]:
        """Two sources of prompts."""
        if self.metrics.protocol and (self.data.prompt_file or self.data.reference_dir):
            return [
                f"metrics.protocol: {self.metrics.protocol.name} brings prompts and real images; leave out "
                "data.prompt_file and data.reference_dir"
            ]
        return []


class TrainConfig(SharedConfig):
    """The whole configuration of train.py."""

    ckpt_path: Start | None
    task: Literal["finetune", "tokenizer", "clip"]
    export_dir: str
    export_dtype: Literal["float32", "bfloat16", "float16"] | None
    validate_first: bool
    print_plan: bool
    tokenizer: TokenizerRecipe | None
    clip: ClipRecipe | None
    optimizer: OptimizerSettings
    trainer: TrainerConfig
    callbacks: CallbacksConfig

    def problems(self) -> list[str]:
        """A recipe without its sizes, a checkpoint that is not there."""
        found = super().problems()
        if self.task in ("tokenizer", "clip") and getattr(self, self.task) is None:
            found.append(
                f"task={self.task}: needs the group of keys `{self.task}`; use experiment=tiny_{self.task}"
            )
        if self.model.peft and self.callbacks.ema_decay:
            found.append("callbacks.ema_decay: averages all weights; with model.peft set it to null")
        if self.trainer.strategy == "fsdp":
            if self.callbacks.ema_decay:
                found.append(
                    "callbacks.ema_decay: needs whole weights; with trainer.strategy=fsdp set it to null"
                )
            if self.optimizer.name == "muon":
                found.append(
                    "optimizer.name=muon: needs whole matrices; with trainer.strategy=fsdp use adamw"
                )
            if self.noise.trajectory:
                found.append(
                    "noise.trajectory: ranks take different numbers of passes; with trainer.strategy=fsdp "
                    "set it to false"
                )
        return found


class EvaluateConfig(SharedConfig):
    """The whole configuration of evaluate.py."""

    ckpt_path: Checkpoint | None
    weights: Export
    num_prompts: Count | None
    samples_per_prompt: Count
    benchmark: Literal["geneval", "dpg"] | None
    benchmark_prompts: str | None
    batch_size: Count
    device: Literal["auto", "cpu", "cuda", "mps"]
    warm_up: bool
    replace_images: bool
    report: ReportConfig

    def problems(self) -> list[str]:
        """A benchmark without its prompts or samples, a W&B Report without a run, too few images."""
        found = super().problems()
        if self.report.publish == "wandb" and self.logger.wandb is None:
            found.append(
                "report.publish=wandb: a W&B Report shows a W&B run; use logger=wandb, or publish=none"
            )
        if self.benchmark is not None:
            if self.benchmark_prompts is None or not Path(self.benchmark_prompts).exists():
                what = {"geneval": "its evaluation_metadata.jsonl", "dpg": "its folder of .txt prompts"}
                found.append(
                    f"benchmark_prompts={self.benchmark_prompts}: there is nothing; "
                    f"give {what[self.benchmark]}"
                )
            if self.samples_per_prompt != 4:
                found.append(
                    f"samples_per_prompt={self.samples_per_prompt}: {self.benchmark} judges four images of "
                    "each prompt; set it to 4"
                )
            if self.metrics.protocol or self.data.prompt_file:
                found.append(
                    f"benchmark={self.benchmark}: brings its own prompts; leave out metrics.protocol and "
                    "data.prompt_file"
                )
        if self.metrics.features and self.num_prompts == self.samples_per_prompt == 1:
            found.append("num_prompts=1: distances need at least 2 images; ask for more, or use metrics=none")
        return found
