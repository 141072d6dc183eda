"""What train.py and evaluate.py take: every key of `conf/` with its type. Values live in `conf/`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from sjd2_lightning.config.groups import (
    AutoWindowConfig,
    CallbacksConfig,
    Count,
    DecodingDefaults,
    Group,
    LoggerConfig,
    MetricsConfig,
    ReportConfig,
    did_you_mean,
    several,
    shipped,
    sound,
)
from sjd2_lightning.config.model_group import ModelConfig
from sjd2_lightning.config.trainer_group import TrainerConfig
from sjd2_lightning.data import DataConfig
from sjd2_lightning.decoding.config import BASELINE, DecodingConfig
from sjd2_lightning.evaluation.flow_methods import FlowEvaluation
from sjd2_lightning.evaluation.policy_methods import PolicyEvaluation
from sjd2_lightning.evaluation.thought_methods import ThoughtEvaluation
from sjd2_lightning.training.noise import TrainingNoise
from sjd2_lightning.training.optimizer import OptimizerConfig
from sjd2_lightning.training.recipes import (
    ChunkRecipe,
    ClipRecipe,
    FlowRecipe,
    ThoughtRecipe,
    TokenizerRecipe,
)
from sjd2_lightning.training.redrafting import CorrectorTraining

RANDOM_TAG = "random weights"  # of a run in W&B behind whose weights no release is


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
                f"={path}: there is no backbone.json; run `sjd2 train` with the same experiment first, or "
                "use weights=model for the weights without fine-tuning"
            ]
        )
    return path


def _is_folder(path: str) -> str:
    """A folder that is there, or can be made."""
    for place in (Path(path), *Path(path).parents):
        if any(len(part.encode()) > 255 for part in place.parts):
            raise several([f"={path[:40]}...: a name is too long; no part may have more than 255 bytes"])
        if place.is_dir():
            if not os.access(place, os.W_OK):
                raise several([f"={path}: {place} cannot be written to; choose another place"])
            return path
        if place.exists():
            raise several([f"={path}: {place} is a file; give a folder"])
    return path


def _shared_values(method: DecodingConfig) -> dict[str, Any]:
    """What is the same for all methods that are compared, by key."""
    values = {f"sampling.{name}": value for name, value in vars(method.sampling).items()}
    return values | {"engine": method.engine, "invariant": method.invariant}


Folder = Annotated[str, AfterValidator(_is_folder)]
Checkpoint = Annotated[str, AfterValidator(_is_checkpoint)]
Start = Annotated[str, AfterValidator(_is_start)]
Export = Annotated[str, AfterValidator(_is_export)]


class SharedConfig(Group):
    """What train.py and evaluate.py have in common."""

    seed: Annotated[int, Field(ge=0, le=2**32 - 1)]
    run_dir: Folder
    data: Annotated[DataConfig, AfterValidator(sound)]
    model: ModelConfig
    noise: Annotated[TrainingNoise, AfterValidator(sound)]
    metrics: MetricsConfig
    logger: LoggerConfig
    auto_window: AutoWindowConfig
    decoding: DecodingDefaults
    print_plan: bool
    compare: Annotated[tuple[str, ...], Field(min_length=1)]
    methods: Annotated[dict[str, DecodingConfig], Field(min_length=1)]

    @property
    def wandb_tags(self) -> tuple[str, ...]:
        """Tags of the W&B run: those that were asked for, and that its figures are of random weights."""
        tags = () if self.logger.wandb is None else self.logger.wandb.tags
        return (*tags, RANDOM_TAG) if self.model.init == "random_tiny" else tags

    def problems(self) -> list[str]:
        """Methods that cannot be compared, two sources of prompts."""
        found = self._problems_of_methods()
        if self.metrics.protocol and (self.data.prompt_file or self.data.reference_dir):
            found.append(
                f"metrics.protocol: {self.metrics.protocol.name} brings prompts and real images; leave out "
                "data.prompt_file and data.reference_dir"
            )
        return found

    def _problems_of_methods(self) -> list[str]:
        """Of those that are compared; values of the others need not suit each other."""
        found = [
            f"compare: unknown method {name!r}; {did_you_mean(name, list(self.methods))}"
            for name in self.compare
            if name not in self.methods
        ]
        compared = {name: self.methods[name] for name in self.compare if name in self.methods}
        found += [f"methods.{name}.{line}" for name, method in compared.items() for line in method.problems()]
        others = {name: method for name, method in self.methods.items() if name not in compared}
        found += [
            f"methods.{name}.{line}" for name, method in others.items() for line in method.out_of_bounds()
        ]
        baseline = compared.get(BASELINE)
        its = {} if baseline is None else _shared_values(baseline)
        for name, method in compared.items():
            own = _shared_values(method)
            found += [
                f"methods.{name}.{key}={own[key]}: differs from methods.{BASELINE}.{key}={its[key]}, so "
                f"speed and images cannot be compared; set decoding.{key}"
                for key in its
                if own[key] != its[key]
            ]
        return found


class TrainConfig(SharedConfig):
    """The whole configuration of train.py."""

    ckpt_path: Start | None
    task: Literal["finetune", "tokenizer", "clip", "tarflow", "pccot", "ceed"]
    export_dir: Folder
    export_dtype: Literal["float32", "bfloat16", "float16"] | None
    validate_first: bool
    tokenizer: Annotated[TokenizerRecipe, AfterValidator(sound)] | None
    clip: Annotated[ClipRecipe, AfterValidator(sound)] | None
    tarflow: Annotated[FlowRecipe, AfterValidator(sound)] | None
    pccot: Annotated[ThoughtRecipe, AfterValidator(sound)] | None
    ceed: Annotated[ChunkRecipe, AfterValidator(sound)] | None
    optimizer: Annotated[OptimizerConfig, AfterValidator(sound)]
    corrector: Annotated[CorrectorTraining, AfterValidator(sound)]
    trainer: TrainerConfig
    callbacks: CallbacksConfig

    def problems(self) -> list[str]:
        """A recipe without its sizes, a checkpoint that is not there."""
        found = super().problems()
        recipes = {"tokenizer": "tiny_tokenizer", "clip": "tiny_clip", "ceed": "ceed_teacher"}
        recipes |= {name: name for name in ("tarflow", "pccot")}
        if self.task in recipes and getattr(self, self.task) is None:
            recipe = recipes[self.task]
            found.append(f"task={self.task}: needs the group of keys `{self.task}`; use experiment={recipe}")
        if self.task == "clip" and self.clip is not None:
            text = shipped(self.clip.text_dir)
            if not (text / "tokenizer.json").is_file():
                found.append(f"clip.text_dir={self.clip.text_dir}: there is no tokenizer.json in it")
        found += [] if self.print_plan else self._rounding_problems()
        if self.trainer.fp8 and (self.model.peft is not None or self.model.adapter is not None):
            found.append(
                "trainer.fp8=true: is for training all weights; with an adapter set it to false, and "
                "model.quantize=int8 for less memory"
            )
        if self.model.peft and self.model.lora.noisy_only and not self.noise.enabled:
            found.append(
                "model.lora.noisy_only=true: without noise (noise.enabled=false) it would learn nothing; set "
                "it to false, or use noise=default"
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
            if self.optimizer.name == "adamw8bit":
                found.append(
                    "optimizer.name=adamw8bit: its states are not written into the checkpoints of "
                    "trainer.strategy=fsdp, which spreads states over the ranks by itself; use adamw"
                )
        return found

    def _rounding_problems(self) -> list[str]:
        """Rounded weights that nothing could be trained on."""
        model, found = self.model, list[str]()
        key = f"model.quantize={model.quantize}"
        if model.quantize == "fp8":
            found.append(f"{key}: an adapter is trained on a base in int8; set model.quantize=int8, or null")
        if model.quantize is not None and model.peft is None and model.adapter is None:
            found.append(
                f"{key}: rounded weights cannot be trained; model.peft=lora trains an adapter on top of "
                "them, or set model.quantize=null"
            )
        if model.quantize is not None and self.trainer.strategy == "fsdp":
            found.append(f"{key}: FSDP2 would gather the codes of weights as weights; use trainer=ddp")
        return found


class EvaluateConfig(SharedConfig):
    """The whole configuration of evaluate.py."""

    ckpt_path: Checkpoint | None
    weights: Export
    num_prompts: Count | None
    samples_per_prompt: Annotated[int, Field(ge=1, le=10_000)]
    benchmark: Literal["geneval", "dpg", "geneval2"] | None
    benchmark_prompts: str | None
    batch_size: Count
    device: Literal["auto", "cpu", "cuda", "mps"]
    optimized_metric: str | None
    warm_up: bool
    replace_images: bool
    flow: Annotated[FlowEvaluation, AfterValidator(sound)] | None
    thoughts: Annotated[ThoughtEvaluation, AfterValidator(sound)] | None
    policies: Annotated[PolicyEvaluation, AfterValidator(sound)] | None
    report: ReportConfig

    def problems(self) -> list[str]:
        """A benchmark without its prompts, samples or verdicts, a W&B Report without a run."""
        found = super().problems()
        model = self.model
        adapted = model.peft is not None or model.adapter is not None
        if model.quantize is not None and adapted and not model.lora.noisy_only:
            found.append(
                f"model.quantize={model.quantize}: an adapter is not rounded with its base; set it to null, "
                "or evaluate the folder that training exported, which has the adapter merged"
            )
        if self.report.publish == "wandb" and self.logger.wandb is None:
            found.append(
                "report.publish=wandb: a W&B Report shows a W&B run; use logger=wandb, or publish=none"
            )
        given = [name for name in ("flow", "thoughts", "policies") if getattr(self, name) is not None]
        if len(given) > 1:
            found.append(f"{given[-1]}: an evaluation has one task, and {given[0]} is given too; keep one")
        found += self._judged_problems()
        if self.benchmark is not None:
            judged_images = 1 if self.benchmark == "geneval2" else 4
            if self.benchmark_prompts is None or not Path(self.benchmark_prompts).exists():
                what = {"geneval": "its evaluation_metadata.jsonl", "dpg": "its folder of .txt prompts"}
                what["geneval2"] = "its geneval2_data.jsonl"
                found.append(
                    f"benchmark_prompts={self.benchmark_prompts}: there is nothing; "
                    f"give {what[self.benchmark]}"
                )
            if self.samples_per_prompt != judged_images:
                images = "one image" if judged_images == 1 else "four images"
                found.append(
                    f"samples_per_prompt={self.samples_per_prompt}: {self.benchmark} judges {images} of "
                    f"each prompt; set it to {judged_images}"
                )
            if self.metrics.protocol or self.data.prompt_file:
                found.append(
                    f"benchmark={self.benchmark}: brings its own prompts; leave out metrics.protocol and "
                    "data.prompt_file"
                )
        return found

    def _judged_problems(self) -> list[str]:
        judged = self.report.judged
        if judged is None:
            return []
        kinds = {
            "geneval": "the --outfile of GenEval's evaluate_images.py",
            "dpg": "the --res-path of DPG-Bench's compute_dpg_bench.py",
            "geneval2": "a METHOD.json that GenEval 2's evaluation.py wrote, or a folder of those",
        }
        if self.benchmark is None:
            return [f"report.judged={judged}: belongs to a benchmark; set benchmark to {', '.join(kinds)}"]
        is_there = Path(judged).is_file() or (self.benchmark == "geneval2" and Path(judged).is_dir())
        return [] if is_there else [f"report.judged={judged}: must be {kinds[self.benchmark]}"]
