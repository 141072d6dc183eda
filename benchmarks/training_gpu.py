"""Training steps at published shapes on a GPU: tokens a second, share of the peak, memory beside the plan.

Weights are random, drawn on the device: a step takes as long whatever they say.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Mapping
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.gpu_cells import SMALL, Bench, Release, build
from benchmarks.training import Batch, batch_of
from sjd2_lightning.cli.plan import RunSettings, plan_run
from sjd2_lightning.models.lora import LoraSettings
from sjd2_lightning.models.pretrained import PretrainedBackbone
from sjd2_lightning.models.recompute import Checkpointing
from sjd2_lightning.models.rounding import round_frozen, train_in_fp8
from sjd2_lightning.training.module import SJD2Module, TrainingNoise
from sjd2_lightning.training.optimizer import OptimizerConfig, build_optimizer
from sjd2_lightning.training.speed import memory_bytes, peak_of, picture_flops

_WARM, _TIMED = 3, 5  # steps
_BUCKET = 64
_JANUS_1B = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
}


class Shape(NamedTuple):
    """What is trained.

    Attributes:
        release: shape of the model.
        name: what `print_plan` knows it by.
        lora: whether an adapter is trained; otherwise all weights, kept in float32.
        sizes: (pixels, pictures a step).
        fp8: whether layers multiply in fp8; on a CPU that is emulated.
        int8: whether the base of an adapter has a byte a weight.
        flex: whether attention is FlexAttention, which has no gradients on a CPU.
    """

    release: Release
    name: str
    lora: bool
    sizes: tuple[tuple[int, int], ...]
    fp8: bool = False
    int8: bool = False
    flex: bool = False


def shapes(bench: Bench) -> Mapping[str, Shape]:
    """By part; tiny ones for a smoke test."""
    if bench.smoke:
        return {
            "lora": Shape(SMALL["lumina"], "lumina-mgpt-7b", True, ((64, 2),)),
            "full": Shape(SMALL["janus"], "janus-pro-1b", False, ((SMALL["janus"].pixels, 2),)),
            "long": Shape(SMALL["emu3"], "emu3-gen", True, ((SMALL["emu3"].pixels, 1),)),
        }
    from benchmarks.gpu_cells import RELEASES

    janus = Release("janus", _JANUS_1B, 384, {"side": 24}, 32, 4.0)
    lumina = RELEASES["lumina"]
    return {
        "lora": Shape(lumina, "lumina-mgpt-7b", True, ((512, 1), (512, 4), (768, 1), (768, 2), (768, 4))),
        "full": Shape(janus, "janus-pro-1b", False, ((384, 8), (384, 32))),
        "long": Shape(RELEASES["emu3"], "emu3-gen", True, ((720, 1),)),
    }


def trainee(bench: Bench, shape: Shape, pixels: int, compiled: bool, kind: Checkpointing) -> SJD2Module:
    """A module ready for its first step."""
    backbone = build(shape.release, bench.device)
    if shape.lora:
        backbone.add_lora(LoraSettings())
    else:
        whole(backbone)
    if shape.int8:
        round_frozen(backbone.trunk.layers)
    if shape.flex:
        backbone.attend_flexibly()
    if shape.fp8:
        train_in_fp8(backbone.trunk.layers, emulate=bench.device.type == "cpu")
    if kind != "none":
        backbone.checkpoint_activations(kind)
    if compiled:
        torch._dynamo.reset()
        backbone.compile_layers("aot_eager" if bench.smoke else "inductor")
    bucket = _BUCKET if compiled else 1
    module = SJD2Module(backbone, TrainingNoise(), OptimizerConfig(), (pixels, pixels), bucket=bucket)
    module.log = lambda *_, **__: None  # type: ignore[method-assign]  there is no trainer
    module.on_fit_start()
    return module.to(bench.device)


def whole(backbone: PretrainedBackbone) -> None:
    """All weights are trained, and kept in float32."""
    backbone.float()
    backbone.model.requires_grad_(True)
    for part in backbone.UNTRAINED:
        backbone.model.get_submodule(part).requires_grad_(False)


def seconds_of(module: SJD2Module, batch: Batch, device: torch.device, smoke: bool) -> float:
    """Of one step: forward and backward pass in bfloat16, clipping, optimizer."""
    optimizer = build_optimizer(module.named_parameters(), module.optimizer_config)

    def step(number: int) -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16):
            loss = module.training_step(batch, number)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()

    def ended() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    warm, repeats = (1, 1) if smoke else (_WARM, _TIMED)
    for number in range(warm):
        step(number)
    begun = ended()
    for number in range(repeats):
        step(warm + number)
    return (ended() - begun) / repeats


def planned_gib(shape: Shape, pixels: int, batch: int, kind: Checkpointing) -> float:
    """GiB by `print_plan`; of the release, also in a smoke test."""
    settings = RunSettings(
        dtype=torch.bfloat16 if shape.lora else torch.float32,
        compute_dtype=torch.bfloat16,
        batch_size=batch,
        num_devices=1,
        strategy="auto",
        lora=LoraSettings() if shape.lora else None,
        checkpointing=kind,
        decode_batch=1,
        window=1,
        guided=False,
        quantized=shape.int8,
    )
    side = (pixels, pixels)
    plan = plan_run(shape.release.family, Path("none"), "trunk", side, settings, shape.name)
    return sum(plan.training.values()) / 2**30


def cells(bench: Bench, shape: Shape, compilers: tuple[bool, ...] = (False, True)) -> list[dict[str, Any]]:
    """A row for each size, with each kind of layers; what fails is a row too."""
    rows = []
    kinds: tuple[Checkpointing, ...] = ("full", "selective")
    for (pixels, size), compiled, kind in product(shape.sizes, compilers, kinds):
        row: dict[str, Any] = {"pixels": pixels, "batch": size, "compiled": compiled, "checkpointing": kind}
        row["attention"] = "flex" if shape.flex else "sdpa"
        bench.drop()
        try:
            rows.append(row | cell(bench, shape, pixels, size, compiled, kind))
        except torch.OutOfMemoryError as error:
            rows.append(row | {"error": str(error).splitlines()[0]})
    return rows


def cell(
    bench: Bench, shape: Shape, pixels: int, size: int, compiled: bool, kind: Checkpointing
) -> dict[str, Any]:
    """Figures of one kind of step."""
    device = bench.device
    module = trainee(bench, shape, pixels, compiled, kind)
    if device.type == "cuda":  # weights that were rounded since have gone
        torch.cuda.reset_peak_memory_stats(device)
    batch = batch_of(module.backbone, size, module.image_layout, str(device))  # type: ignore[arg-type]
    flops = picture_flops(module, batch) * size
    seconds = seconds_of(module, batch, device, bench.smoke)
    most = peak_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return {
        "seconds": seconds,
        "tokens_per_s": batch.image_ids.numel() / seconds,
        "operations": flops,
        "mfu": None if most is None else flops / seconds / most,
        "gib": memory_bytes(device) / 2**30,
        "planned_gib": planned_gib(shape, pixels, size, kind),
    }


def lora(bench: Bench) -> list[dict[str, Any]]:
    """An adapter of Lumina-mGPT 7B at 512 and 768 pixels."""
    return cells(bench, shapes(bench)["lora"])


def int8(bench: Bench) -> list[dict[str, Any]]:
    """The same on a base of a byte a weight."""
    return cells(bench, shapes(bench)["lora"]._replace(int8=True))


def full(bench: Bench) -> list[dict[str, Any]]:
    """All weights of Janus-Pro-1B, at its one size."""
    return cells(bench, shapes(bench)["full"])


def fp8(bench: Bench) -> list[dict[str, Any]]:
    """The same with products in fp8; nothing without torchao."""
    if importlib.util.find_spec("torchao") is None:
        print("fp8: torchao is not installed; pip install 'sjd2-lightning[quantize]'")
        return []
    return cells(bench, shapes(bench)["full"]._replace(fp8=True))


def long(bench: Bench) -> list[dict[str, Any]]:
    """An adapter of Emu3 at 8,189 slots: under a dense mask, and on CUDA by FlexAttention."""
    shape = shapes(bench)["long"]
    flexible = [] if bench.device.type == "cpu" else cells(bench, shape._replace(flex=True), (True,))
    return [*cells(bench, shape), *flexible]


PARTS: dict[str, Callable[[Bench], Any]] = {
    "lora": lora,
    "int8": int8,
    "full": full,
    "fp8": fp8,
    "long": long,
}
