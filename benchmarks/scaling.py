"""Cost model of an iteration: what a pass costs by its sizes, and what that means for a 7B model on an A100.

    .venv/bin/python benchmarks/scaling.py --json outputs/scaling.json

First part, measured here: seconds of one pass of the shipped trunk, law included, and of the loop's own work
beside it, over window, prefix, batch, vocabulary and levels, one varied at a time, with the exponent of a
power law. Settings are interleaved and the least of the repeats is taken, since other load only ever adds
time.

Second part, counted: bytes of the window's state, of the cache, and of everything that decoding holds at its
peak (results of tensor operations; kernels' own scratch is not seen), over window, rows and vocabulary, in
units of one float32 number for each row, slot of the window and code.

Third part, computed for an A100 (80 GB SXM; data sheet: 2,039 GB/s, 312 TFLOP/s in bf16). The first model was
a roofline: the longer of bytes / bandwidth and operations / (peak x utilisation), plus what that leaves of
the paper's latency of plain autoregression as a cost of launching. What was measured on an H200 with the
engine before this one (`MEASURED`, docs/gpu.md) shows where it was wrong:

- Launches are no part of a model's cost. An eager pass is about 1,300 kernels that a host starts, and takes
  27 to 41 ms with any window; in a CUDA graph that is gone. Speed-ups over an eager baseline are speed-ups
  over a GPU that waits.
- A pass of one token does not reach the bandwidth: 6.9 ms where its bytes take 3.3, a share of 0.48.
- The cost rises from the first tokens on: 32 cost 1.12 passes of one, 64 cost 1.19, where the roofline of
  that card says 1.00; 96 cost 1.34.

So a pass takes what its bytes take at the share reached, times the measured cost of its window; or what its
operations take, where that is longer. That the A100 has the share and the curve of an H200 is assumed. The
published compression over the published speed-up is what the paper's own passes cost over its `ar`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.memory import LiveBytes
from sjd2_lightning.decoding import DecodingConfig, Sampling, decode
from sjd2_lightning.decoding.method import Method
from sjd2_lightning.decoding.rules import Scores, judged
from sjd2_lightning.decoding.window import Window
from sjd2_lightning.evaluation.auto_window import one_pass
from sjd2_lightning.metrics.efficiency import timed
from sjd2_lightning.models.backbone import Backbone, rows_with_newlines
from sjd2_lightning.models.registry import build_shrunken, load_backbone

BASE = {"window": 32, "prefix": 128, "rows": 2, "levels": 2}
PASSES = {
    "window": [1, 2, 4, 8, 16, 32, 64],
    "prefix": [64, 128, 256, 512],
    "rows": [2, 4, 8, 16],
    "levels": [0, 2, 8, 32],
}
OWN_WORK = {
    "window": [8, 16, 32, 64],
    "vocabulary": [512, 2048, 8192],
    "levels": [0, 2, 8],
    "rows": [1, 4, 16],
}

MEMORY = {"window": [8, 16, 32, 64], "rows": [1, 4, 16], "family": ["tiny", "chameleon", "janus", "emu3"]}

BANDWIDTH, PEAK = 2.039e12, 312e12  # bytes/s and bf16 operations/s of an A100 80 GB SXM
WEIGHTS, LAYERS, WIDTH = 7e9, 32, 4096
# milliseconds of trunk and head in a CUDA graph with compiled layers, by window (Lumina-mGPT, two rows, H200)
MEASURED = {1: 6.9, 16: 7.8, 32: 7.7, 64: 8.2, 96: 9.3, 128: 9.7}
# its bytes, 13 GB of layers and the cache, take 3.3 ms at the 4.3 TB/s that the card moves
SHARE_OF_BANDWIDTH = 3.3 / MEASURED[1]
# name: window (of SJD: assumed), levels, steps of autoregression / steps, published speed-up
PAPER = {"SJD": (32, 0, 2.23, 2.05), "SJD2": (96, 25, 4.02, 2.63)}


def a_pass(backbone: Backbone, window: int, prefix: int, rows: int, levels: int) -> Callable[[], Any]:
    """A pass over `window` slots behind a prompt and about `prefix` slots; see `auto_window.one_pass`."""
    layout = backbone.layout(128, 128)
    config = DecodingConfig("sjd2", window, levels)
    return one_pass(backbone, config, ["a red cat"] * rows, layout, window, prefix)


def own_work(window: int, vocabulary: int, levels: int, rows: int) -> Callable[[], Any]:
    """What the loop does beside a pass, in exact mode: verdicts, refined drafts, the window's state."""
    config = DecodingConfig("sjd2", window, levels, acceptance="exact")
    layout = rows_with_newlines(64, 64, vocabulary, (64, 64))
    method = Method(config, torch.randn(vocabulary + 1, 64), vocabulary)
    state = method.begin(torch.arange(rows), [layout] * rows, layout.num_slots + window)
    scores = torch.randn(rows, window, vocabulary)
    none_settled = torch.zeros(rows, window, dtype=torch.bool)
    stays = torch.zeros(rows, dtype=torch.long)

    def call() -> None:
        found, view = Scores(scores), Window(method.source, state)
        slots = view.slots()
        view.fed(slots, 1)
        verdict = judged(method.one_pass.rule, slots, found)
        view.renew(slots, method.redraft(slots, verdict, found, none_settled), found)
        view.advance(stays, stays, verdict, found)
        state.iteration.zero_()  # the window stays where it is, so that every call does the same

    return call


def sweep(calls: dict[tuple[str, int], Callable[[], Any]], repeats: int) -> dict[str, dict[str, Any]]:
    """Least seconds of each call, by what is varied, and the exponent of a power law through them."""
    seconds = dict.fromkeys(calls, np.inf)
    for _ in track(range(repeats), "repeats"):
        for key, call in calls.items():
            seconds[key] = min(seconds[key], timed(call)[1])
    found: dict[str, dict[str, Any]] = {}
    for (name, size), least in seconds.items():
        found.setdefault(name, {"seconds": {}})["seconds"][size] = least
    for entry in found.values():
        sizes, least = (np.array(list(part)) for part in zip(*entry["seconds"].items(), strict=True))
        entry["exponent"] = float(np.polyfit(np.log(sizes[sizes > 0]), np.log(least[sizes > 0]), 1)[0])
    return found


def memory(
    backbone: Backbone, pixels: tuple[int, int], config: DecodingConfig, rows: int
) -> dict[str, float]:
    """Bytes that decoding a batch holds: state, cache, all at the peak; and the last two beside one law's."""
    layout, made = backbone.layout(*pixels), []

    def new_cache(batch: int, max_len: int) -> Any:
        made.append(type(backbone).new_cache(backbone, batch, max_len))
        return made[-1]

    method = Method(config, backbone.slot_table(), backbone.num_codes)
    columns = layout.num_slots + config.size
    state = method.begin(torch.arange(rows), [layout] * rows, columns).num_bytes
    with patch.object(backbone, "new_cache", new_cache), LiveBytes() as live:
        decode(backbone, ["a red cat"] * rows, range(rows), config, layout)
    law = 4 * rows * config.size * backbone.num_codes
    cache = max(each.num_bytes for each in made)  # the size of one token is asked for too
    return {
        "law_bytes": law,
        "state_bytes": state,
        "cache_bytes": cache,
        "peak_bytes": live.peak,
        "state_over_law": state / law,
        "peak_beside_cache_over_law": (live.peak - cache) / law,
    }


def memory_sweep(tiny: Backbone) -> dict[str, dict[str, Any]]:
    """`memory` in both lossless modes, one size varied at a time; vocabularies are those of the families."""
    found: dict[str, dict[str, Any]] = {}
    backbones = {"tiny": tiny} | {name: build_shrunken(name) for name in MEMORY["family"] if name != "tiny"}
    smallest = {"tiny": (32, 32), "chameleon": (32, 32), "janus": (64, 64), "emu3": (8, 8)}
    for name, sizes in MEMORY.items():
        for size in sizes:
            chosen = {"window": 32, "rows": 4, "family": "chameleon"} | {name: size}
            for mode in ("replay", "exact"):
                config = DecodingConfig(
                    "sjd2", chosen["window"], 1, mode, sampling=Sampling(guidance_scale=3.0)
                )
                family = chosen["family"]
                entry = memory(backbones[family], smallest[family], config, chosen["rows"])
                found.setdefault(f"{name}, {mode}", {})[str(size)] = entry
    return found


def pass_seconds(tokens: int, prefix: float, rows: int, utilisation: float) -> float:
    """Seconds of a captured pass of `tokens` tokens a row over `prefix` cached ones."""
    cache = rows * prefix * 2 * LAYERS * WIDTH
    operations = 2 * rows * tokens * (WEIGHTS + 2 * LAYERS * WIDTH * prefix)
    read = (2 * WEIGHTS + 2 * cache) / (BANDWIDTH * SHARE_OF_BANDWIDTH)
    return max(read * window_cost(tokens), operations / (PEAK * utilisation))


def window_cost(tokens: float) -> float:
    """Cost of a pass over that of one token, between the measured windows by straight lines."""
    return float(np.interp(tokens, list(MEASURED), list(MEASURED.values()))) / MEASURED[1]


def predictions(utilisation: float) -> dict[str, dict[str, float]]:
    """Speed-ups of a 7B model with guidance, from the published step compressions."""
    found = {}
    plain = pass_seconds(1, 1200, 2, utilisation)
    for name, (window, num_levels, steps, published) in PAPER.items():
        # the paper feeds its timestep tokens in every pass; ours are computed once
        fed = pass_seconds(window + num_levels, 1200, 2, utilisation)
        found[name] = {
            "step_compression": steps,
            "pass_cost": fed / plain,
            "speedup": steps * plain / fed,
            "published_pass_cost": steps / published,
            "published_speedup": published,
        }
    return found


@torch.inference_mode()
def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--weights", default="weights/tiny")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--utilisation", type=float, default=0.6, help="share of the peak that matmuls reach")
    options = parser.parse_args()
    backbone = load_backbone("chameleon", options.weights, "trunk").eval()
    passes = {
        (name, size): a_pass(backbone, **{**BASE, name: size})
        for name, sizes in PASSES.items()
        for size in sizes
    }
    base = {"window": 32, "vocabulary": 512, "levels": 2, "rows": 1}
    work = {
        (name, size): own_work(**{**base, name: size}) for name, sizes in OWN_WORK.items() for size in sizes
    }
    measured = {"pass": sweep(passes, options.repeats), "own work": sweep(work, options.repeats)}
    table = Table("part", "varied", "size: relative cost", "exponent")
    for part, entries in measured.items():
        for name, entry in entries.items():
            first = next(iter(entry["seconds"].values()))
            costs = "  ".join(f"{size}: {value / first:.2f}" for size, value in entry["seconds"].items())
            table.add_row(part, name, costs, f"{entry['exponent']:.2f}")
    Console().print(table)
    counted = memory_sweep(backbone)
    table = Table(
        "memory, varied", "size: state, peak beside the cache; in units of batch x window x codes x 4 bytes"
    )
    for name, entries in counted.items():
        parts = (
            f"{size}: {entry['state_over_law']:.2f}, {entry['peak_beside_cache_over_law']:.1f}"
            for size, entry in entries.items()
        )
        table.add_row(name, "   ".join(parts))
    Console().print(table)
    predicted = predictions(options.utilisation)
    table = Table("7B, A100", *next(iter(predicted.values())))
    for name, row in predicted.items():
        table.add_row(name, *(f"{value:.2f}" for value in row.values()))
    Console().print(table)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({**measured, "memory": counted, "predicted": predicted}, indent=2))


if __name__ == "__main__":
    main()
