"""Who reads what: exact, equal and complete for any numbers of shards, ranks and workers."""

from __future__ import annotations

import itertools

import pytest

from sjd2_lightning.data import order as plan


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("num_workers", [1, 2, 5])
@pytest.mark.parametrize("train", [True, False])
def test_every_position_has_one_reader(world_size: int, num_workers: int, train: bool) -> None:
    num_samples, batch_size = 37, 4
    split = plan.full_batches if train else plan.even_batches
    read, lengths = [], set()
    for rank in range(world_size):
        batches = split(num_samples, batch_size, rank, world_size)
        lengths.add(len(batches))
        for worker in range(num_workers):
            mine = plan.worker_batches(batches, worker, num_workers, contiguous=train)
            assert len(mine) == plan.num_done(worker, num_workers, len(batches))
            assert all(0 < stop - start <= batch_size for start, stop in mine)
            read += [position for start, stop in mine for position in range(start, stop)]
    assert len(lengths) == 1, "ranks disagree about the length of the epoch"
    assert len(read) == len(set(read))
    left_out = num_samples % (batch_size * world_size) if train else 0
    assert len(read) == num_samples - left_out


@pytest.mark.parametrize("offset", [0, 3, 12])
def test_segments_cover_a_line_once_and_wrap(offset: int) -> None:
    counts, order = [5, 2, 0, 6], [3, 0, 2, 1]
    line = [(shard, i) for shard in order for i in range(counts[shard])]
    found = plan.segments([(0, 4), (4, 7), (9, 13)], order, counts, offset)
    read = [(segment.shard, i) for segment in found for i in range(segment.start, segment.stop)]
    wanted = [line[(p + offset) % 13] for p in itertools.chain(range(7), range(9, 13))]
    assert read == wanted


def test_neighbouring_stretches_become_one_segment() -> None:
    assert plan.segments([(0, 4), (4, 8)], [0], [9], 0) == [plan.Segment(0, 0, 8)]


def test_too_few_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="7 training samples do not fill one batch of 4 on each of 2 ranks"):
        plan.full_batches(7, 4, 0, 2)
    with pytest.raises(ValueError, match=r"raise the batch size"):
        plan.even_batches(3, 1, 0, 2)
