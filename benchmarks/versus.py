"""Images a second of two checkouts of this package, decoding the same prompts in turn.

    git worktree add ../before COMMIT
    .venv/bin/python benchmarks/versus.py ../before --json outputs/versus.json

Each checkout has a process of its own, which loads the shipped model once. A repeat decodes the same batch by
both, in changing order, so that drift of the machine hits both; the first one is not counted. Tokens and
passes must be the same. Ratios are of this checkout over the other one: the median over repeats with
quartiles, and that of the fastest repeats, since other load only ever adds time.
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


def serve() -> None:
    """Decodes what standard input asks for, a line "method batch" each, and prints a JSON object each."""
    backbone = load_backbone("chameleon", HERE / "weights/tiny", "trunk").eval()
    for line in sys.stdin:
        name, batch = line.split()
        prompts = PROMPTS[: int(batch)]
        start = time.perf_counter()
        output = decode(backbone, prompts, range(len(prompts)), METHODS[name], backbone.layout(64, 64))
        seconds = time.perf_counter() - start
        found = {"seconds": seconds, "nfe": output.stats.nfe.tolist(), "ids": output.slot_ids.tolist()}
        print(json.dumps(found), flush=True)


class Checkout:
    """A process that decodes with the package of a checkout."""

    def __init__(self, folder: Path) -> None:
        # this file serves in both: of the other package it needs the public names alone
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve"],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(folder)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def decode(self, name: str, batch: int) -> dict[str, Any]:
        """Seconds, passes and tokens of one decoding."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{name} {batch}\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("other", type=Path, nargs="?", help="folder of the other checkout")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=["ar", "sjd2"])
    parser.add_argument("--batch", type=int, default=1, choices=range(1, len(PROMPTS) + 1))
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve()
        return
    if options.other is None or not (options.other / "sjd2_lightning").is_dir():
        parser.error(f"{options.other}: is no checkout of this package; make one by `git worktree add`")
    sides = {"other": Checkout(options.other.resolve()), "this": Checkout(HERE)}
    found: dict[str, Any] = {}
    for name in options.methods:
        taken: dict[str, list[float]] = {"other": [], "this": []}
        same = True
        for repeat in track(range(options.repeats + 1), name):
            order = list(sides)[:: 1 if repeat % 2 else -1]
            seen = {side: sides[side].decode(name, options.batch) for side in order}
            seconds = {side: seen[side].pop("seconds") for side in order}
            same &= seen["this"] == seen["other"]
            if repeat:
                for side in order:
                    taken[side].append(seconds[side])
        ratios = np.array(taken["other"]) / np.array(taken["this"])
        found[name] = {
            "same_tokens_and_passes": same,
            "median_ratio": float(np.median(ratios)),
            "quartiles": np.quantile(ratios, [0.25, 0.75]).tolist(),
            "fastest_ratio": min(taken["other"]) / min(taken["this"]),
            "seconds": taken,
        }
    table = Table(
        "method", "same tokens and passes", "images a second over the other's", "quartiles", "of the fastest"
    )
    for name, row in found.items():
        low, high = row["quartiles"]
        table.add_row(
            name,
            str(row["same_tokens_and_passes"]),
            f"{row['median_ratio']:.3f}",
            f"{low:.3f}, {high:.3f}",
            f"{row['fastest_ratio']:.3f}",
        )
    Console().print(table)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
