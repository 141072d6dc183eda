"""Batches of image codes for one rank: equal epochs, reproducible order, exact continuation."""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from random import Random
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from sjd2_lightning.data import order as plan
from sjd2_lightning.data.index import ShardIndex
from sjd2_lightning.data.reading import (
    AnySample,
    BadDataError,
    RawSample,
    SkipLog,
    SkippedSample,
    any_caption,
    make_pipeline,
)

logger = logging.getLogger(__name__)


class Batch(NamedTuple):
    """Captioned images as codes; image_ids is (B, H, W) int64."""

    keys: list[str]
    captions: list[str]
    image_ids: Tensor


class PictureBatch(NamedTuple):
    """Captioned images as pixels; images is (B, h, w, 3) uint8."""

    keys: list[str]
    captions: list[str]
    images: Tensor


AnyBatch = Batch | PictureBatch


class _Delivery(NamedTuple):
    """What a worker hands over: a batch (None: it gave up) and the samples skipped on the way to it."""

    batch: AnyBatch | None
    skipped: tuple[SkippedSample, ...]


class CodeDataset(IterableDataset):  # type: ignore[type-arg]
    """The part of a folder of shards that one rank sees in one epoch, in batches.

    Args:
        index: the shards.
        batch_size: samples of a batch on this rank.
        train: shuffled; otherwise in order.
        drop_last: full batches only, which leaves out less than one batch a rank, other samples in each
            epoch; otherwise every sample once over the ranks, in batches that differ by one. None: `train`.
        seed: decides the order, with the epoch.
        rank: this process.
        world_size: number of processes.
        shuffle_buffer: samples among which a worker draws its next one.
        max_bad_samples: unusable samples after which a worker gives up.
        num_samples: use only the first so many samples of the index; None for all.
        limit: from a caption to what makes it too long for the model; "" = nothing. Others take its place.

    Raises:
        ValueError: there are too few samples for the batch size and number of ranks.
    """

    def __init__(
        self,
        index: ShardIndex,
        *,
        batch_size: int,
        train: bool,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        shuffle_buffer: int = 2048,
        max_bad_samples: int = 10,
        num_samples: int | None = None,
        drop_last: bool | None = None,
        limit: Callable[[str], str] = any_caption,
    ) -> None:
        self.limit = limit
        self.index, self.train, self.seed = index, train, seed
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.shuffle_buffer, self.max_bad_samples = shuffle_buffer, max_bad_samples
        self.counts = _first_counts([shard.num_samples for shard in index.shards], num_samples)
        self.drop_last = train if drop_last is None else drop_last
        split = plan.full_batches if self.drop_last else plan.even_batches
        self.batches = split(sum(self.counts), batch_size, rank, world_size)
        self.epoch = 0
        self.start_batch = 0

    def __iter__(self) -> Iterator[_Delivery]:
        info = get_worker_info()
        num_workers = info.num_workers if info else 1
        # the loader asks worker 0 first, also when it starts in the middle of an epoch
        worker = ((info.id if info else 0) + self.start_batch) % num_workers
        mine = plan.worker_batches(self.batches, worker, num_workers, contiguous=self.train)
        done = plan.num_done(worker, num_workers, self.start_batch)
        log = SkipLog()
        samples = self._samples(mine, worker, log)
        sizes = [stop - start for start, stop in mine]
        for _ in islice(samples, sum(sizes[:done])):
            pass
        for size in sizes[done:]:
            chosen = list(islice(samples, size))
            if len(chosen) < size:
                yield _Delivery(None, log.drain())
                return
            yield _Delivery(_collate(chosen), log.drain())

    def _samples(self, mine: Sequence[plan.Stretch], worker: int, log: SkipLog) -> Iterator[AnySample]:
        """A worker's samples; skipped ones are made up for by reading its stretch again."""
        if not mine:
            return
        order, offset = list(range(len(self.counts))), 0
        if self.train:
            rng = _rng(self.seed, self.epoch)  # the same on every rank and worker
            rng.shuffle(order)
            offset = rng.randrange(sum(self.counts))
        segments = plan.segments(mine, order, self.counts, offset)
        buffer = self.shuffle_buffer if self.train else 0
        for lap in itertools.count():
            rng = _rng(self.seed, self.epoch, self.rank, worker, lap)
            any_usable = False
            for sample in make_pipeline(self.index, segments, log, buffer, rng, self.limit):
                if log.num_samples > self.max_bad_samples:
                    return
                any_usable = True
                yield sample
            if not any_usable:
                return


class CodeLoader:
    """Batches of a `CodeDataset`, epoch after epoch, with a state that continues inside an epoch.

    The order depends on (seed, epoch, ranks, workers, batch size, shuffle buffer) and nothing else. A new
    pass is the next epoch unless `set_epoch` says otherwise (Lightning calls it through `sampler`).
    """

    batch_sampler = None  # Lightning asks for it wherever there is a sampler

    def __init__(self, data: CodeDataset, num_workers: int = 0, pin_memory: bool = False) -> None:
        self.data = data
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self.num_skipped = 0
        self.too_long: list[SkippedSample] = []  # captions that were left out in this epoch
        self._epoch = self._num_consumed = 0
        self._next_epoch = self._next_start = 0
        self._reported: set[SkippedSample] = set()

    def __len__(self) -> int:
        return len(self.data.batches)

    @property
    def sampler(self) -> CodeLoader:
        """Itself: Lightning looks for `set_epoch` on a loader's sampler."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Make the next pass that of `epoch`; a continuation inside that same epoch is kept."""
        if epoch != self._next_epoch:
            self._next_epoch, self._next_start = epoch, 0

    def __iter__(self) -> Iterator[AnyBatch]:
        # a generator: nothing below runs before the first batch is asked for, and Lightning makes
        # an iterator before it sets the epoch
        self._epoch, self._num_consumed = self._next_epoch, self._next_start
        self._next_epoch, self._next_start = self._epoch + 1, 0
        self.data.epoch, self.data.start_batch = self._epoch, self._num_consumed
        self.num_skipped, self.too_long = 0, []
        loader = DataLoader(
            self.data,
            batch_size=None,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            generator=torch.Generator(),  # of its own: the global one must not depend on how often we start
        )
        try:
            for batch, skipped in loader:
                self._count(skipped, gave_up=batch is None)
                self._num_consumed += 1
                yield batch
        finally:  # also where training ends inside an epoch
            if self.too_long:
                logger.warning(
                    "%d sample(s) of %s left out in epoch %d and replaced by others: their captions are "
                    "too long for the model; the first is %s",
                    len(self.too_long),
                    self.data.index.folder,
                    self._epoch,
                    self.too_long[0],
                )

    def state_dict(self) -> dict[str, Any]:
        """Where the current epoch stands."""
        return {"epoch": self._epoch, "num_batches": self._num_consumed, "order": self._order()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state; with another order (workers, ranks, data...) the epoch begins anew."""
        epoch, num_batches = state["epoch"], state["num_batches"]
        changed = sorted(name for name, value in self._order().items() if state["order"].get(name) != value)
        if changed and 0 < num_batches < len(self):
            logger.warning(
                "Epoch %d begins anew: %s changed since the checkpoint.", epoch, ", ".join(changed)
            )
            num_batches = 0
        elif num_batches >= len(self):
            epoch, num_batches = epoch + 1, 0
        self._epoch, self._num_consumed = self._next_epoch, self._next_start = epoch, num_batches

    def _order(self) -> dict[str, Any]:
        data = self.data
        shards = "".join(shard.sha256 for shard in data.index.shards) + str(data.counts)
        return {
            "seed": data.seed,
            "shuffle_buffer": data.shuffle_buffer,
            "num_workers": max(1, self.num_workers),
            "batch_size": data.batch_size,
            "drop_last": data.drop_last,
            "world_size": data.world_size,
            "shards": hashlib.sha256(shards.encode()).hexdigest(),
        }

    def _count(self, skipped: Sequence[SkippedSample], gave_up: bool) -> None:
        self.too_long += [item for item in skipped if not item.damaged]
        skipped = [item for item in skipped if item.damaged]
        for item in skipped:
            self.num_skipped += item.num_samples
            if item not in self._reported:
                self._reported.add(item)
                logger.warning(
                    "Skipped %d sample(s) of %s, replaced by others: %s",
                    item.num_samples,
                    self.data.index.folder,
                    item,
                )
        if gave_up and self.too_long and not self.num_skipped:
            raise BadDataError(
                f"all captions of a part of {self.data.index.folder} are too long for the model, e.g. "
                f"{self.too_long[0]}; shorten them, or train at a smaller model.image_size"
            )
        if gave_up or self.num_skipped > self.data.max_bad_samples:
            example = f", e.g. {skipped[-1]}" if skipped else ""
            raise BadDataError(
                f"{self.num_skipped} samples of {self.data.index.folder} are unusable in epoch "
                f"{self._epoch}, {self.data.max_bad_samples} are allowed (data.max_bad_samples){example}; "
                "restore the shards, or delete the folder so that it is built again"
            )


def _collate(samples: Sequence[Any]) -> AnyBatch:
    keys, captions = [sample.key for sample in samples], [sample.caption for sample in samples]
    if isinstance(samples[0], RawSample):
        return PictureBatch(keys, captions, torch.from_numpy(np.stack([sample.image for sample in samples])))
    return Batch(keys, captions, torch.stack([sample.image_ids for sample in samples]))


def _rng(*parts: int) -> Random:
    return Random(hashlib.sha256(repr(parts).encode()).digest())


def _first_counts(counts: Sequence[int], num_samples: int | None) -> list[int]:
    left = sum(counts) if num_samples is None else num_samples
    kept = []
    for count in counts:
        kept.append(min(count, left))
        left -= kept[-1]
    return kept
