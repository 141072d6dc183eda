"""Decodes prompts by several methods in turn, so that drift of the machine hits all methods alike.

Every prompt batch is decoded by every method, in an order that rotates with the batch. Timing covers prefill
and token decoding, not the image decoder, which is the same for all methods.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from uuid import uuid4

import torch

from sjd2_lightning.decoding.config import DecodingConfig
from sjd2_lightning.decoding.engine import Engine
from sjd2_lightning.decoding.loop import Observer, decode
from sjd2_lightning.decoding.output import DecodeOutput, NearTies
from sjd2_lightning.evaluation.prompts import PromptItem
from sjd2_lightning.evaluation.store import ImageRecord, RecordStore
from sjd2_lightning.metrics.efficiency import peak_memory, timed
from sjd2_lightning.models.backbone import Backbone, ImageLayout
from sjd2_lightning.models.image_tokenizer import to_uint8
from sjd2_lightning.run.stages import counted, stage

OnBatch = Callable[[str, int], None]


@dataclass(frozen=True)
class Job:
    """One prompt batch for one method."""

    batch: int
    method: str
    prompts: tuple[PromptItem, ...]


def jobs_of_rank(
    prompts: Sequence[PromptItem], methods: Sequence[str], batch_size: int, rank: int = 0, world_size: int = 1
) -> list[Job]:
    """Jobs of one rank, in the order they run.

    Batches are cut before ranks share them: an image's batch does not depend on the number of ranks.
    """
    batches = [tuple(prompts[start : start + batch_size]) for start in range(0, len(prompts), batch_size)]
    jobs = []
    for batch in range(rank, len(batches), world_size):
        jobs += [Job(batch, method, batches[batch]) for method in in_turn(methods, batch // world_size)]
    return jobs


def in_turn(methods: Sequence[str], number: int) -> list[str]:
    """Methods in the order of a batch: each is the first one as often."""
    turn = number % len(methods)
    return [*methods[turn:], *methods[:turn]]


def unfinished_batches(
    prompts: Sequence[PromptItem],
    methods: Sequence[str],
    batch_size: int,
    store: RecordStore,
    doing: tuple[str, str],
) -> Iterator[tuple[int, Sequence[PromptItem], list[str]]]:
    """Batches of which a record lacks, for other tasks than images of codes; says how far it is.

    Args:
        prompts: what all methods get.
        methods: their names.
        batch_size: prompts of a batch.
        store: takes the records.
        doing: what is done and to what, as in "acting", "episodes".

    Yields:
        The number of a batch, its prompts, and the methods in its order.
    """
    done = {(record.method, record.key) for record in store.load()}
    with counted(doing[0], len(prompts), doing[1], True) as advance:
        for number, start in enumerate(range(0, len(prompts), batch_size)):
            batch = prompts[start : start + batch_size]
            if any((name, item.key) not in done for name in methods for item in batch):
                yield number, batch, in_turn(methods, number)
            advance(len(batch))


def unfinished(jobs: Sequence[Job], store: RecordStore) -> list[Job]:
    """The jobs of which at least one image has no record yet."""
    done = {(record.method, record.key) for record in store.load()}
    return [job for job in jobs if any((job.method, item.key) not in done for item in job.prompts)]


def decode_unrecorded(
    backbone: Backbone, methods: Mapping[str, DecodingConfig], jobs: Sequence[Job], layout: ImageLayout
) -> float:
    """Warms up: decodes the first batch once by each method of the jobs, before anything is timed.

    Args:
        backbone, methods, jobs, layout: arguments of `decode_jobs`.

    Returns:
        Seconds that all jobs will take at this pace, compilation and the first call of each kernel included.
    """
    total = 0.0
    for name in dict.fromkeys(job.method for job in jobs):
        engine = Engine.of(methods[name], backbone.device)
        compiling = " and compiling" if engine.compiled else ""
        with stage(f"warming up{compiling}: {name}"):
            _, seconds = timed(
                partial(_decode, backbone, jobs[0].prompts, methods[name], layout), backbone.device
            )
        total += seconds * sum(len(job.prompts) for job in jobs if job.method == name) / len(jobs[0].prompts)
    return total


@cache
def process_name(pid: int) -> str:
    """Name of the process with this number, as records hold it: its own, not that of an earlier one."""
    return uuid4().hex[:12]


def decode_jobs(
    backbone: Backbone,
    methods: Mapping[str, DecodingConfig],
    jobs: Sequence[Job],
    layout: ImageLayout,
    store: RecordStore,
    *,
    on_batch: OnBatch = lambda method, num_images: None,
) -> None:
    """Decodes jobs and writes their records and images.

    Args:
        backbone: model, in eval mode.
        methods: configuration of each method that the jobs name.
        jobs: jobs to run, from `unfinished`.
        layout: image size and row ends.
        store: takes records and images.
        on_batch: called after each job with its method and number of images.
    """
    process = process_name(os.getpid())
    for job in jobs:
        # 1. decode the codes: all that is timed
        call = partial(_decode, backbone, job.prompts, methods[job.method], layout)
        with peak_memory(backbone.device) as peak:
            output, seconds = timed(call, backbone.device)
        # 2. draw the images
        with torch.no_grad():
            images = to_uint8(backbone.decode_images(output.image_ids, output.layouts[0]))
        # 3. write images and records; only now is the job done
        records = [
            replace(record, peak_bytes=peak.num_bytes)
            for record in _records(job, output, layout, seconds, process)
        ]
        store.append(records, images)
        on_batch(job.method, len(job.prompts))


def explained_by_ties(
    backbone: Backbone,
    method: DecodingConfig,
    baseline: DecodingConfig,
    own: Sequence[ImageRecord],
    other: Sequence[ImageRecord],
    layout: ImageLayout,
) -> dict[str, bool]:
    """Whether rounding may explain each image that differs from the baseline's in replay mode.

    It may where, in either decoding, the two best perturbed scores of the first slot that differs lie within
    1e-5. Only batches with a difference are decoded again, with an observer and untimed.

    Args:
        backbone: model, in eval mode.
        method, baseline: configurations, both in replay mode.
        own, other: records of all prompts by the method and by the baseline, in the same order.
        layout: image size and row ends.

    Returns:
        For the key of each image that differs, whether a near tie explains it.
    """
    differing = {b.key: _first_difference(a, b, layout) for a, b in zip(own, other, strict=True)}
    differing = {key: slot for key, slot in differing.items() if slot is not None}
    found = {}
    for batch in sorted({record.batch for record in own if record.key in differing}):
        rows = [record for record in own if record.batch == batch]
        prompts = [PromptItem(record.key, record.prompt, record.seed) for record in rows]
        ties = set()
        for config in (method, baseline):
            observer = NearTies()
            _decode(backbone, prompts, config, layout, observer)
            ties |= set(observer.slots)
        for row, record in enumerate(rows):
            if record.key in differing:
                found[record.key] = (row, differing[record.key]) in ties
    return found


def _first_difference(own: ImageRecord, other: ImageRecord, layout: ImageLayout) -> int | None:
    """Slot of the first code that differs; None if all codes are equal."""
    for place, (a, b) in enumerate(zip(own.image_ids, other.image_ids, strict=True)):
        if a != b:
            return int(layout.code_slots[place])
    return None


def _decode(
    backbone: Backbone,
    prompts: Sequence[PromptItem],
    config: DecodingConfig,
    layout: ImageLayout,
    observer: Observer | None = None,
) -> DecodeOutput:
    texts, seeds = [item.prompt for item in prompts], [item.seed for item in prompts]
    return decode(backbone, texts, seeds, config, layout, observer)


def _records(
    job: Job, output: DecodeOutput, layout: ImageLayout, seconds: float, process: str
) -> list[ImageRecord]:
    stats, accepted = output.stats, output.stats.accepted
    settled = layout.image_ids(stats.settled_iteration).flatten(1)
    return [
        ImageRecord(
            key=item.key,
            prompt=item.prompt,
            seed=item.seed,
            method=job.method,
            batch=job.batch,
            batch_size=len(job.prompts),
            nfe=int(stats.nfe[row]),
            num_generated=int(stats.num_generated[row]),
            accepted=tuple(accepted[row]),
            settled_iteration=tuple(settled[row].tolist()),
            image_ids=tuple(output.image_ids[row].flatten().tolist()),
            size=(layout.height, layout.width),
            seconds=seconds,
            process=process,
        )
        for row, item in enumerate(job.prompts)
    ]
