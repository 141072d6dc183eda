"""What a run needs beside right values: devices, data, a checkpoint. Asked before anything is loaded.

`config.reading` says what is wrong with a value by itself; this needs the machine and the disk. Nothing is
written, so that a refused run leaves no trace.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from sjd2_lightning.config.groups import did_you_mean, shipped
from sjd2_lightning.config.reading import ConfigError, evaluate_config, train_config
from sjd2_lightning.config.runs import EvaluateConfig, SharedConfig, TrainConfig

_FEW_CORES = 16  # so many processes are let through on any machine


def check_train(cfg: DictConfig) -> TrainConfig:
    """The typed configuration of a training that can begin.

    Args:
        cfg: composed from `conf/train.yaml`.

    Raises:
        ConfigError: all problems, each a line that begins with its key.
    """
    config = train_config(cfg)
    found = [*_model_problems(config), *_trainer_problems(config), *_callback_problems(config)]
    if config.task == "finetune":
        found += _data_problems(config)
        if config.callbacks.sampling is not None:
            found += _metric_problems(config)
            key = "callbacks.sampling.num_prompts"
            found += _prompt_problems(config, key, config.callbacks.sampling.num_prompts)
    if not found:
        found += _lightning_problems(config)
    if found:
        raise ConfigError(found)
    return config


def check_evaluate(cfg: DictConfig) -> EvaluateConfig:
    """The typed configuration of an evaluation that can begin; raises as `check_train` does."""
    config = evaluate_config(cfg)
    found = [*_model_problems(config), *_metric_problems(config)]
    found += _device_problems("device", config.device, "use device=auto or device=cpu")
    if config.benchmark is None and config.thoughts is None and config.policies is None:
        found += _prompt_problems(config, "num_prompts", config.num_prompts)
    if found:
        raise ConfigError(found)
    return config


def already_done(config: TrainConfig, start: Path | None) -> str | None:
    """What to say of a run that has reached its end before it begins; None where there is something to do.

    Args:
        config: the run.
        start: checkpoint to go on from.

    Raises:
        ConfigError: the checkpoint is at the end, and `ckpt_path` asks to go on; with `auto`, which the same
            command may say every time, that is no error.
    """
    from sjd2_lightning.training.checkpoints import progress_of

    trainer = config.trainer
    if start is None or trainer.fast_dev_run:
        return None
    step, epochs = progress_of(start)
    if 0 <= trainer.max_steps <= step:
        where, remedy = f"step {step} of {trainer.max_steps}", "raise trainer.max_steps"
    elif trainer.max_epochs not in (None, -1) and trainer.max_epochs <= epochs:
        where, remedy = f"epoch {epochs} of {trainer.max_epochs}", "raise trainer.max_epochs"
    else:
        return None
    # one of them in every export
    files = ("backbone.json", "config.json", "open_clip_config.json", "flow.json", "policy.json")
    exports = [Path(config.export_dir) / name for name in files]
    written = max((path.stat().st_mtime for path in exports if path.is_file()), default=0.0)
    is_own = start.resolve().is_relative_to(Path(config.run_dir).resolve())
    if is_own and written < start.stat().st_mtime:
        return None  # it was killed before its weights were written
    message = f"ckpt_path={config.ckpt_path}: {start} is at {where}; {remedy} to go on"
    if config.ckpt_path == "auto":
        return f"{message}. Nothing was done; its weights are in {config.export_dir}"
    raise ConfigError([message])


def likely_start(config: TrainConfig) -> Path | None:
    """The newest checkpoint that `ckpt_path` means, whole or not: its bytes are not looked at."""
    if config.ckpt_path not in ("auto", "last"):
        return None if config.ckpt_path is None else Path(config.ckpt_path)
    run_dir = Path(config.run_dir)
    found = list(run_dir.glob("checkpoints/*.ckpt"))
    if config.ckpt_path == "last":
        found = found or list(run_dir.parent.glob("*/checkpoints/last.ckpt"))
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def _data_problems(config: TrainConfig) -> Iterator[str]:
    """Shards that are missing, of another size than the model draws, or too few for a batch."""
    from sjd2_lightning.cli.sizes import codes_of
    from sjd2_lightning.data.datamodule import CodeDataModule
    from sjd2_lightning.data.loader import CodeDataset
    from sjd2_lightning.models.registry import family_of

    data, model, trainer = config.data, config.model, config.trainer
    if model.condition == "class" and data.prepare:
        yield (
            f"model.condition=class: captions of data.source={data.source} name no classes; prepare pictures "
            "whose captions are numbers or names of classes, and use data=shards data.data_dir=FOLDER"
        )
        return
    codes = codes_of(model)
    if codes is not None and any(side % codes.pixels for side in model.image_size):
        yield f"model.image_size={list(model.image_size)}: must be multiples of {codes.pixels}"
        return
    module = CodeDataModule(data, image_size=model.image_size[0], seed=config.seed)
    try:
        if data.prepare and not module.is_foreign():
            return  # made with the model's own tokenizer
        indexes = {split: module.index(split) for split in ("train", "val")}
        if codes is not None:
            step = codes.pixels if data.kind == "codes" else 1
            several = data.kind == "codes" and family_of(model.family).adapter.GRIDS > 1
            # grids that lie in one row are checked when training begins, which knows the layout
            size = None if several else (model.image_size[0] // step, model.image_size[1] // step)
            for index in indexes.values():
                index.check_model(codes.num_codes, None, size)
    except (ValueError, OSError) as error:
        yield f"data.data_dir={data.data_dir}: {error}"
        return
    try:
        CodeDataset(
            indexes["train"],
            batch_size=data.batch_size,
            train=True,
            world_size=trainer.num_nodes * (trainer.devices if isinstance(trainer.devices, int) else 1),
            num_samples=data.num_train_samples,
            drop_last=data.drop_last,
        )
    except ValueError as error:
        yield f"data.batch_size={data.batch_size}: {error}"


def _prompt_problems(config: SharedConfig, key: str, num_prompts: int | None) -> Iterator[str]:
    """Prompts that cannot be read or are too few, a folder of real images without any."""
    from sjd2_lightning.cli.build import build_prompts

    try:
        build_prompts(config, num_prompts)
    except (ValueError, OSError) as error:
        data, protocol = config.data, config.metrics.protocol
        source = (
            f"{key}={num_prompts}" if data.prompt_file is None else f"data.prompt_file={data.prompt_file}"
        )
        yield f"{source if protocol is None else f'metrics.protocol={protocol.name}'}: {error}"
    folder = config.data.reference_dir
    if folder is not None and config.metrics.has_distances:
        num_files = sum(path.is_file() for path in Path(folder).rglob("*"))
        if num_files < 2:
            yield f"data.reference_dir={folder}: holds {num_files} files; distances need at least 2 pictures"


def _device_problems(key: str, device: str, remedy: str) -> Iterator[str]:
    import torch

    missing = {"cuda": not torch.cuda.is_available(), "mps": not torch.backends.mps.is_available()}
    if missing.get(device.partition(":")[0]):
        yield f"{key}={device}: this machine has none; {remedy}"


def _model_problems(config: SharedConfig) -> Iterator[str]:
    """A device that is not there, a context of guidance that the family does not have."""
    from sjd2_lightning.models.registry import family_of

    model = config.model
    if model.load_onto is not None:
        yield from _device_problems("model.load_onto", model.load_onto, "set it to null")
    contexts = family_of(model.family).contexts
    if model.unconditional is not None and model.unconditional not in contexts:
        yield f"model.unconditional={model.unconditional}: must be one of {', '.join(contexts)}"


def _metric_problems(config: SharedConfig) -> Iterator[str]:
    """Scorers and extractors whose weights are not there."""
    from sjd2_lightning.metrics.alignment import check_clip
    from sjd2_lightning.metrics.features import InceptionCleanFID, check_inception

    metrics = config.metrics
    if metrics.clip is not None:
        source = shipped(metrics.clip) if "/" in metrics.clip else metrics.clip
        try:
            check_clip(source, metrics.clip_pretrained)
        except ValueError as error:
            yield f"metrics.clip={metrics.clip}, metrics.clip_pretrained={metrics.clip_pretrained}: {error}"
    if InceptionCleanFID.name in metrics.features:
        try:
            check_inception(metrics.inception_dir, metrics.allow_download)
        except ValueError as error:
            yield f"metrics.inception_dir={metrics.inception_dir}: {error}"
    if any(value is not None for value in (metrics.dinov2, metrics.cmmd, metrics.pickscore)):
        from sjd2_lightning.cli.scorers import scorer_problems

        yield from scorer_problems(metrics)


def _trainer_problems(config: TrainConfig) -> Iterator[str]:
    """Strategies that do not exist, and devices and processes that this machine does not have."""
    import torch
    from lightning.pytorch.strategies import StrategyRegistry

    from sjd2_lightning.models.rounding import has_fp8

    trainer = config.trainer
    names = {"auto", "fsdp", "deepspeed", *StrategyRegistry.available_strategies()}
    known = sorted(name for name in names if "xla" not in name and "tpu" not in name)
    if trainer.strategy not in known:
        hint = did_you_mean(trainer.strategy, known)
        yield f"trainer.strategy={trainer.strategy}: no such strategy; {hint}"
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    has_mps = torch.backends.mps.is_available()
    kind = trainer.accelerator
    if (kind == "gpu" and not num_gpus and not has_mps) or (kind == "mps" and not has_mps):
        yield f"trainer.accelerator={kind}: this machine has none; use trainer=cpu or trainer=auto"
    elif isinstance(trainer.devices, int):
        on_gpus = num_gpus and kind in ("auto", "gpu")
        most = num_gpus if on_gpus else 1 if has_mps and kind != "cpu" else _most_processes()
        if trainer.devices > most:
            what = "GPUs" if on_gpus else "processes"
            yield f"trainer.devices={trainer.devices}: this machine has room for {most} {what}"
    if trainer.fp8 and not (trainer.on_cuda and has_fp8(torch.device("cuda"))):
        yield (
            "trainer.fp8=true: this machine has no card with fp8 (NVIDIA's from Ada and Hopper on have); set "
            "it to false"
        )
    if trainer.attention == "flex" and not (trainer.on_cuda and trainer.compiled):
        yield (
            "trainer.attention=flex: FlexAttention trains on CUDA alone, in compiled layers; use "
            "trainer.attention=auto"
        )
    lacking = importlib.util.find_spec("torchao") is None
    for asked, key, instead in (
        (config.optimizer.name == "adamw8bit", "optimizer.name=adamw8bit", "use optimizer=adamw"),
        (trainer.fp8, "trainer.fp8=true", "set it to false"),
    ):
        if asked and lacking:
            install = "`pip install 'sjd2-lightning[quantize]'`"
            yield f"{key}: torchao is not installed; {install}, or {instead}"
    if config.data.num_workers > _most_processes():
        yield (
            f"data.num_workers={config.data.num_workers}: this machine has {os.cpu_count()} cores; more than "
            f"{_most_processes()} reading processes would only take turns"
        )
    if trainer.num_nodes > 1 and not any(name in os.environ for name in ("SLURM_JOB_ID", "MASTER_ADDR")):
        yield (
            f"trainer.num_nodes={trainer.num_nodes}: nothing says where the other machines are; start this "
            "by srun or torchrun, see docs/scaling.md"
        )


def _most_processes() -> int:
    return max(_FEW_CORES, 2 * (os.cpu_count() or 1))


def _callback_problems(config: TrainConfig) -> Iterator[str]:
    """A metric to choose checkpoints by that nothing logs, callbacks that cannot be made."""
    import hydra
    from lightning.pytorch import Callback

    for place, entry in enumerate(config.callbacks.extra):
        key = f"callbacks.extra.{place}"
        try:
            made = hydra.utils.instantiate(entry) if "_target_" in entry else None
        except Exception as error:  # whatever a constructor raises for arguments that are not its own
            yield f"{key}: {str(error.__cause__ or error).splitlines()[0]}"
            continue
        if not isinstance(made, Callback):
            yield f"{key}={entry}: is no callback; give {{_target_: lightning.pytorch.callbacks.NAME, ...}}"
    checkpoint = config.callbacks.checkpoint
    if checkpoint is not None and checkpoint.monitor is not None:
        names = logged_names(config)
        if checkpoint.monitor not in names:
            hint = did_you_mean(checkpoint.monitor, names)
            yield f"callbacks.checkpoint.monitor={checkpoint.monitor}: nothing logs this metric; {hint}"


def logged_names(config: TrainConfig) -> list[str]:
    """Metrics that a training logs at every validation or step, by name."""
    from sjd2_lightning.data.sources.scenes import PROMPT_CATEGORIES
    from sjd2_lightning.report.wandb_log import sampled_names
    from sjd2_lightning.training.module import SJD2Module
    from sjd2_lightning.training.recipes.chunks import ChunkModule
    from sjd2_lightning.training.recipes.clip import ClipModule
    from sjd2_lightning.training.recipes.flow import FlowModule
    from sjd2_lightning.training.recipes.latent_chain import ThoughtModule

    if config.task == "tokenizer":
        return []
    modules: dict[str, Any] = {"finetune": SJD2Module, "clip": ClipModule}
    modules |= {"tarflow": FlowModule, "pccot": ThoughtModule, "ceed": ChunkModule}
    module = modules[config.task]
    names = [*module.LOGGED]
    if config.callbacks.sampling is not None and config.task == "finetune":
        metrics = config.metrics
        clip = metrics.clip is not None
        few = config.callbacks.sampling.num_prompts < metrics.min_images
        features = () if few else metrics.extractors
        further = ["cmmd"] if metrics.cmmd is not None and not few else []
        further += ["pick_score"] if metrics.pickscore is not None else []
        is_judged = metrics.judge and config.data.source == "scenes"
        judged = ("overall", *PROMPT_CATEGORIES) if is_judged else ()
        has_manifold = metrics.nearest_k is not None
        names += sampled_names(config.compare, features, clip, has_manifold, judged, further)
    return names


def _lightning_problems(config: TrainConfig) -> Iterator[str]:
    """What Lightning's own constructor refuses, such as a precision that a device does not have."""
    import lightning as L

    if config.trainer.strategy == "fsdp" or config.trainer.strategy.startswith("deepspeed"):
        return  # put together with the model
    quiet = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    try:
        L.Trainer(
            **config.trainer.lightning(),
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=config.run_dir,
        )
    except Exception as error:  # its classes of errors are many; each says what is wrong
        message = " ".join(str(error).split())
        key = next((key for key in type(config.trainer).model_fields if key in message), None)
        yield f"trainer{f'.{key}' if key else ''}: {message}"
    finally:
        quiet.setLevel(level)
