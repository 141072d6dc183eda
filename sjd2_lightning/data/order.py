"""Which samples of an epoch go to which batch, rank and worker: plain arithmetic over positions.

An epoch is a line of positions 0..num_samples-1. Ranks take equal stretches of it, workers take stretches of
their rank's, and a stretch becomes segments of shards. So any number of shards serves any number of ranks
and workers, without loss or repetition.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple


class Segment(NamedTuple):
    """Samples start..stop-1 of shard number `shard`."""

    shard: int
    start: int
    stop: int


Stretch = tuple[int, int]  # positions start..stop-1


def full_batches(num_samples: int, batch_size: int, rank: int, world_size: int) -> list[Stretch]:
    """Full batches of one rank, equally many on every rank; the rest of the line is left out this epoch.

    Raises:
        ValueError: there is not one full batch for every rank.
    """
    num_batches = num_samples // (batch_size * world_size)
    if num_batches == 0:
        raise ValueError(
            f"{num_samples} training samples do not fill one batch of {batch_size} on each of "
            f"{world_size} ranks; lower data.batch_size or use more samples"
        )
    first = rank * num_batches * batch_size
    return [(first + i * batch_size, first + (i + 1) * batch_size) for i in range(num_batches)]


def even_batches(num_samples: int, batch_size: int, rank: int, world_size: int) -> list[Stretch]:
    """Batches of one rank that cover its share exactly; equally many on every rank, sizes differ instead.

    Raises:
        ValueError: A rank's share is smaller than its number of batches.
    """
    num_batches = -(-num_samples // (world_size * batch_size))
    start, stop = rank * num_samples // world_size, (rank + 1) * num_samples // world_size
    if num_samples // world_size < num_batches:
        raise ValueError(
            f"{num_samples} samples do not split into {num_batches} non-empty batches on each of "
            f"{world_size} ranks; raise the batch size or use fewer ranks"
        )
    cuts = [start + i * (stop - start) // num_batches for i in range(num_batches + 1)]
    return list(itertools.pairwise(cuts))


def worker_batches(
    batches: Sequence[Stretch], worker: int, num_workers: int, contiguous: bool
) -> list[Stretch]:
    """The batches that one of a rank's workers makes.

    The loader takes batches from workers in turn, so worker w makes batches w, w + W, ... of the rank's
    order. With `contiguous` it makes as many, from a stretch of its own: few workers then read a shard.
    """
    if not contiguous:
        return list(batches[worker::num_workers])
    first = sum(len(range(w, len(batches), num_workers)) for w in range(worker))
    return list(batches[first : first + len(range(worker, len(batches), num_workers))])


def num_done(worker: int, num_workers: int, num_batches: int) -> int:
    """How many of a rank's first `num_batches` batches came from this worker."""
    return len(range(worker, num_batches, num_workers))


def segments(
    stretches: Sequence[Stretch], shard_order: Sequence[int], counts: Sequence[int], offset: int
) -> list[Segment]:
    """Turn stretches of positions into segments of shards.

    Args:
        stretches: positions, in order.
        shard_order: shard numbers in this epoch's order.
        counts: samples used of each shard (by shard number).
        offset: position 0 of the line is this sample of the ordered shards (the line wraps round).

    Returns:
        Segments in reading order, neighbours merged.
    """
    total = sum(counts[shard] for shard in shard_order)
    ends = list(itertools.accumulate(counts[shard] for shard in shard_order))
    found: list[Segment] = []
    for start, stop in stretches:
        for low, high in _unwrap(start + offset, stop + offset, total):
            for shard, end in zip(shard_order, ends, strict=True):
                begin = end - counts[shard]
                part = Segment(shard, max(low, begin) - begin, min(high, end) - begin)
                if part.start >= part.stop:
                    continue
                if found and found[-1].shard == shard and found[-1].stop == part.start:
                    part = Segment(shard, found.pop().start, part.stop)
                found.append(part)
    return found


def _unwrap(low: int, high: int, total: int) -> list[Stretch]:
    low, high = low % total, low % total + high - low
    return [(low, high)] if high <= total else [(low, total), (0, high - total)]
