"""`train.py print_plan=true` and evaluate.py's: what a run needs, before any weight is read."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, open_dict
from torch import nn

from sjd2_lightning.cli.sizes import downsample, missing_files
from sjd2_lightning.config.reading import evaluate_config, train_config
from sjd2_lightning.config.runs import EvaluateConfig, SharedConfig, TrainConfig
from sjd2_lightning.models.draft_corrector import DraftCorrector
from sjd2_lightning.models.lora import LoraSettings
from sjd2_lightning.models.pretrained import PretrainedBackbone
from sjd2_lightning.models.recompute import Checkpointing
from sjd2_lightning.models.registry import family_of
from sjd2_lightning.models.weights import BACKBONE_FILE, read_json

_GIB = 2**30
CARDS = (24, 48, 80)  # GB of common cards; their GiB are as many, nearly
USABLE = 0.92  # share of a card's memory that is left beside the driver and what is not contiguous


def show_plan(cfg: DictConfig) -> dict[str, float]:
    """Prints parameters, tokens, memory and missing files of a training; returns the figures.

    Args:
        cfg: composed from `conf/train.yaml`.

    Raises:
        ConfigError: the configuration has problems other than missing weights.
    """
    config = train_config(_without_weights(cfg))
    settings = run_settings(config)
    title = f"training, batch {settings.batch_size}, {config.trainer.precision}"
    return _show(config, settings, title, remarks(config))


def show_decoding_plan(cfg: DictConfig) -> dict[str, float]:
    """`show_plan` of an evaluation, which trains nothing.

    Args:
        cfg: composed from `conf/evaluate.yaml`.

    Raises:
        ConfigError: the configuration has problems other than missing weights.
    """
    config = evaluate_config(_without_weights(cfg))
    return _show(config, decoding_settings(config))


def _without_weights(cfg: DictConfig) -> DictConfig:
    """A copy for which missing weights are part of the plan, not a problem."""
    cfg = copy.deepcopy(cfg)
    with open_dict(cfg):
        cfg.model.init = "none"
    return cfg


def _show(
    config: SharedConfig, settings: RunSettings, training: str = "", further: Sequence[str] = ()
) -> dict[str, float]:
    """Prints a plan and returns its figures.

    Args:
        config: the configuration.
        settings: what of it decides the memory.
        training: title of the row of training; "" where nothing is trained.
        further: lines below the table.
    """
    from rich.console import Console
    from rich.table import Table

    model = config.model
    name = f"{model.hub_id} {model.path}".lower()
    folder = Path(model.source.path)
    plan = plan_run(model.family, folder, model.trunk, model.image_size, settings, name)

    console = Console(soft_wrap=True)
    height, width = plan.grid
    where = "to decode and under an adapter" if model.quantize == "int8" else "to decode"
    types = f"weights in {model.dtype}{f', layers in {model.quantize} {where}' if model.quantize else ''}"
    console.print(f"{model.family}, {model.image_size[1]}x{model.image_size[0]} pixels, {types}")
    if plan.assumed:
        console.print(f"  sizes of the release as known here: {folder} has no config.json yet")
    parts = ", ".join(f"{name} {count / 1e6:,.0f} M" for name, count in plan.parameters.items())
    trained = f"; trained {plan.trained / 1e6:,.1f} M" if training else ""
    console.print(f"  parameters: {parts}{trained}")
    console.print(f"  tokens an image: {plan.slots:,} ({height} x {width} codes)")
    table = Table("on one device, estimated", "GiB", "of it")
    named = {training: plan.training} if training else {}
    named[f"decoding, {settings.decode_batch} at once, window {settings.window}"] = plan.decoding
    for name, parts_of in named.items():
        shown = ", ".join(f"{part} {count / _GIB:.1f}" for part, count in parts_of.items() if count)
        table.add_row(name, f"{sum(parts_of.values()) / _GIB:.1f}", shown)
    console.print(table)
    for line in (*what_fits(plan, settings, bool(training)), *further):
        console.print(f"  {line}")
    if plan.missing:
        console.print(f"  missing: {', '.join(plan.missing)}")
        console.print(f"  {model.source.remedy()}")
    else:
        console.print(f"  all files are in {folder}")
    figures = {"parameters": plan.parameters["total"], "tokens_per_image": plan.slots}
    figures |= {"trained": plan.trained} if training else {}
    gib = {"training_gib": sum(plan.training.values()) / _GIB} if training else {}
    return {
        **{name: float(value) for name, value in figures.items()},
        **gib,
        "decoding_gib": sum(plan.decoding.values()) / _GIB,
        "missing_files": float(len(plan.missing)),
    }


def run_settings(config: TrainConfig) -> RunSettings:
    """What of the configuration of a training decides its memory."""
    trainer, sampling = config.trainer, config.callbacks.sampling
    return replace(
        _decoding_settings(config, sampling.batch_size if sampling else 1),
        compute_dtype=torch.float32 if trainer.precision == "32-true" else torch.bfloat16,
        batch_size=config.data.batch_size,
        num_devices=trainer.num_nodes * (trainer.devices if isinstance(trainer.devices, int) else 1),
        strategy=trainer.strategy,
        lora=config.model.lora if config.model.peft else None,
        reshard=trainer.reshard,
        optimizer=config.optimizer.name,
        corrector=config.corrector.width,
    )


def decoding_settings(config: EvaluateConfig) -> RunSettings:
    """What of the configuration of an evaluation decides its memory."""
    return _decoding_settings(config, config.batch_size)


def _decoding_settings(config: SharedConfig, decode_batch: int) -> RunSettings:
    methods = [config.methods[name] for name in config.compare]
    longest = max(config.auto_window.windows)
    dtype = getattr(torch, config.model.dtype)
    return RunSettings(
        dtype=dtype,
        compute_dtype=dtype,
        batch_size=1,
        num_devices=1,
        strategy="auto",
        lora=None,
        checkpointing=config.model.activation_checkpointing,
        decode_batch=decode_batch,
        window=max(longest if method.window == "auto" else method.window for method in methods),
        guided=any(method.sampling.guidance_scale != 1 for method in methods),
        quantized=config.model.quantize is not None,
    )


def what_fits(plan: Plan, settings: RunSettings, is_training: bool = True) -> list[str]:
    """A line for each size of card: the largest batches that fit it, of this run and of less than it.

    Args:
        plan: plan of the run.
        settings: what of the run decides the memory.
        is_training: whether it trains; an evaluation only decodes.
    """
    lines = []
    for card in CARDS:
        room = USABLE * card * _GIB
        # all but weights and what belongs to them grows with the batch
        batch, grows = settings.batch_size, ("activations", "logits")
        found = {
            "training as asked": _largest(plan.training, grows, batch, room),
            "training an adapter": _largest(plan.adapter, grows, batch, room),
            "decoding": _largest(plan.decoding, ("cache", "window"), settings.decode_batch, room),
        }
        if settings.lora is not None:
            del found["training an adapter"]
        if not is_training:
            found = {"decoding": found["decoding"]}
        words = {name: f"at batch {most:,}" if most else "does not fit" for name, most in found.items()}
        parts = [f"{name} {word}" for name, word in words.items()]
        lines.append(f"a card of {card} GB: {', '.join(parts)}")
    return lines


def _largest(parts: Mapping[str, int], growing: Sequence[str], batch: int, room: float) -> int:
    """The largest batch whose bytes fit, from those at another batch; 0 where not even one does."""
    each = sum(parts[name] for name in growing) / batch
    return max(0, int((room - sum(parts.values()) + each * batch) // each))


def remarks(config: TrainConfig) -> list[str]:
    """What the figures do not say by themselves."""
    found = []
    if config.model.dtype != "float32" and config.model.peft is None:
        found.append(
            f"weights in {config.model.dtype} lose small updates: train all weights with model.dtype=float32 "
            "trainer.precision=bf16-mixed, or an adapter with model.peft=lora"
        )
    if config.trainer.devices == "auto":
        found.append("trainer.devices=auto: figures are for one device; give a number")
    if config.model.family == "chameleon" and config.model.get is not None:
        found.append("vqgan.ckpt is Meta's: github.com/facebookresearch/chameleon says how to ask for it")
    return found


# a layer, token and unit of width in 16 bits without attention scores (arXiv 2205.05198)
_ACTIVATION_BYTES = 34
_SELECTED = 14  # of them are kept by `selective`: attention's result and every second matrix product
_STATE_OF_8_BITS = 1 + 4 / 256  # bytes, with one number in single precision for each 256
_TEXT_TOKENS = 128  # a long prompt


@dataclass(frozen=True)
class RunSettings:
    """What of a run decides its memory.

    Attributes:
        dtype: type of the weights.
        compute_dtype: type of activations.
        batch_size: images a device and training step.
        num_devices: that share the work.
        strategy: Lightning's name: with "fsdp" and "deepspeed_stage_3" everything is shared out, with
            "deepspeed_stage_2" gradients and optimizer states are; otherwise each device has all.
        lora: sizes of an adapter; None trains all weights.
        checkpointing: what is computed again in the backward pass.
        decode_batch: prompts decoded together.
        window: slots drafted ahead.
        guided: whether guidance doubles the rows.
        quantized: whether the trunk's layers have one byte a weight, to decode and under an adapter.
        reshard: whether a gathered layer is dropped behind its forward pass.
        optimizer: its name.
        corrector: number of units of the corrector of drafts that is trained; 0 is none.
    """

    dtype: torch.dtype
    compute_dtype: torch.dtype
    batch_size: int
    num_devices: int
    strategy: str
    lora: LoraSettings | None
    checkpointing: Checkpointing
    decode_batch: int
    window: int
    guided: bool
    quantized: bool = False
    reshard: bool = True
    optimizer: str = "adamw"
    corrector: int = 0


@dataclass(frozen=True)
class Plan:
    """Bytes are of one device.

    Attributes:
        parameters: numbers of the whole model, and by part.
        trained: how many of them train.
        grid: (height, width) in codes.
        slots: tokens of an image that are drawn or forced.
        training, adapter, decoding: bytes by what they hold; `adapter` are those of training a low-rank
            adapter in place of all weights.
        missing: files that are not there yet.
        assumed: the sizes are those of the release as known here, for want of its config.json.
    """

    parameters: dict[str, int]
    trained: int
    grid: tuple[int, int]
    slots: int
    training: dict[str, int]
    adapter: dict[str, int]
    decoding: dict[str, int]
    missing: list[str]
    assumed: bool


def plan_run(
    family: str,
    folder: Path,
    trunk: str,
    image_size: tuple[int, int],
    settings: RunSettings,
    name: str = "",
) -> Plan:
    """Counts and estimates without reading a weight.

    Args:
        family: name in the registry.
        folder: where the weights lie, or will lie.
        trunk: sub-folder of a saved backbone.
        image_size: (height, width) in pixels.
        settings: what of the run decides the memory.
        name: hub id and path, which say the size of a family of several without its config.json.
    """
    adapter = family_of(family).adapter
    saved = (folder / BACKBONE_FILE).is_file() or adapter.CONVERTED
    weights = folder / (trunk if saved else adapter.PLACES[0])
    assumed = not (weights / "config.json").is_file()
    if not assumed:
        read_json(weights / "config.json")
    config = adapter.release_config(name) if assumed else adapter.MODEL.config_class.from_pretrained(weights)
    with torch.device("meta"):
        model = adapter.MODEL(config)
    extra = DraftCorrector.numbers(config.get_text_config().hidden_size, settings.corrector)
    parameters = _count(adapter, model, extra)
    height, width = (side // downsample(adapter, folder, config) for side in image_size)
    slots = adapter.num_slots(height, width)
    in_adapter = _lora_parameters(adapter, model, settings.lora or LoraSettings()) + extra
    trained = in_adapter if settings.lora is not None else parameters["total"] - parameters["frozen"]
    codes, _ = adapter.codes_of_config(config)
    return Plan(
        parameters,
        trained,
        (height, width),
        slots,
        _training(config, parameters, trained, slots, codes, settings, settings.lora is not None),
        _training(config, parameters, in_adapter, slots, codes, settings, True),
        _decoding(config, parameters, slots, codes, settings),
        missing_files(folder, weights, saved, adapter),
        assumed,
    )


def _count(adapter: type[PretrainedBackbone], model: nn.Module, corrector: int) -> dict[str, int]:
    """Numbers of a model and its corrector of drafts, in all and by part."""

    def of(module: nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    frozen = sum(of(model.get_submodule(part)) for part in adapter.UNTRAINED)
    layers = of(model.get_submodule(f"{adapter.TRUNK_PATH}.layers"))
    total = of(model)
    found = {"total": total + corrector, "layers": layers, "other": total - layers - frozen, "frozen": frozen}
    return found | ({"corrector": corrector} if corrector else {})


def _lora_parameters(adapter: type[PretrainedBackbone], model: nn.Module, lora: LoraSettings) -> int:
    layers = model.get_submodule(f"{adapter.TRUNK_PATH}.layers")
    return sum(
        lora.rank * (module.in_features + module.out_features)
        for name, module in layers.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in lora.targets
    )


def _training(
    config: Any,
    parameters: dict[str, int],
    trained: int,
    slots: int,
    num_codes: int,
    settings: RunSettings,
    is_adapter: bool,
) -> dict[str, int]:
    text, total = config.get_text_config(), parameters["total"]
    width = settings.dtype.itemsize
    rounded = parameters["layers"] if settings.quantized and is_adapter else 0
    state = 2 * _STATE_OF_8_BITS if settings.optimizer == "adamw8bit" else 2 * width
    stage = {"fsdp": 3, "deepspeed_stage_3": 3, "deepspeed_stage_2": 2}.get(settings.strategy, 0)
    weights_share = settings.num_devices if stage == 3 else 1
    states_share = settings.num_devices if stage >= 2 else 1
    # FSDP2 gathers in the type that it computes in, DeepSpeed in that of the weights
    fsdp = settings.strategy == "fsdp"
    gathered = 2 * total * (min(width, settings.compute_dtype.itemsize) if fsdp else width)
    tokens = settings.batch_size * (slots + _TEXT_TOKENS)
    layer = _ACTIVATION_BYTES * text.hidden_size * settings.compute_dtype.itemsize // 2
    kept = text.hidden_size * settings.compute_dtype.itemsize
    each = {"full": kept, "selective": kept + layer * _SELECTED // _ACTIVATION_BYTES, "none": layer}
    per_token = text.num_hidden_layers * each[settings.checkpointing]
    return {
        "weights": ((total - rounded) * width + rounded) // weights_share,
        "gradients": trained * width // states_share,
        "optimizer": int(trained * state) // states_share,
        # with recomputation one layer at a time is whole
        "activations": tokens * (per_token + (layer if settings.checkpointing != "none" else 0)),
        # logits, their gradient and the law, in single precision
        "logits": settings.batch_size * slots * num_codes * 3 * 4,
        # the weights of a layer are gathered before use, and the next ones with them
        "gathered": gathered // (text.num_hidden_layers if settings.reshard else 2) if stage == 3 else 0,
    }


def _decoding(
    config: Any, parameters: dict[str, int], slots: int, num_codes: int, settings: RunSettings
) -> dict[str, int]:
    text = config.get_text_config()
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    entry = 2 * text.num_hidden_layers * text.num_key_value_heads * head_dim * settings.dtype.itemsize
    rows = settings.decode_batch * (2 if settings.guided else 1)
    rounded = parameters["layers"] if settings.quantized else 0  # their norms and scales are a thousandth
    return {
        "weights": (parameters["total"] - rounded) * settings.dtype.itemsize + rounded,
        "cache": rows * (slots + settings.window + _TEXT_TOKENS) * entry,
        # logits of both sides, scores, noise of the window and a copy of each
        "window": settings.decode_batch * settings.window * num_codes * 4 * 6,
    }
