"""What the loop does beside the trunk with large codebooks: time, memory, bytes, and that nothing is sorted.

    .venv/bin/python benchmarks/vocabulary.py --json outputs/vocabulary.json

An iteration's own work, from logits of both sides of guidance to the windows moved on, for windows over
16,384 codes (GLM-Image, LlamaGen, Janus) and 64,000 (SimpleAR), one image, in replay and exact mode. Settings
are interleaved and the least of the repeats is taken. Bytes are those of inputs and results of all tensor
operations that are no views: what moves where no two are fused. Beside them stands what they would take of a
pass on a GPU: both by their bytes alone, on a card of 4.3 TB/s of which a pass reaches 0.48 (docs/gpu.md).
That is arithmetic.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.memory import LiveBytes
from sjd2_lightning.decoding import DecodingConfig, Sampling
from sjd2_lightning.decoding.law import guided, log_law
from sjd2_lightning.decoding.method import Method
from sjd2_lightning.decoding.rules import Scores, judged
from sjd2_lightning.decoding.window import Window
from sjd2_lightning.metrics.efficiency import timed
from sjd2_lightning.models.backbone import ImageLayout

CODES, WINDOWS, MODES = (16384, 64000), (16, 32, 64, 96), ("replay", "exact")
SORTING = ("sort", "argsort", "topk", "kthvalue", "msort")
GUIDED = Sampling(guidance_scale=3.0)
_CARD, _SHARE = 4.3e12, 0.48  # bytes a second, and the share of them that a pass reaches
# name: codes, bytes that a pass reads in bfloat16: layers (as print_plan=true says), the head's rows of codes
MODELS = {
    "SimpleAR 0.5B": (64000, 2 * (358e6 + 64000 * 896)),
    "SimpleAR 1.5B": (64000, 2 * (1310e6 + 64000 * 1536)),
    "LlamaGen XL": (16384, 2 * (708e6 + 16384 * 1280)),
    "GLM-Image": (16384, 2 * (8159e6 + 16384 * 4096)),
}


class Traffic(TorchDispatchMode):
    """Names of the operations inside the block; bytes of inputs and results of those that are no views."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self.names.append(func.overloadpacket.__name__)
        given = [leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, Tensor)]
        made = [leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor)]
        places = {leaf.untyped_storage().data_ptr() for leaf in given}
        in_place = func.overloadpacket.__name__.endswith("_")
        if in_place or any(leaf.untyped_storage().data_ptr() not in places for leaf in made):
            self.num_bytes += sum(leaf.numel() * leaf.element_size() for leaf in (*given, *made))
        return found


def own_work(codes: int, window: int, mode: str, sampling: Sampling = GUIDED) -> Callable[[], None]:
    """An iteration's work beside the trunk, on random logits; each call does the same.

    Args:
        codes: size of the codebook.
        window: slots drafted ahead.
        mode: acceptance, "replay" or "exact".
        sampling: what turns logits into laws.
    """
    config = DecodingConfig("sjd2", window, 2, mode, sampling=sampling)  # type: ignore[arg-type]
    layout = ImageLayout(16, 16, (-1,) * 256, (256, 256))
    method = Method(config, torch.randn(codes, 64), codes)
    state = method.begin(torch.arange(1), [layout], layout.num_slots + window)
    logits = torch.randn(2, window, codes)
    none_settled, stays = torch.zeros(1, window, dtype=torch.bool), torch.zeros(1, dtype=torch.long)

    def call() -> None:
        found = Scores(log_law(guided(logits, sampling.guidance_scale), sampling))
        view = Window(method.source, state)
        slots = view.slots()
        view.note_lawless(slots, found)
        verdict = judged(method.one_pass.rule, slots, found)
        view.renew(slots, method.redraft(slots, verdict, found, none_settled), found)
        view.advance(stays, stays, verdict, found)
        state.iteration.zero_()

    return call


def measure(codes: tuple[int, ...], windows: tuple[int, ...], repeats: int) -> list[dict[str, Any]]:
    """One entry for each mode, codebook and window.

    Raises:
        RuntimeError: something was sorted, though neither top-k nor top-p asks for it.
    """
    cells = [(mode, size, window) for mode in MODES for size in codes for window in windows]
    calls = {cell: own_work(cell[1], cell[2], cell[0]) for cell in cells}
    seconds = dict.fromkeys(cells, np.inf)
    for _ in track(range(repeats), "repeats"):
        for cell, call in calls.items():
            seconds[cell] = min(seconds[cell], timed(call)[1])
    found = []
    for (mode, size, window), call in calls.items():
        with LiveBytes() as live:
            call()
        with Traffic() as traffic:
            call()
        if sorting := sorted({name for name in traffic.names if name in SORTING}):
            raise RuntimeError(f"{mode}, {size} codes, window {window}: {', '.join(sorting)} was run")
        law = 4 * window * size
        shares = {
            name: traffic.num_bytes / (traffic.num_bytes + read / _SHARE)
            for name, (of, read) in MODELS.items()
            if of == size
        }
        found.append(
            {
                "mode": mode,
                "codes": size,
                "window": window,
                "seconds": seconds[mode, size, window],
                "peak_bytes": live.peak,
                "peak_over_law": live.peak / law,
                "moved_bytes": traffic.num_bytes,
                "moved_over_law": traffic.num_bytes / law,
                "gpu_ms_by_bytes": 1000 * traffic.num_bytes / _CARD,
                "gpu_share_by_bytes": shares,
                "operations": len(traffic.names),
            }
        )
    return found


@torch.inference_mode()
def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--codes", type=int, nargs="+", default=CODES)
    parser.add_argument("--windows", type=int, nargs="+", default=WINDOWS)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args(arguments)
    found = measure(tuple(options.codes), tuple(options.windows), options.repeats)
    columns = ("mode", "codes", "window", "ms here", "peak, laws", "moved, laws", "GPU ms", "its share, %")
    table = Table(*columns)
    for entry in found:
        shares = " / ".join(f"{100 * share:.0f}" for share in entry["gpu_share_by_bytes"].values())
        table.add_row(
            entry["mode"],
            f"{entry['codes']:,}",
            str(entry["window"]),
            f"{1000 * entry['seconds']:.0f}",
            f"{entry['peak_over_law']:.1f}",
            f"{entry['moved_over_law']:.0f}",
            f"{entry['gpu_ms_by_bytes']:.3f}",
            shares,
        )
    Console().print(table, f"shares are those of {', '.join(MODELS)} with as many codes, by bytes alone")
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
