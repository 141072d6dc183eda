"""Counts which codes stand side by side: the table that corrects drafts.

One pass over the training shards; nothing is trained. Of large vocabularies
only the strongest directions are kept: rank 512 is an eighth of the numbers of
a table of 8,192 codes. The result is for methods.sjd2.pairs.table.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from sjd2_lightning.data.index import ShardIndex
from sjd2_lightning.data.reading import read_all
from sjd2_lightning.decoding.variants.pairs import PairTable
from sjd2_lightning.run.stages import counted, speak, stage


def count_pairs(folder: Path) -> Tensor:
    """(K, K) float64: how often code k stands right of code a in a row of an image, by a and k.

    Raises:
        ValueError: the folder holds no shards of codes, or damaged ones.
    """
    index = ShardIndex.load(folder)
    index.check_codes()
    num_codes = index.meta.num_codes
    assert num_codes is not None  # of codes it is known
    counts = torch.zeros(num_codes * num_codes, dtype=torch.float64)
    with counted("counting pairs", index.num_samples, "images") as advance:
        for sample in read_all(folder):
            pairs = (sample.image_ids[:, :-1].long() * num_codes + sample.image_ids[:, 1:].long()).flatten()
            counts.index_add_(0, pairs, torch.ones(len(pairs), dtype=counts.dtype))
            advance(1)
    return counts.view(num_codes, num_codes)


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="sjd2 pairs",
        description=__doc__,
        epilog="example:\n  sjd2 pairs data/scenes_demo/codes/train outputs/pairs.safetensors",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shards", type=Path, help="folder of training shards of codes")
    parser.add_argument("out", type=Path, help="safetensors file to write")
    parser.add_argument(
        "--rank", type=int, default=512, help="directions that are kept (default: %(default)s)"
    )
    parser.add_argument(
        "--prior", type=float, default=20.0, help="pairs that say nothing, a code (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    speak()
    try:
        counts = count_pairs(options.shards)
    except ValueError as error:
        parser.exit(1, f"{error}\n")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with stage("making the table"):
        PairTable.of_counts(counts, options.rank, options.prior).save(options.out)
    print(f"{options.out}: {int(counts.sum()):,} pairs; decode with decoding.pairs.table={options.out}")


if __name__ == "__main__":
    main()
