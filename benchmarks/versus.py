"""Images a second of two checkouts of this package, decoding the same prompts in turn.

    git worktree add ../before COMMIT
    .venv/bin/python benchmarks/versus.py ../before --json outputs/versus.json

Each checkout has a process of its own, which loads the shipped model once. A repeat decodes the same batch by
both, in changing order, so that drift of the machine hits both; the first one is not counted. A pair of
processes can differ for as long as it lives, whatever it runs, so every round starts new ones, in changing
order. Tokens and passes must be the same. Ratios are of this checkout over the other one: the median
of a round's repeats, the median and range of these over rounds, and that of the fastest repeats, since other
load only ever adds time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from sjd2_lightning.decoding import DecodingConfig, Sampling, decode
from sjd2_lightning.models.registry import load_backbone

HERE = Path(__file__).resolve().parents[1]
SAMPLING = Sampling(temperature=0.7, guidance_scale=2.0)
METHODS = {
    "ar": DecodingConfig("ar", window=1, sampling=SAMPLING),
    "sjd2": DecodingConfig("sjd2", window=32, num_levels=1, sampling=SAMPLING),
    "sjd2_exact": DecodingConfig("sjd2", window=32, num_levels=1, acceptance="exact", sampling=SAMPLING),
}
PROMPTS = ("red heart", "police car", "blue cat", "green apple")


def serve(weights: Path, pixels: int) -> None:
    """Decodes what standard input asks for, a line "method batch" each, and prints a JSON object each."""
    backbone = load_backbone("chameleon", weights, "trunk").eval()
    layout = backbone.layout(pixels, pixels)
    for line in sys.stdin:
        name, batch = line.split()
        prompts = PROMPTS[: int(batch)]
        start = time.perf_counter()
        output = decode(backbone, prompts, range(len(prompts)), METHODS[name], layout)
        seconds = time.perf_counter() - start
        found = {"seconds": seconds, "nfe": output.stats.nfe.tolist(), "ids": output.slot_ids.tolist()}
        print(json.dumps(found), flush=True)


class Checkout:
    """A process that decodes with the package of a checkout; weights must be of a kind that both can read."""

    def __init__(self, folder: Path, weights: Path, pixels: int) -> None:
        # this file serves in both: of the other package it needs the public names alone
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve", "--weights", str(weights), "--pixels", str(pixels)],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(folder)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def close(self) -> None:
        """Ends the process."""
        self.process.communicate()

    def decode(self, name: str, batch: int) -> dict[str, Any]:
        """Seconds, passes and tokens of one decoding."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{name} {batch}\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


def compared(sides: dict[str, Checkout], name: str, batch: int, num_repeats: int) -> dict[str, Any]:
    """One round of a method: seconds by side, and whether tokens and passes were the same throughout."""
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    same = True
    for repeat in range(num_repeats + 1):
        order = list(sides)[:: 1 if repeat % 2 else -1]
        seen = {side: sides[side].decode(name, batch) for side in order}
        taken = {side: seen[side].pop("seconds") for side in order}
        same &= seen["this"] == seen["other"]
        if repeat:
            for side in order:
                seconds[side].append(taken[side])
    return {"same_tokens_and_passes": same, "seconds": seconds}


def summed_up(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """The ratios of a method over all rounds."""
    seconds = [each["seconds"] for each in rounds]
    ratios = [float(np.median(np.divide(each["other"], each["this"]))) for each in seconds]
    fastest = {side: min(min(each[side]) for each in seconds) for side in ("other", "this")}
    return {
        "same_tokens_and_passes": all(each["same_tokens_and_passes"] for each in rounds),
        "median_ratio": float(np.median(ratios)),
        "range": [min(ratios), max(ratios)],
        "fastest_ratio": fastest["other"] / fastest["this"],
        "seconds": seconds,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("other", type=Path, nargs="?", help="folder of the other checkout")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=["ar", "sjd2"])
    parser.add_argument("--batch", type=int, default=1, choices=range(1, len(PROMPTS) + 1))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--weights", type=Path, default=HERE / "weights/tiny", help="folder of the model")
    parser.add_argument("--pixels", type=int, default=128, help="side of the images")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.weights, options.pixels)
        return
    if options.other is None or not (options.other / "sjd2_lightning").is_dir():
        parser.error(f"{options.other}: is no checkout of this package; make one by `git worktree add`")
    folders = {"other": options.other.resolve(), "this": HERE}
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in options.methods}
    for number in track(range(options.rounds), "rounds"):
        order = list(folders)[:: 1 if number % 2 else -1]
        sides = {side: Checkout(folders[side], options.weights.resolve(), options.pixels) for side in order}
        for name in options.methods:
            rows[name].append(compared(sides, name, options.batch, options.repeats))
        for side in sides.values():
            side.close()
    found = {name: summed_up(rows[name]) for name in options.methods}
    table = Table(
        "method", "same tokens and passes", "images a second over the other's", "range", "of the fastest"
    )
    for name, row in found.items():
        ratios = [f"{value:.3f}" for value in (row["median_ratio"], *row["range"], row["fastest_ratio"])]
        table.add_row(name, str(row["same_tokens_and_passes"]), ratios[0], ", ".join(ratios[1:3]), ratios[3])
    Console().print(table)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
