"""Models and data from the typed configuration, by explicit calls."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import lightning as L
import torch
import transformers

from sjd2_lightning.cli.card import Card
from sjd2_lightning.cli.settings import write_settings
from sjd2_lightning.config.groups import shipped
from sjd2_lightning.config.model_group import ModelConfig
from sjd2_lightning.config.runs import SharedConfig, TrainConfig
from sjd2_lightning.data import DataConfig
from sjd2_lightning.data.datamodule import CaptionLimit, CodeDataModule
from sjd2_lightning.data.index import HELD_OUT_NAME, PROMPTS_NAME
from sjd2_lightning.data.sources.coco import coco_items
from sjd2_lightning.data.sources.emoji import load_emoji_index
from sjd2_lightning.data.sources.scene_shards import SOURCE as SCENES
from sjd2_lightning.data.sources.scenes import Variety, training_scene
from sjd2_lightning.evaluation.prompts import PromptItem, class_prompts, held_out_prompts, read_prompts
from sjd2_lightning.evaluation.references import (
    ReferenceSet,
    coco_prompts,
    coco_reference,
    held_out_emoji,
    image_folder,
)
from sjd2_lightning.evaluation.scene_judge import scene_prompts, scene_reference, with_asked
from sjd2_lightning.metrics.alignment import load_clip_scorer
from sjd2_lightning.models.backbone import Backbone
from sjd2_lightning.models.draft_corrector import CORRECTOR_FILE
from sjd2_lightning.models.hub import located
from sjd2_lightning.models.image_tokenizer import ImageTokenizer
from sjd2_lightning.models.lora import has_adapter
from sjd2_lightning.models.pretrained import PretrainedBackbone
from sjd2_lightning.models.registry import build_shrunken, load_backbone
from sjd2_lightning.models.rounding import round_frozen, train_in_fp8
from sjd2_lightning.models.small import build_tiny
from sjd2_lightning.run.files import write_whole
from sjd2_lightning.run.harmless import harmless
from sjd2_lightning.run.provenance import trainings_of, write_trainings
from sjd2_lightning.run.stages import stage
from sjd2_lightning.training.checkpoints import VerifiedCheckpointIO
from sjd2_lightning.training.fsdp import ShardedModule, gathered_state
from sjd2_lightning.training.module import SJD2Module
from sjd2_lightning.training.recipes.chunks import ChunkModule, Chunks
from sjd2_lightning.training.recipes.clip import ClipModule, ScenePairs
from sjd2_lightning.training.recipes.flow import FlowModule
from sjd2_lightning.training.recipes.latent_chain import ProblemData, ThoughtModule

_HELD_OUT_PROMPTS = 64
_REFERENCE_SCENES = 252  # real scenes for the distances, at least as many as there are prompts
_BUCKET = 64  # columns that lengths of compiled passes are multiples of
_NUM_CAPTIONS = 5000  # of scenes, enough to hold every word often


def build_task(config: TrainConfig) -> tuple[L.LightningModule, L.LightningDataModule]:
    """The module and the data of `task`, which trains a network."""
    side, data = config.model.image_size[0], config.data
    if config.task == "clip" and config.clip is not None:
        clip = ClipModule(
            replace(config.clip, text_dir=str(shipped(config.clip.text_dir))),
            recipe_dir(config),
            side,
            config.optimizer.lr,
            config.optimizer.weight_decay,
        )
        return clip, ScenePairs(data.batch_size, side, variety_of(data), config.seed, data.num_workers)
    if config.task == "tarflow" and config.tarflow is not None:
        side, variety = config.tarflow.sizes.image_size, variety_of(data)
        scorer = load_clip_scorer(shipped(config.tarflow.clip_dir))
        flow = FlowModule(config.tarflow, scorer, recipe_dir(config), config.optimizer.lr, variety)
        return flow, ScenePairs(data.batch_size, side, variety, config.seed, data.num_workers)
    if config.task == "pccot" and config.pccot is not None:
        thinking = ThoughtModule(config.pccot, config.optimizer, recipe_dir(config))
        return thinking, ProblemData(config.pccot, data.batch_size, config.seed, data.num_workers)
    if config.task == "ceed" and config.ceed is not None:
        chunks = ChunkModule(config.ceed, recipe_dir(config), config.optimizer.lr)
        return chunks, Chunks(config.ceed, data.batch_size, config.seed)
    backbone = build_backbone(config.model, captions=captions_of(config.data))
    CaptionLimit(backbone, backbone.layout(*config.model.image_size))  # refuses before shards are made
    if config.model.quantize is not None:
        with stage("rounding the weights"):
            round_frozen(backbone.trunk.layers)
        backbone.quantized = config.model.quantize
    if backbone.noise_gate is not None and (config.trainer.fp8 or config.callbacks.ema_decay):
        raise ValueError(
            f"model.path={config.model.path}: its adapter alone is trained; set trainer.fp8=false and "
            "callbacks.ema_decay=null"
        )
    if config.trainer.fp8:
        train_in_fp8(backbone.trunk.layers)
    if config.trainer.attends_flexibly(backbone.layout(*config.model.image_size).num_slots):
        backbone.attend_flexibly()
    if config.trainer.compiled:
        backbone.compile_layers()
    return build_module(config, backbone), build_data(config, backbone)


def captions_of(data: DataConfig) -> Iterator[str]:
    """What the text tokenizer of a new model learns: captions of the embedded set that `data` prepares."""
    if data.source == SCENES:
        variety = variety_of(data)
        yield from (training_scene(0, index, variety).caption for index in range(_NUM_CAPTIONS))
    else:
        yield from (item.caption for item in load_emoji_index())


def variety_of(data: DataConfig) -> Variety:
    """How much the scenes of a configuration differ."""
    return Variety(data.num_nouns, data.aligned)


def build_backbone(
    model: ModelConfig, path: Path | None = None, captions: Iterable[str] = ()
) -> PretrainedBackbone:
    """The backbone of a configuration: loaded, or with random weights; with a low-rank adapter if asked for.

    Args:
        model: its group.
        path: a folder to load instead of `model.path`.
        captions: what the text tokenizer of a new model (`model.scratch`) learns.

    Raises:
        ValueError: weights or adapter cannot be used; the message says how to get them.
    """
    if model.scratch is not None:
        sizes = model.scratch.model_dump() | {"image_tokenizer": shipped(model.scratch.image_tokenizer)}
        sizes["start"] = model.scratch.start and shipped(model.scratch.start)
        with stage("making a new model"):
            return build_tiny(captions, **sizes)
    if model.init == "random_tiny" and path in (None, model.folder):
        backbone = build_shrunken(model.family, condition=model.condition)
    else:
        source = replace(model.source, path=path or model.source.path)
        dtype = getattr(torch, model.dtype)
        transformers.utils.logging.disable_progress_bar()  # the stage speaks where it takes long
        with stage("loading the weights"):
            backbone = load_backbone(
                model.family, source, model.trunk, dtype, model.load_onto, model.unconditional
            )
    found = getattr(backbone.tokens, "condition", None)
    if model.condition not in (None, found):
        raise ValueError(
            f"model.condition={model.condition}: the weights in {path or model.path} are drawn from "
            f"{'classes; use model=llamagen_class' if found == 'class' else 'texts; use model=llamagen'}"
        )
    goes_on = backbone.noise_gate is not None and model.adapter is None and model.lora.noisy_only
    if (model.peft is not None or model.adapter is not None) and not goes_on:
        folder = None if model.adapter is None else located(model.adapter, "model.adapter")
        backbone.add_lora(model.lora, folder)
        if model.lora.noisy_only and backbone.noise_gate is None:
            raise ValueError(
                f"model.adapter={model.adapter}: it acts on all tokens; set model.lora.noisy_only=false"
            )
    if model.activation_checkpointing != "none":
        backbone.checkpoint_activations(model.activation_checkpointing)
    return backbone


def decoding_backbone(model: ModelConfig, path: Path, ckpt_path: str | None, device: str) -> Backbone:
    """The backbone to decode with, kept in memory for the next run of a sweep in this process.

    Args:
        model: its group.
        path: folder of its weights.
        ckpt_path: a checkpoint of fine-tuning whose weights replace them, or None.
        device: where it goes.
    """
    files = [
        path / "backbone.json",
        *path.glob("*/*.safetensors"),
        path / CORRECTOR_FILE,
        *map(Path, [ckpt_path] if ckpt_path else []),
    ]
    changed = tuple(file.stat().st_mtime_ns for file in files if file.is_file())
    return _kept_backbone(model, path, ckpt_path, device, changed)


@lru_cache(maxsize=1)
def _kept_backbone(
    model: ModelConfig, path: Path, ckpt_path: str | None, device: str, changed: tuple[int, ...]
) -> Backbone:
    backbone = build_backbone(model, path)
    if ckpt_path is not None:
        with stage("loading the checkpoint"):
            load_trained(backbone, ckpt_path)
    if model.quantize is not None:
        with stage("quantising the weights"):  # before they are moved: the whole ones may not fit the device
            backbone.quantize(model.quantize, device)
    with stage(f"moving the weights to {device}"):
        return backbone.to(device)


def load_trained(backbone: Backbone, ckpt_path: str | Path) -> None:
    """Puts the weights of a Lightning checkpoint of fine-tuning into a backbone.

    Raises:
        ValueError: the file is no such checkpoint, damaged, or of another model.
    """
    if Path(ckpt_path).is_dir():
        raise ValueError(f"ckpt_path={ckpt_path}: it is sharded; evaluate the exported folder, weights=...")
    try:
        state = VerifiedCheckpointIO().load_checkpoint(ckpt_path)["state_dict"]
        prefix = "backbone."
        state = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        if has_adapter(backbone):  # its checkpoints hold nothing else
            state = {**backbone.state_dict(), **state}
        backbone.take_corrector(state)
        backbone.load_state_dict(state)
    except (RuntimeError, KeyError) as error:
        raise ValueError(
            f"ckpt_path={ckpt_path}: this is no checkpoint of the model in model.path ({error})"
        ) from error


def build_module(config: TrainConfig, backbone: Backbone) -> SJD2Module:
    """Next-clean-token training of a backbone."""
    kind = ShardedModule if config.trainer.strategy == "fsdp" else SJD2Module
    return kind(
        backbone,
        config.noise,
        config.optimizer,
        image_size=config.model.image_size,
        prompt_dropout=config.data.prompt_dropout,
        seed=config.seed,
        save_trained_only=has_adapter(backbone),
        bucket=_BUCKET if config.trainer.compiled else 1,
        corrector=config.corrector,
    )


def build_data(config: TrainConfig, backbone: Backbone) -> CodeDataModule:
    """Shards; those of embedded sets are made by the backbone's own tokenizer where they are missing.

    Raises:
        ValueError: shards that are there are of another image tokenizer.
    """
    tokenizer = image_tokenizer_of(backbone)
    own = tokenizer if config.data.prepare else None
    data = CodeDataModule(config.data, own, config.model.image_size[0], config.seed)
    if own is None:  # asked again when training begins, but loggers have made their runs by then
        for split in ("train", "val"):
            data.index(split).check_model(backbone.num_codes, getattr(tokenizer, "identity", None))
    return data


def image_tokenizer_of(backbone: Backbone) -> ImageTokenizer | None:
    """The backbone's encoder and decoder of images, if it has both."""
    return getattr(backbone, "image_tokenizer", None)


def build_reference(config: SharedConfig, num_prompts: int = 0) -> ReferenceSet | None:
    """Real images for distances and controls; None where speed alone is measured, or where there are none.

    They are those of `metrics.protocol`, of `data.reference_dir`, of own shards, or of the embedded set.

    Args:
        config: the configuration.
        num_prompts: number of prompts; of scenes at least as many are painted.
    """
    metrics, is_scenes = config.metrics, config.data.source == SCENES
    scored = metrics.clip is not None or metrics.pickscore is not None or (metrics.judge and is_scenes)
    if not metrics.has_distances and not scored:
        return None
    if config.metrics.protocol is not None:
        protocol = config.metrics.protocol
        return coco_reference(protocol, coco_items(protocol))
    height, width = config.model.image_size
    if config.model.condition == "class" and config.data.reference_dir is None and config.data.prepare:
        return None  # the embedded sets show no classes
    if config.data.reference_dir is not None:
        return image_folder(config.data.reference_dir, (height, width))
    own = Path(config.data.data_dir) / HELD_OUT_NAME
    if not config.data.prepare:
        if len(list(own.glob("*.png"))) < 2:  # a tiny set holds out one, which is no set to compare with
            return None
        name = f"held-out pictures of {own.parent.name}"
        return replace(image_folder(own, (height, width)), name=name)
    if is_scenes:
        number = max(_REFERENCE_SCENES, num_prompts)
        return scene_reference(height, number, config.seed, variety_of(config.data))
    return held_out_emoji(height)


def build_prompts(config: SharedConfig, num_prompts: int | None) -> list[PromptItem]:
    """The first prompts of `metrics.protocol`, of `data.prompt_file`, of own shards, or of the embedded set.

    None is all that the protocol or the file has, or 64 captions that the embedded set holds out. A model of
    classes has names of classes in place of the embedded set's.
    """
    if config.metrics.protocol is not None:
        return coco_prompts(coco_items(config.metrics.protocol), config.seed)[:num_prompts]
    path, is_scenes = config.data.prompt_file, config.data.source == SCENES
    own = Path(config.data.data_dir) / PROMPTS_NAME
    if path is None and not config.data.prepare and own.is_file():  # an embedded set has its own names
        path = str(own)
    if path is not None:
        found = read_prompts(path, config.seed)[:num_prompts]
        return with_asked(found) if is_scenes else found
    if config.model.condition == "class":
        return class_prompts(num_prompts or _HELD_OUT_PROMPTS, config.seed)
    if is_scenes:
        return scene_prompts(num_prompts or _HELD_OUT_PROMPTS, config.seed, variety_of(config.data))
    return held_out_prompts(num_prompts or _HELD_OUT_PROMPTS, config.seed)


def recipe_dir(config: TrainConfig) -> str:
    """Where a recipe leaves its weights; a trial run must not touch the real ones."""
    return str(Path(config.run_dir) / "model") if config.trainer.fast_dev_run else config.export_dir


def export_model(config: TrainConfig, module: L.LightningModule, trainer: L.Trainer) -> None:
    """Writes the backbone folder after fine-tuning, once; recipes write their own weights.

    All ranks must come here: a sharded model is gathered on the first one.
    """
    if not isinstance(module, SJD2Module):
        return
    state, backbone = gathered_state(module.backbone), module.backbone
    if not trainer.is_global_zero:
        return
    if config.model.quantize is not None:  # the export holds whole weights, not rounded ones
        named = module.backbone.named_parameters()
        state = {name: value.detach() for name, value in named if value.requires_grad}
    if state is not None:
        # not onto the device, where what was trained is yet
        model = config.model.model_copy(update={"load_onto": None})
        backbone = build_backbone(model, captions=captions_of(config.data))
        state = {**backbone.state_dict(), **state}
        backbone.take_corrector(state)
        backbone.load_state_dict(state)
    dtype = None if config.export_dtype is None else getattr(torch, config.export_dtype)
    data: Any = getattr(trainer, "datamodule", None)
    attribution = data.index("train").meta.attribution if isinstance(data, CodeDataModule) else ""
    card = Card.of(config, trainer.global_step, attribution, backbone.noise_gate is not None)
    with harmless(f"writing {config.export_dir}/README.md"):
        write_whole(Path(config.export_dir) / "README.md", card.text(config.export_dir))
    with stage(f"writing the weights to {config.export_dir}"):
        write_settings(config, card)
        write_trainings(config.export_dir, trainings_after(config, trainer.global_step))
        backbone.save(config.export_dir, dtype)  # backbone.json comes last: an export that has it is whole


def trainings_after(config: TrainConfig, num_steps: int) -> list[dict[str, Any]]:
    """The trainings that made the weights of a run, those before it included.

    Args:
        config: the run.
        num_steps: number of its steps.
    """
    model = config.model
    before: list[dict[str, Any]] = []
    if model.init == "random_tiny":
        before = [{"random": model.random_name}]
    elif not model.random_name:
        unknown = {"weights": model.hub_id or Path(model.path).name, "noise": None}
        before = trainings_of(model.folder) or [unknown]
    return [
        *before,
        {"data": Path(config.data.data_dir).name, "steps": num_steps, "noise": asdict(config.noise)},
    ]
