"""A tokenizer that needs no weights, and small folders of shards."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sjd2_lightning.data.index import ShardIndex, ShardMeta
from sjd2_lightning.data.writing import SampleFields, write_shard


@dataclass
class GreyTokenizer:
    """Codes are the mean grey of 4x4 patches."""

    num_codes: int = 16
    identity: str = "grey-1"
    downsample: int = 4
    num_encoded: int = 0

    def encode(self, images: Tensor) -> Tensor:
        self.num_encoded += len(images)
        return (F.avg_pool2d(images.mean(1, keepdim=True), 4)[:, 0] * (self.num_codes - 1)).round().long()

    def decode(self, image_ids: Tensor) -> Tensor:
        grey = image_ids[:, None].float() / (self.num_codes - 1)
        return F.interpolate(grey, scale_factor=4).expand(-1, 3, -1, -1)


def write_shards(
    samples: Iterable[SampleFields], folder: Path, samples_per_shard: int | Sequence[int], meta: ShardMeta
) -> ShardIndex:
    """A folder of shards from samples as they are; `samples_per_shard` may be a list for uneven ones."""
    folder.mkdir(parents=True, exist_ok=True)
    waiting, shards = iter(samples), []
    sizes = itertools.repeat(samples_per_shard) if isinstance(samples_per_shard, int) else samples_per_shard
    for number, size in enumerate(sizes):
        if not (chunk := list(itertools.islice(waiting, size))):
            break
        shards.append(write_shard(folder / f"{meta.split}-{number:05d}.tar", chunk, meta))
    index = ShardIndex(folder, meta, tuple(shards))
    index.save(folder)
    return index


@pytest.fixture
def grey_tokenizer() -> GreyTokenizer:
    return GreyTokenizer()


WriteCodes = Callable[..., ShardIndex]


@pytest.fixture
def write_codes(tmp_path: Path) -> WriteCodes:
    """Writes code samples to data_dir/codes/split; sample i has key k<i> and codes made from i."""

    def write(
        num_samples: int = 50,
        samples_per_shard: int | Sequence[int] = 8,
        split: str = "train",
        data_dir: Path = tmp_path,
    ) -> ShardIndex:
        meta = ShardMeta("codes", split, "made up", 2, 3, "nobody", "hash", 512, "tok")
        samples = (
            {
                "key": f"k{i}",
                "caption": f"picture {i}",
                "concept": "thing",
                "view": 0,
                "size": (8, 12),
                "image_ids": np.full((2, 3), i) + np.arange(6).reshape(2, 3),
            }
            for i in range(num_samples)
        )
        return write_shards(samples, data_dir / "codes" / split, samples_per_shard, meta)

    return write


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
