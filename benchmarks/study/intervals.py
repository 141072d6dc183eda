"""How often bootstrap intervals hold what they promise, on synthetic data whose truth is known.

python benchmarks/study/intervals.py --trials 1000
"""

from __future__ import annotations

import argparse
import json
import math
from types import SimpleNamespace

import numpy as np

from sjd2_lightning.evaluation.results import speedup
from sjd2_lightning.metrics.bootstrap import mean_result, paired_difference, ratio_of_totals


def mean_covers(rng: np.random.Generator, num: int, seed: int) -> bool:
    """A skewed law of mean 1."""
    low, high = mean_result("m", rng.exponential(size=num), "p", 400, seed).interval or (0, 0)
    return low <= 1 <= high


def false_alarm(rng: np.random.Generator, num: int, seed: int) -> bool:
    """Two methods of equal law on shared prompts: does the interval of their difference leave out 0?"""
    shared = rng.exponential(size=num)
    first, second = (shared + 0.3 * rng.exponential(size=num) for _ in range(2))
    low, high = paired_difference("d", first, second, "p", 400, seed).interval or (0, 0)
    return not low <= 0 <= high


def ratio_covers(rng: np.random.Generator, num: int, seed: int) -> bool:
    """Totals in the ratio 3, with prompts of different length."""
    prompt = rng.uniform(0.5, 2.0, num)
    above, below = (scale * prompt * rng.lognormal(0, 0.1, num) for scale in (3, 1))
    low, high = ratio_of_totals("r", above, below, "p", 400, seed).interval or (0, 0)
    return low <= 3 <= high


def speedup_covers(rng: np.random.Generator, num: int, seed: int) -> bool:
    """Median ratio 2 of paired batches, a tenth of them disturbed."""
    noise = rng.lognormal(0, 0.1, num) * np.where(rng.uniform(size=num) < 0.1, 3, 1)
    rows = [
        [SimpleNamespace(batch=i, process="x", seconds=s) for i, s in enumerate(seconds)]
        for seconds in (2 * rng.lognormal(0, 0.1, num) * noise, noise)
    ]
    low, high = speedup(rows[0], rows[1], 400, seed).interval or (0, 0)  # type: ignore[arg-type]
    return low <= 2 <= high


CHECKS = {
    "mean, covers": mean_covers,
    "paired difference, false alarm": false_alarm,
    "ratio of totals, covers": ratio_covers,
    "speedup, covers": speedup_covers,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--sizes", type=int, nargs="+", default=[24, 64, 200])
    arguments = parser.parse_args()
    for name, check in CHECKS.items():
        for num in arguments.sizes:
            rng = np.random.default_rng(num)
            share = float(np.mean([check(rng, num, trial) for trial in range(arguments.trials)]))
            error = math.sqrt(share * (1 - share) / arguments.trials)
            line = {"check": name, "N": num, "share": round(share, 4), "standard_error": round(error, 4)}
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
