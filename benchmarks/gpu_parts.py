"""The parts of benchmarks/gpu.py: each measures one thing and returns plain numbers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.gpu_attention import compare
from benchmarks.gpu_cells import (
    ENGINES,
    PROMPT,
    Bench,
    bytes_read,
    config_of,
    milliseconds,
    own_ms,
    pass_ms,
)
from benchmarks.memory import LiveBytes
from sjd2_lightning.cli.plan import RunSettings, plan_run
from sjd2_lightning.decoding import DecodingConfig, decode
from sjd2_lightning.metrics.efficiency import peak_memory, timed
from sjd2_lightning.models import invariant
from sjd2_lightning.models.backbone import Backbone
from sjd2_lightning.models.registry import load_backbone
from sjd2_lightning.models.weights import TOKENIZER, TRUNK

MINIATURE, MINIATURE_PIXELS = "weights/tiny", 128


def card(bench: Bench) -> dict[str, float]:
    """Bytes a second of a large copy, read and write, and operations a second of a large bfloat16 product."""
    numbers, side = (2**20, 128) if bench.smoke else (2**30, 8192)
    source = torch.ones(numbers, dtype=torch.bfloat16, device=bench.device)
    target = torch.empty_like(source)
    target.copy_(source)
    copy_ms = milliseconds(lambda: target.copy_(source), bench.device)
    matrix = torch.randn(side, side, device=bench.device).to(torch.bfloat16)
    matrix @ matrix
    product_ms = milliseconds(lambda: matrix @ matrix, bench.device)
    return {
        "bytes_per_second": 2 * 2 * numbers / copy_ms * 1000,
        "operations_per_second": 2 * side**3 / product_ms * 1000,
    }


def cells(bench: Bench, name: str) -> list[tuple[str, int, bool, int]]:
    """(engine, window, guided, rows) of the passes that are timed; the whole grid for Lumina-mGPT only."""
    windows, ends = bench.windows, [bench.windows[0], bench.windows[-1 if bench.smoke else -2]]
    if name != "lumina":
        return [*(("graphs", w, True, 1) for w in windows), *(("eager", w, True, 1) for w in ends)]
    found = [(engine, w, True, 1) for engine in ENGINES for w in windows]
    found += [(engine, w, False, 1) for engine in ENGINES for w in ends]
    found += [(engine, w, True, bench.many) for engine in ENGINES for w in ends]
    if bench.smoke:  # a compiler of a CPU takes half a minute for each
        found = [cell for cell in found if cell[0] != "compiled"] + [("compiled", windows[-1], True, 1)]
    return found


def passes(bench: Bench) -> dict[str, Any]:
    """Milliseconds of an iteration by engine, window, guidance and rows, against `ar` and against the bus."""
    speed = bench.found.get("card", {}).get("bytes_per_second")
    return {name: _passes_of(bench, name, speed) for name in bench.releases}


def _passes_of(bench: Bench, name: str, speed: float | None) -> list[dict[str, Any]]:
    backbone, pixels = bench.model(name), bench.releases[name].pixels
    rows_of: list[dict[str, Any]] = []
    for engine, window, guided, rows in cells(bench, name):
        row: dict[str, Any] = {"engine": engine, "window": window, "guided": guided, "rows": rows}
        rows_of.append(row)
        config = config_of(window, guided, engine)
        try:
            row["ms"] = pass_ms(backbone, config, rows, pixels)
            row["outside_trunk_and_head_ms"] = own_ms(backbone, config, rows, pixels)
        except (ValueError, RuntimeError) as error:  # engine, memory or compiler: the other cells go on
            row["error"] = f"{type(error).__name__}: {error}"
            continue
        row["outside_trunk_and_head_share"] = row["outside_trunk_and_head_ms"] / row["ms"]
        if speed is not None:
            least = bytes_read(backbone, config, rows, pixels) / speed * 1000
            row["least_ms"], row["share_of_the_bus"] = least, least / row["ms"]
    plain = {
        (r["engine"], r["guided"], r["rows"]): r["ms"] for r in rows_of if r["window"] == 1 and "ms" in r
    }
    for row in rows_of:
        one = plain.get((row["engine"], row["guided"], row["rows"]))
        if one is not None and "ms" in row:
            row["cost_over_ar"] = row["ms"] / one
    return rows_of


def start(bench: Bench) -> dict[str, Any]:
    """Seconds from a loaded model to its first image and its second, by a fresh process, cold and warm.

    Cold is an empty folder of compiled code, warm the folder that the first process left.
    """
    bench.drop()
    script = Path(__file__).parent / "gpu.py"
    words = [sys.executable, str(script), "--first-image", str(bench.device)]
    words += ["--smoke"] if bench.smoke else []
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        variables = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": folder}
        variables["PYTHONPATH"] = str(script.parent.parent)
        for name in ("cold", "warm"):
            ran = subprocess.run(words, env=variables, capture_output=True, text=True)
            if ran.returncode != 0:
                raise RuntimeError(f"the process that draws the first image ended with:\n{ran.stderr[-500:]}")
            found[name] = json.loads(ran.stdout.strip().splitlines()[-1])
    return found


def first_image(bench: Bench) -> dict[str, float]:
    """What a process of `start` measures: seconds of the first image and of the second; passes of one."""
    backbone, pixels = bench.model("lumina"), 64 if bench.smoke else 256
    config, layout = config_of(bench.windows[-1], True, "auto"), backbone.layout(pixels, pixels)

    def draw() -> int:
        return int(decode(backbone, [PROMPT], [0], config, layout).stats.nfe[0])

    nfe, first = timed(draw, bench.device)
    return {"first_image_s": first, "second_image_s": timed(draw, bench.device)[1], "passes": nfe}


def memory(bench: Bench) -> dict[str, float]:
    """Most bytes that decoding holds, weights included, beside what `print_plan` says of the same model."""
    backbone, release = bench.model("lumina"), bench.releases["lumina"]
    config = config_of(release.window, True, bench.fastest)
    weights = sum(part.numel() * part.element_size() for part in backbone.parameters())
    with peak_memory(bench.device) as peak, LiveBytes() if bench.smoke else peak_memory() as live:
        pass_ms(backbone, config, 1, release.pixels)
    held = peak.num_bytes if peak.num_bytes is not None else weights + live.peak  # type: ignore[union-attr]
    settings = RunSettings(
        torch.bfloat16, torch.bfloat16, 1, 1, "auto", None, "none", 1, release.window, guided=True
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        backbone.model.config.save_pretrained(folder / TRUNK)
        images: Any = backbone.image_tokenizer
        images.vq.save_config(folder / TOKENIZER)
        plan = plan_run(release.family, folder, TRUNK, (release.pixels, release.pixels), settings)
    planned = sum(plan.decoding.values())
    return {"peak_bytes": held, "planned_bytes": planned, "peak_over_plan": held / planned}


def equality(bench: Bench) -> dict[str, Any]:
    """How many images of replay are those of `ar`, bit for bit: at one shape of all passes, and invariant."""
    device = str(bench.device)
    tiny = load_backbone("chameleon", MINIATURE, "trunk", torch.bfloat16, device).eval()
    pixels, num, window = (32, 2, 4) if bench.smoke else (MINIATURE_PIXELS, 16, 32)
    found = {"miniature": _equal(tiny, bench, pixels, num, window)}
    found["lumina"] = _equal(bench.model("lumina"), bench, 64 if bench.smoke else 512, 2, window)
    return found


def _equal(backbone: Backbone, bench: Bench, pixels: int, num: int, window: int) -> dict[str, Any]:
    layout = backbone.layout(pixels, pixels)

    def drawn(config: DecodingConfig) -> torch.Tensor:
        return decode(backbone, [PROMPT] * num, range(num), config, layout).slot_ids

    def count(**values: Any) -> dict[str, Any]:
        try:
            plain, ours = (drawn(config_of(w, True, bench.fastest, **values)) for w in (1, window))
        except (ValueError, RuntimeError, NotImplementedError) as error:
            return {"images": num, "error": f"{type(error).__name__}: {error}"}
        return {"images": num, "equal": int((plain == ours).all(1).sum())}

    used = _invariant_is_used(backbone)
    unused = {"images": num, "error": "decoding.invariant=true: the engine does not call models.invariant"}
    return {
        "as_fast_as_it_goes": count(),
        "same_shape": count(window_shape=window),
        "invariant": count(invariant=True) if used else unused,
    }


def _invariant_is_used(backbone: Backbone) -> bool:
    """Whether `invariant=true` reaches the layers of `models.invariant`: else its count would say nothing."""
    layout = backbone.layout(64, 64) if backbone.num_codes > 4096 else backbone.layout(32, 32)
    config = replace(config_of(4, False, "eager"), invariant=True)
    with patch.object(invariant, "linear", wraps=invariant.linear) as called:
        decode(backbone, [PROMPT], [0], config, layout)
    return bool(called.called)


def throughput(bench: Bench) -> dict[str, float]:
    """Tokens a second of `ar` with many rows over those of one."""
    backbone, pixels = bench.model("lumina"), bench.releases["lumina"].pixels
    config = config_of(1, True, bench.fastest)
    one, many = (rows / pass_ms(backbone, config, rows, pixels) * 1000 for rows in (1, bench.many))
    return {
        "rows": bench.many,
        "tokens_per_second_one": one,
        "tokens_per_second_many": many,
        "gain": many / one,
    }


def quantize(bench: Bench) -> dict[str, Any]:
    """Tokens a second of `ar` and milliseconds of a window in bfloat16 and in weight-only int8."""
    backbone, release = bench.model("lumina"), bench.releases["lumina"]

    def measured() -> dict[str, float]:
        one, many = (
            pass_ms(backbone, config_of(window, True, bench.fastest), 1, release.pixels)
            for window in (1, release.window)
        )
        return {"ar_tokens_per_second": 1000 / one, "window_ms": many}

    found: dict[str, Any] = {"bfloat16": measured()}
    backbone.decoder = None  # what it compiled holds the old weights
    try:
        backbone.quantize("int8", bench.device)
        found["int8"] = measured()
    except ValueError as error:  # torchao is not installed
        return {**found, "int8": {"error": str(error)}}
    finally:
        bench.drop()
    before, after = (found[kind]["ar_tokens_per_second"] for kind in ("bfloat16", "int8"))
    return {**found, "gain": after / before}


def attention(bench: Bench) -> dict[str, Any]:
    """One layer of Emu3's attention, by window."""
    heads, key_heads, size, columns = (4, 2, 16, 256) if bench.smoke else (32, 8, 128, 8000)
    windows = bench.windows if bench.smoke else [1, 32, 128]
    return {str(w): compare(w, columns, heads, key_heads, size, bench.device) for w in windows}


def speedup(bench: Bench) -> dict[str, Any]:
    """What the published compressions would be worth here: over this engine's `ar`, and over an eager one.

    Raises:
        ValueError: the passes were not measured.
    """
    if "passes" not in bench.found:
        raise ValueError("speedup needs the part passes: run it first, or name both")
    found = {}
    for name, release in bench.releases.items():
        ms = {
            (row["engine"], row["window"]): row["ms"]
            for row in bench.found["passes"][name]
            if row["guided"] and row["rows"] == 1 and "ms" in row
        }
        fed, plain = ms[bench.fastest, release.window], ms[bench.fastest, 1]
        found[name] = {
            "engine": bench.fastest,
            "window": release.window,
            "compression": release.compression,
            "over_this_ar": release.compression * plain / fed,
            "over_eager_ar": release.compression * ms["eager", 1] / fed,
        }
    return found


PARTS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    part.__name__: part
    for part in (card, passes, start, memory, equality, throughput, quantize, attention, speedup)
}
