"""`train.py print_plan=true`: what a run needs, before any weight is read."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig, open_dict

from sjd2_lightning.config import train_config
from sjd2_lightning.config_groups import TrainConfig

if TYPE_CHECKING:
    from sjd2_lightning.models.plan import RunSettings

_GIB = 2**30


def show_plan(cfg: DictConfig) -> dict[str, float]:
    """Prints parameters, tokens, memory and missing files of a run; returns the figures.

    Args:
        cfg: composed from `conf/train.yaml`.

    Raises:
        ConfigError: the configuration has problems other than missing weights.
    """
    from rich.console import Console
    from rich.table import Table

    from sjd2_lightning.models.plan import plan_run

    cfg = copy.deepcopy(cfg)
    with open_dict(cfg):
        cfg.model.init = "none"  # missing weights are part of the plan, not a problem
    config = train_config(cfg)
    model = config.model
    size = "7b" if "7b" in f"{model.hub_id} {model.path}".lower() else "1b"
    folder = Path(model.source.path)
    plan = plan_run(model.family, folder, model.trunk, model.image_size, run_settings(config), size)

    console = Console(soft_wrap=True)
    height, width = plan.grid
    console.print(f"{model.family}, {model.image_size[1]}x{model.image_size[0]} pixels")
    if plan.assumed:
        console.print(f"  sizes of the release as known here: {folder} has no config.json yet")
    parts = ", ".join(f"{name} {count / 1e6:,.0f} M" for name, count in plan.parameters.items())
    console.print(f"  parameters: {parts}; trained {plan.trained / 1e6:,.1f} M")
    console.print(f"  tokens an image: {plan.slots:,} ({height} x {width} codes)")
    table = Table("on one device, estimated", "GiB", "of it")
    for name, parts_of in (("training", plan.training), ("decoding", plan.decoding)):
        shown = ", ".join(f"{part} {count / _GIB:.1f}" for part, count in parts_of.items() if count)
        table.add_row(name, f"{sum(parts_of.values()) / _GIB:.1f}", shown)
    console.print(table)
    for line in remarks(config):
        console.print(f"  {line}")
    if plan.missing:
        console.print(f"  missing: {', '.join(plan.missing)}")
        console.print(f"  {model.source.remedy()}")
    else:
        console.print(f"  all files are in {folder}")
    figures = {
        "parameters": plan.parameters["total"],
        "trained": plan.trained,
        "tokens_per_image": plan.slots,
    }
    return {
        **{name: float(value) for name, value in figures.items()},
        "training_gib": sum(plan.training.values()) / _GIB,
        "decoding_gib": sum(plan.decoding.values()) / _GIB,
        "missing_files": float(len(plan.missing)),
    }


def run_settings(config: TrainConfig) -> RunSettings:
    """What of the configuration decides the memory."""
    import torch

    from sjd2_lightning.models.plan import RunSettings

    trainer, drafting = config.trainer, [method for name, method in config.methods.items() if name != "ar"]
    sampling = config.callbacks.sampling
    return RunSettings(
        dtype=getattr(torch, config.model.dtype),
        compute_dtype=torch.float32 if trainer.precision == "32-true" else torch.bfloat16,
        batch_size=config.data.batch_size,
        num_devices=trainer.num_nodes * (trainer.devices if isinstance(trainer.devices, int) else 1),
        strategy=trainer.strategy,
        lora=config.model.lora if config.model.peft else None,
        checkpointing=config.model.activation_checkpointing,
        decode_batch=sampling.batch_size if sampling else 1,
        window=max((method.window for method in drafting), default=1),
        guided=any(method.sampling.guidance_scale != 1 for method in config.methods.values()),
    )


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
