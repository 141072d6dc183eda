"""Compares decoding methods on the same prompts and seeds: all images first, then what they measure.

Every method runs through the same backbone, cache and batching. A killed run continues where it stopped.
Ranks share the prompts.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from sjd2_lightning import __version__
from sjd2_lightning.decoding.config import BASELINE, Correction, DecodingConfig
from sjd2_lightning.decoding.context import prompt_token_ids
from sjd2_lightning.evaluation.flops import decoding_flops
from sjd2_lightning.evaluation.jobs import (
    decode_jobs,
    decode_unrecorded,
    explained_by_ties,
    jobs_of_rank,
    process_name,
    unfinished,
)
from sjd2_lightning.evaluation.prompts import PromptItem, check_prompts
from sjd2_lightning.evaluation.quality import QualityMeter, QualityMetrics
from sjd2_lightning.evaluation.references import ReferenceSet
from sjd2_lightning.evaluation.results import (
    EvaluationResult,
    measure_methods,
    measure_references,
    records_by_method,
)
from sjd2_lightning.evaluation.store import (
    RUN_FILE,
    ImageRecord,
    RecordStore,
    collect_on_rank_zero,
    discard_other_run,
    held_weights,
    method_fields,
)
from sjd2_lightning.models.backbone import Backbone, ImageLayout, evaluation_mode
from sjd2_lightning.models.image_tokenizer import ImageTokenizer
from sjd2_lightning.run.files import remove_leftovers, sha256_of_json
from sjd2_lightning.run.harmless import harmless
from sjd2_lightning.run.processes import current_rank, failing_together, wait_for_all
from sjd2_lightning.run.provenance import is_weights_hash, weights_hash, weights_sha256
from sjd2_lightning.run.stages import counted, foretell, stage

_METHOD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,59}")

_decoded_here: set[Path] = set()  # folders whose images this process decoded


@dataclass(frozen=True)
class Decoded:
    """The images of all methods, before anything is measured.

    Attributes:
        store: records and images on disk.
        ties: by method and image key, whether a near tie explains why the image differs from the baseline's.
        flops: by method and image key, floating-point operations of the passes.
    """

    store: RecordStore
    ties: Mapping[str, Mapping[str, bool]]
    flops: Mapping[str, Mapping[str, float]]


def evaluate_methods(
    backbone: Backbone,
    methods: Mapping[str, DecodingConfig],
    prompts: Sequence[PromptItem],
    layout: ImageLayout,
    out_dir: str | Path,
    *,
    batch_size: int = 4,
    metrics: QualityMetrics | None = None,
    reference: ReferenceSet | None = None,
    image_tokenizer: ImageTokenizer | None = None,
    warm_up: bool = True,
    replace: bool = False,
    progress: bool = True,
    baseline_from: Sequence[Path] = (),
    on_start: Callable[[], None] = lambda: None,
) -> EvaluationResult | None:
    """Decodes all prompts by all methods and measures the images.

    Under `torch.distributed` ranks share the prompt batches, and rank 0 measures.

    Args:
        backbone: model; decodes in eval mode and gets its modes back.
        methods: configuration of each method by the name it gets in the report; "ar" is the baseline.
        prompts: prompts with their seeds; see `prompts.held_out_prompts` and `prompts.read_prompts`.
        layout: image size and row ends, from `backbone.layout(height_px, width_px)`.
        out_dir: folder of records and images, `images/<method>/<key>.png`; one configuration a folder.
        batch_size: prompts decoded together.
        metrics: quality metrics; None measures speed alone.
        reference: real images of the size of the layout, for the distances and the reference rows.
        image_tokenizer: draws the row of reconstructed real images; None leaves the row out.
        warm_up: decode the first batch once by each method before anything is timed.
        replace: remove records and images of another configuration from the folder, instead of raising.
        progress: show a progress bar.
        baseline_from: folders of other comparisons; the baseline's images and times are taken from one that
            this process decoded with the same weights, prompts and baseline, instead of decoding them again.
        on_start: called on rank 0 when all input was found usable and the folder belongs to this run.

    Returns:
        The result; None on ranks other than 0.

    Raises:
        ValueError: before decoding, for unusable methods or prompts, or a folder of another configuration.
    """
    methods = as_drawn(backbone, methods)
    if reference is not None and isinstance(reference.images, Tensor):
        size = tuple(reference.images.shape[1:3])
        if size != layout.pixels:
            raise ValueError(
                f"reference images of {size} pixels cannot be compared with decoded ones of "
                f"{layout.pixels}; prepare them at that size"
            )
    check_run(backbone, methods, prompts, layout, batch_size)
    # Real images are read before decoding: an unreadable one must not stop a run after hours.
    with stage("measuring the real images"):
        meter = QualityMeter(metrics or QualityMetrics(), reference) if current_rank()[0] == 0 else None
    decoded = decode_methods(
        backbone,
        methods,
        prompts,
        layout,
        out_dir,
        batch_size=batch_size,
        warm_up=warm_up,
        replace=replace,
        progress=progress,
        baseline_from=baseline_from,
        on_start=on_start,
    )
    if decoded is None or meter is None:
        return None
    with stage("measuring the images"):
        rows = measure_references(meter, prompts, image_tokenizer)
        return measure_methods(decoded.store, methods, prompts, meter, rows, decoded.ties, decoded.flops)


def decode_methods(
    backbone: Backbone,
    methods: Mapping[str, DecodingConfig],
    prompts: Sequence[PromptItem],
    layout: ImageLayout,
    out_dir: str | Path,
    *,
    batch_size: int = 4,
    warm_up: bool = True,
    replace: bool = False,
    progress: bool = True,
    baseline_from: Sequence[Path] = (),
    on_start: Callable[[], None] = lambda: None,
) -> Decoded | None:
    """The first half of `evaluate_methods`: same arguments and errors, None on ranks other than 0."""
    methods = as_drawn(backbone, methods)
    check_run(backbone, methods, prompts, layout, batch_size)
    rank, world_size = current_rank()
    identity = run_identity(backbone, methods, prompts, layout, batch_size)
    held = held_weights(out_dir, identity)
    if held and not is_weights_hash(held):
        with stage("identifying the weights as 0.1.0 did, to go on in its folder"):
            identity["weights"] = weights_sha256(backbone)
    wait_for_all()  # each rank reads run.json before rank 0 may remove it
    with failing_together():
        if rank == 0:
            if replace:
                discard_other_run(out_dir, identity)
            remove_leftovers(out_dir)
    with failing_together():
        store = RecordStore(out_dir, identity, rank)
        if rank == 0:
            on_start()
            take_baseline(store, baseline_from)
        jobs = unfinished(jobs_of_rank(prompts, list(methods), batch_size, rank, world_size), store)
        num_images = sum(len(job.prompts) for job in jobs)
        with evaluation_mode(backbone):
            if warm_up:
                seconds = decode_unrecorded(backbone, methods, jobs, layout)
                foretell(f"decoding {num_images} images, by the pace of the first", seconds)
            with counted("decoding", num_images, "images", progress and bool(jobs)) as advance:
                decode_jobs(
                    backbone,
                    methods,
                    jobs,
                    layout,
                    store,
                    on_batch=lambda method, num_decoded: advance(num_decoded, method),
                )
    collect_on_rank_zero(store, rank, world_size)
    if rank != 0:
        return None
    _decoded_here.add(store.folder.resolve())
    records = records_by_method(store, methods, prompts)
    with evaluation_mode(backbone):
        with stage("decoding again what differs from ar"):
            ties = _ties(backbone, methods, records, layout)
        with stage("counting FLOPs"):
            flops = decoding_flops(backbone, methods, records, layout)
    return Decoded(store, ties, flops)


def take_baseline(store: RecordStore, folders: Sequence[Path]) -> None:
    """Copies the baseline's records and images into a store without them, from one of some folders.

    Taken is what this process decoded, whose times compare with those to come, where everything but the other
    methods is the same.
    """
    wanted = _baseline_identity(json.loads(json.dumps(store.identity)))
    if wanted is None or any(record.method == BASELINE for record in store.load()):
        return
    # a folder that another process writes in is not even opened
    for folder in [folder for folder in folders if folder.resolve() in _decoded_here]:
        with harmless(f"looking for the images of {BASELINE} in {folder}"):
            identity = json.loads((folder / RUN_FILE).read_text())["identity"]
            if _baseline_identity(identity) != wanted:
                continue
            other = RecordStore(folder, identity)
            own = [
                record
                for record in other.load()
                if record.method == BASELINE and record.process == process_name(os.getpid())
            ]
            store.append(own, other.images(own))
            if own:
                return


def _baseline_identity(identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """What decides the baseline's images and times; None without one."""
    methods = identity["methods"]
    return {**identity, "methods": methods[BASELINE]} if BASELINE in methods else None


def as_drawn(backbone: Backbone, methods: Mapping[str, DecodingConfig]) -> dict[str, DecodingConfig]:
    """Methods without a corrector of drafts that the model does not have, or they cannot use."""
    return {
        name: config
        if config.corrector.is_file or (config.corrects and backbone.corrector is not None)
        else dataclasses.replace(config, corrector=Correction())
        for name, config in methods.items()
    }


def run_identity(
    backbone: Backbone,
    methods: Mapping[str, DecodingConfig],
    prompts: Sequence[PromptItem],
    layout: ImageLayout,
    batch_size: int,
) -> dict[str, Any]:
    """Everything that decides the images of a folder, as a JSON object; see `store.method_fields`."""
    quantized = getattr(backbone, "quantized", None)
    # named only where it is used: folders that were written without it go on
    named = {} if quantized is None else {"quantize": quantized}
    return named | {
        "code": __version__,
        "weights": weights_hash(backbone),
        "device": backbone.device.type,
        "methods": {name: method_fields(config) for name, config in as_drawn(backbone, methods).items()},
        "prompts": sha256_of_json([item.identity for item in prompts]),
        "pixels": list(layout.pixels),
        "batch_size": batch_size,
    }


def check_run(
    backbone: Backbone,
    methods: Mapping[str, DecodingConfig],
    prompts: Sequence[PromptItem],
    layout: ImageLayout,
    batch_size: int,
) -> None:
    """Refuses what would fail in the middle of a run.

    Raises:
        ValueError: no or unusable methods, prompts or batch size; of prompts the first one is named that is
            longer than the model's positions.
    """
    if not methods:
        raise ValueError("there are no methods; give at least one, for example ar")
    for name in methods:
        if not _METHOD_NAME.fullmatch(name):
            raise ValueError(
                f"method name {name!r} cannot name a folder; use letters, digits, '.', '_' and '-'"
            )
    if problems := [
        f"method {name!r}: {text}" for name, config in methods.items() for text in config.problems()
    ]:
        raise ValueError("; ".join(problems))
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    check_prompts(prompts)
    scale = max(config.sampling.guidance_scale for config in methods.values())
    for number, item in enumerate(prompts, start=1):
        try:
            prompt_token_ids(backbone, [item.prompt], [layout], scale)
        except ValueError as error:
            place = f"prompt {number} of {len(prompts)}, {item.key!r}"
            raise ValueError(f"{place}, cannot be decoded: {error}") from error


def _ties(
    backbone: Backbone,
    methods: Mapping[str, DecodingConfig],
    records: Mapping[str, Sequence[ImageRecord]],
    layout: ImageLayout,
) -> dict[str, dict[str, bool]]:
    """For each method that must give the baseline's images: which differences a near tie explains."""
    baseline = methods.get(BASELINE)
    if baseline is None or baseline.acceptance != "replay":
        return {}
    return {
        name: explained_by_ties(backbone, config, baseline, records[name], records[BASELINE], layout)
        for name, config in methods.items()
        if name != BASELINE and config.acceptance == "replay" and config.sampling == baseline.sampling
    }
