"""How fast the loader reads shards, against plain reading of the same tar files and against writing them.

    .venv/bin/python benchmarks/data.py --json outputs/data.json

Made-up codes of a given size are written into shards (in a temporary folder, or --folder), then read in
interleaved rounds: the bytes alone, Python's `tarfile`, WebDataset with its default decoding (which checks
nothing), our strict reading without shuffle, and whole loaders with several numbers of workers. All read the
same files, which are in the page cache after the first round. Training waits for data only where it consumes
more samples a second than the loader gives.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import webdataset as wds
from rich.console import Console
from rich.table import Table

from sjd2_lightning.data.index import INDEX_NAME, ShardIndex, ShardMeta
from sjd2_lightning.data.loader import CodeDataset, CodeLoader
from sjd2_lightning.data.reading import read_all
from sjd2_lightning.data.writing import write_shard


def write(folder: Path, side: int, num_samples: int, per_shard: int) -> ShardIndex:
    """Shards of random codes."""
    meta = ShardMeta("codes", "train", "benchmark", side, side, "none", "hash", 8192, "tokenizer")
    rng, shards = np.random.default_rng(0), []
    for first in range(0, num_samples, per_shard):
        samples = (
            {
                "key": f"k{number}",
                "caption": f"a caption of usual length, written for sample number {number}",
                "size": [16 * side, 16 * side],
                "image_ids": rng.integers(0, 8192, (side, side)),
            }
            for number in range(first, min(first + per_shard, num_samples))
        )
        shards.append(write_shard(folder / f"train-{first // per_shard:05d}.tar", samples, meta))
    index = ShardIndex(folder, meta, tuple(shards))
    index.save(folder)
    return index


def read_bytes(index: ShardIndex) -> int:
    """The files' bytes, nothing parsed."""
    for shard in index.shards:
        with (index.folder / shard.name).open("rb") as stream:
            while stream.read(2**20):
                pass
    return index.num_samples


def read_tarfile(index: ShardIndex) -> int:
    """Every member by `tarfile`, nothing decoded."""
    count = 0
    for shard in index.shards:
        with (index.folder / shard.name).open("rb") as stream, tarfile.open(fileobj=stream, mode="r|") as tar:
            for member in tar:
                tar.extractfile(member).read()  # type: ignore[union-attr]
                count += 1
    return count // 3


def read_webdataset(index: ShardIndex) -> int:
    """WebDataset's own pipeline with its default decoding."""
    urls = [str(index.folder / shard.name) for shard in index.shards]
    return sum(1 for _ in wds.WebDataset(urls, shardshuffle=False).decode())


def read_strict(index: ShardIndex) -> int:
    """Every sample checked, in order."""
    return sum(1 for _ in read_all(index.folder))


def load(index: ShardIndex, num_workers: int, batch_size: int) -> int:
    """An epoch of the training loader: checked, shuffled, in batches."""
    data = CodeDataset(index, batch_size=batch_size, train=True, shuffle_buffer=2048)
    return sum(len(batch.keys) for batch in CodeLoader(data, num_workers))


def measure(jobs: dict[str, Callable[[], int]], rounds: int) -> dict[str, list[float]]:
    """Samples a second of every job, a number a round; the first round fills the page cache."""
    rates: dict[str, list[float]] = {name: [] for name in jobs}
    for number in range(rounds + 1):
        for name, job in jobs.items():
            start = time.perf_counter()
            count = job()
            if number:
                rates[name].append(count / (time.perf_counter() - start))
    return rates


def main() -> None:
    """Command line: measure, print and write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, default=Path("outputs/data.json"), help="(default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="where shards go or are (default: a temporary folder)")
    parser.add_argument("--side", type=int, default=48, help="codes on a side: 48 is 768 pixels at 16 a code")
    parser.add_argument("--num-samples", type=int, default=4096, help="(default: %(default)s)")
    parser.add_argument("--per-shard", type=int, default=1024, help="(default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, help="(default: %(default)s)")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2], help="(default: 0 2)")
    parser.add_argument("--rounds", type=int, default=5, help="(default: %(default)s)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        start, written = time.perf_counter(), None
        if (folder / INDEX_NAME).is_file():
            index = ShardIndex.load(folder)
        else:
            index = write(folder, options.side, options.num_samples, options.per_shard)
            written = index.num_samples / (time.perf_counter() - start)
        jobs: dict[str, Callable[[], int]] = {
            "bytes": lambda: read_bytes(index),
            "tarfile": lambda: read_tarfile(index),
            "webdataset": lambda: read_webdataset(index),
            "strict": lambda: read_strict(index),
        }
        for workers in options.workers:
            jobs[f"loader, {workers} workers"] = lambda workers=workers: load(  # type: ignore[misc]
                index, workers, options.batch_size
            )
        rates = measure(jobs, options.rounds)
    report(rates, written, index, options)


def report(
    rates: dict[str, list[float]], written: float | None, index: ShardIndex, options: argparse.Namespace
) -> None:
    """Prints the table and writes the JSON."""
    size = sum(shard.num_bytes for shard in index.shards) / index.num_samples
    base = statistics.median(rates["tarfile"])
    table = Table("reading", "samples/s", "range", "MB/s", "of tarfile", title="loader throughput")
    rows = {}
    for name, values in rates.items():
        median = statistics.median(values)
        rows[name] = {"samples_per_second": median, "rounds": values, "of_tarfile": median / base}
        spread = f"{min(values):,.0f} - {max(values):,.0f}"
        table.add_row(name, f"{median:,.0f}", spread, f"{median * size / 1e6:,.0f}", f"{median / base:.2f}")
    console = Console(soft_wrap=True)
    console.print(table)
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    machine = {"cores": os.cpu_count(), "machine": platform.machine(), "load": os.getloadavg()[0]}
    content = {
        "settings": {name: str(value) for name, value in vars(options).items()},
        "bytes_per_sample": size,
        "written_per_second": written,
        "reading": rows,
        "machine": machine,
        "versions": versions,
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(content, indent=2) + "\n")
    console.print(
        f"{options.json}: {index.num_samples} samples of {size:,.0f} bytes on {os.cpu_count()} cores"
    )


if __name__ == "__main__":
    main()
