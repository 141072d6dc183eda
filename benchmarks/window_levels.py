"""Step compression and wall clock of every acceptance mode over window length and noise levels.

    .venv/bin/python benchmarks/window_levels.py --json outputs/window_levels.json

One interleaved run: each prompt is decoded by every setting in turn, so that drift of the machine hits all
alike. Replay settings must give autoregression's tokens; the share that does is part of the result.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.shipped import shipped_pixels, shipped_prompts
from sjd2_lightning.decoding import DecodingConfig, Sampling, decode
from sjd2_lightning.metrics.bootstrap import ratio_of_totals
from sjd2_lightning.metrics.efficiency import timed
from sjd2_lightning.models.registry import load_backbone

MODES = {
    "sjd": DecodingConfig("sjd", acceptance="exact", refiner="resample"),
    "mc_sjd": DecodingConfig("mc_sjd", acceptance="exact"),
    "sjd2_exact": DecodingConfig("sjd2", acceptance="exact"),
    "sjd2_replay": DecodingConfig("sjd2", acceptance="replay"),
    "sjd2_paper": DecodingConfig("sjd2", acceptance="paper", refiner="keep"),
}


@dataclass
class Cell:
    """Measurements of one setting, an entry a prompt."""

    config: DecodingConfig
    nfe: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    equal_to_ar: list[bool] = field(default_factory=list)


def settings(options: argparse.Namespace, sampling: Sampling) -> Iterator[tuple[str, DecodingConfig]]:
    """Names and settings; modes without noise have no levels."""
    for mode in options.modes:
        for window in options.windows:
            for num_levels in options.levels if mode.startswith("sjd2") else [0]:
                config = replace(MODES[mode], window=window, num_levels=num_levels, sampling=sampling)
                yield f"{mode} w{window} l{num_levels}", config


@torch.inference_mode()
def measure(options: argparse.Namespace) -> tuple[Cell, dict[str, Cell]]:
    """Decodes all prompts by autoregression and by every setting."""
    backbone = load_backbone("chameleon", options.weights, options.trunk).eval()
    layout = backbone.layout(shipped_pixels(), shipped_pixels())
    sampling = Sampling(options.temperature, guidance_scale=options.guidance_scale)
    baseline = Cell(DecodingConfig("ar", window=1, sampling=sampling))
    cells = {name: Cell(config) for name, config in settings(options, sampling)}
    prompts = shipped_prompts(options.num_prompts)
    decode(backbone, [prompts[0].prompt], [prompts[0].seed], baseline.config, layout)  # warm-up
    for item in track(prompts, "prompts"):
        ar = None
        for cell in [baseline, *cells.values()]:
            job = (backbone, [item.prompt], [item.seed], cell.config, layout)
            output, seconds = timed(lambda job=job: decode(*job))
            ar = output if ar is None else ar
            cell.nfe.append(int(output.stats.nfe[0]))
            cell.seconds.append(seconds)
            cell.equal_to_ar.append(torch.equal(output.slot_ids, ar.slot_ids))
    return baseline, cells


def summary(baseline: Cell, cell: Cell) -> dict[str, object]:
    """Means and intervals of one setting."""
    steps = ratio_of_totals("step_compression", baseline.nfe, cell.nfe, "slots / forward passes")
    speed = ratio_of_totals("speedup", baseline.seconds, cell.seconds, "wall clock, paired")
    return {
        "config": asdict(cell.config),
        "lossless": cell.config.lossless,
        "nfe": float(np.mean(cell.nfe)),
        "step_compression": steps.value,
        "step_compression_interval": steps.interval,
        "speedup": speed.value,
        "speedup_interval": speed.interval,
        "equal_to_ar": float(np.mean(cell.equal_to_ar)),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--weights", default="weights/tiny")
    parser.add_argument("--trunk", default="trunk")
    parser.add_argument("--num-prompts", type=int, default=16)
    parser.add_argument("--windows", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--levels", type=int, nargs="+", default=[0, 1, 2, 4, 8])
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=list(MODES))
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--guidance-scale", type=float, default=3.0)
    options = parser.parse_args()
    baseline, cells = measure(options)
    results = {name: summary(baseline, cell) for name, cell in cells.items()}
    table = Table("setting", "nfe", "step compression", "speedup", "equal to ar", "lossless")
    for name, row in sorted(results.items(), key=lambda entry: -entry[1]["step_compression"]):
        numbers = [f"{row[key]:.2f}" for key in ("nfe", "step_compression", "speedup", "equal_to_ar")]
        table.add_row(name, *numbers, str(row["lossless"]))
    Console().print(table)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        facts = {
            "num_prompts": options.num_prompts,
            "threads": torch.get_num_threads(),
            "weights": f"{options.weights}/{options.trunk}",
            "temperature": options.temperature,
            "guidance_scale": options.guidance_scale,
        }
        facts["ar_seconds"] = float(np.mean(baseline.seconds))
        options.json.write_text(json.dumps({"settings": results, **facts}, indent=2))


if __name__ == "__main__":
    main()
