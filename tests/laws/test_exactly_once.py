"""Every sample once an epoch, whatever the numbers of ranks and workers and the sizes of shards."""

from __future__ import annotations

import itertools
from collections import Counter
from types import SimpleNamespace

import pytest

from sjd2_lightning.data import loader
from sjd2_lightning.data.index import ShardIndex
from sjd2_lightning.data.loader import CodeDataset, CodeLoader
from tests.tools.shards import WriteCodes

UNEVEN = [1, 17, 2, 9, 30, 1]  # 60 samples; fewer shards than ranks times workers


@pytest.fixture
def shards(write_codes: WriteCodes) -> ShardIndex:
    return write_codes(sum(UNEVEN), UNEVEN)


def epoch(
    index: ShardIndex, rank: int, world_size: int, num_workers: int, **options: object
) -> list[list[str]]:
    """Batches of a rank, as its loader would take them from that many workers, here without processes."""
    data = CodeDataset(index, rank=rank, world_size=world_size, shuffle_buffer=8, **options)  # type: ignore[arg-type]
    if not num_workers:
        return [batch.keys for batch, _ in data if batch]
    streams = []
    for worker in range(num_workers):
        info = SimpleNamespace(id=worker, num_workers=num_workers)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loader, "get_worker_info", lambda info=info: info)
            streams.append([batch.keys for batch, _ in data if batch])
    turns = itertools.chain.from_iterable(itertools.zip_longest(*streams))
    return [keys for keys in turns if keys is not None]


@pytest.mark.parametrize("batch_size", [4, 7])  # 60 divides by 4 x ranks, and leaves a remainder at 7
@pytest.mark.parametrize("num_workers", [0, 2, 3])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_once(shards: ShardIndex, world_size: int, num_workers: int, batch_size: int) -> None:
    everything = Counter(f"k{i}" for i in range(60))
    for train, drop_last in ((True, False), (False, False), (True, True)):
        options = {"batch_size": batch_size, "train": train, "drop_last": drop_last}
        ranks = [epoch(shards, rank, world_size, num_workers, **options) for rank in range(world_size)]
        assert len({len(batches) for batches in ranks}) == 1, "ranks with fewer batches hang the others"
        read = Counter(key for batches in ranks for keys in batches for key in keys)
        left_out = 60 % (batch_size * world_size) if drop_last else 0
        assert max(read.values()) == 1
        assert read.keys() <= everything.keys()
        assert read.total() == 60 - left_out
        sizes = {len(keys) for batches in ranks for keys in batches}
        assert sizes == {batch_size} if drop_last else max(sizes) <= batch_size


@pytest.mark.parametrize(("world_size", "num_workers"), [(2, 3), (3, 2)])
def test_once_with_real_workers(shards: ShardIndex, world_size: int, num_workers: int) -> None:
    read: Counter[str] = Counter()
    for rank in range(world_size):
        data = CodeDataset(
            shards,
            batch_size=7,
            train=True,
            drop_last=False,
            rank=rank,
            world_size=world_size,
            shuffle_buffer=8,
        )
        taken = [batch.keys for batch in CodeLoader(data, num_workers)]
        simulated = epoch(shards, rank, world_size, num_workers, batch_size=7, train=True, drop_last=False)
        assert taken == simulated
        read.update(key for keys in taken for key in keys)
    assert read == Counter(f"k{i}" for i in range(60))


def test_what_an_epoch_leaves_out_changes(shards: ShardIndex) -> None:
    batches = CodeLoader(CodeDataset(shards, batch_size=7, train=True))
    left_out = [
        {f"k{i}" for i in range(60)} - {key for batch in batches for key in batch.keys} for _ in range(3)
    ]
    assert all(len(keys) == 4 for keys in left_out)
    assert left_out[0] != left_out[1] != left_out[2]
