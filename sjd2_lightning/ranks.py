"""Sharing one evaluation among the processes of `torch.distributed` (ours)."""

from __future__ import annotations

import io
from typing import Any, TypeVar

import numpy as np
from PIL import Image
from torch import distributed

from sjd2_lightning.records import ImageRecord, RecordStore

T = TypeVar("T")


def current_rank() -> tuple[int, int]:
    """Rank and number of processes; (0, 1) outside `torch.distributed`."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def wait_for_all() -> None:
    """Returns once all processes have come here."""
    if current_rank()[1] > 1:
        distributed.barrier()


def from_rank_zero(value: T) -> T:
    """What rank 0 holds, on every rank."""
    if current_rank()[1] == 1:
        return value
    held: list[Any] = [value]
    distributed.broadcast_object_list(held, src=0)
    return held[0]


def collect_on_rank_zero(store: RecordStore, rank: int, world_size: int) -> None:
    """Waits for all ranks, then copies to rank 0's folder what it cannot see there.

    On a shared file system that is nothing. Records are told apart by method and key, so none comes twice.
    """
    if world_size == 1:
        return
    wait_for_all()
    held: list[Any] = [{(record.method, record.key) for record in store.load()} if rank == 0 else None]
    distributed.broadcast_object_list(held, src=0)
    mine = []
    if rank != 0:
        for record in store.load():
            if (record.method, record.key) not in held[0]:
                mine.append((record, store.image_path(record).read_bytes()))
    gathered: list[Any] | None = [None] * world_size if rank == 0 else None
    distributed.gather_object(mine, gathered, dst=0)
    for parts in gathered or ():
        records: list[ImageRecord] = [record for record, _ in parts]
        store.append(records, [np.array(Image.open(io.BytesIO(png)).convert("RGB")) for _, png in parts])
