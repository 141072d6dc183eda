"""Figures of decoded images: what each method cost and what its images are worth, with intervals (ours)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sjd2_lightning.decoding.methods import DecodingConfig
from sjd2_lightning.metrics.bootstrap import (
    MetricResult,
    mean_result,
    paired_difference,
    percentile_interval,
    ratio_of_totals,
)
from sjd2_lightning.metrics.efficiency import latency_summary
from sjd2_lightning.models.image_tokenizer import ImageTokenizer
from sjd2_lightning.prompts import PromptItem
from sjd2_lightning.quality import Quality, QualityMeter
from sjd2_lightning.records import ImageRecord, RecordStore
from sjd2_lightning.references import reference_rows

BASELINE = "ar"


@dataclass(frozen=True)
class MethodResult:
    """What one method did.

    Attributes:
        figures: nfe, step_compression, speedup, seconds_per_image, fd, kid, clip_score, clip_score_shuffled,
            clip_gain, clip_score_minus_ar; a figure that could not be measured is absent.
        seconds_p95: 95th percentile of the seconds an image.
        acceptance_counts: entry n counts the forward passes that committed n slots.
        equal_to_ar: share of images whose codes equal the baseline's; None without a baseline.
        near_ties: images that differ from the baseline's in replay mode and where rounding may be why: the
            two best perturbed scores lie within 1e-5 at the first slot that differs.
        records: of all images, in the order of the prompts; `clip_scores` has one entry each, or is empty.
    """

    name: str
    config: DecodingConfig
    figures: dict[str, MetricResult]
    seconds_p95: float
    acceptance_counts: tuple[int, ...]
    equal_to_ar: float | None
    near_ties: int
    records: tuple[ImageRecord, ...]
    clip_scores: tuple[float, ...]

    @property
    def num_images(self) -> int:
        return len(self.records)


@dataclass(frozen=True)
class EvaluationResult:
    """Results of all methods, of the reference rows, and what must be said about them.

    Attributes:
        references: real images as they are, reconstructed, blurred, patch-shuffled; empty without reference.
        warnings: sentences a reader needs before the figures.
        store: records and images.
    """

    methods: dict[str, MethodResult]
    references: dict[str, tuple[int, Quality]]
    prompts: tuple[PromptItem, ...]
    warnings: tuple[str, ...]
    store: RecordStore
    reference_name: str | None
    reference_identity: str | None


def measure_methods(
    store: RecordStore,
    methods: Mapping[str, DecodingConfig],
    prompts: Sequence[PromptItem],
    meter: QualityMeter,
    references: Mapping[str, tuple[int, Quality]] | None = None,
    ties: Mapping[str, Mapping[str, bool]] | None = None,
) -> EvaluationResult:
    """Figures of images that were decoded before.

    Args:
        store: records and images.
        methods, prompts: what was decoded.
        meter: measures the images.
        references: of `measure_references`.
        ties: by method in replay mode and key of an image that differs from the baseline's, whether a near
            tie explains it; see `generation.explained_by_ties`.

    Raises:
        ValueError: if an image is missing or cannot be read.
    """
    records = records_by_method(store, methods, prompts)
    ties = ties or {}
    qualities = {
        name: meter.measure(store.images(rows), [record.prompt for record in rows])
        for name, rows in records.items()
    }
    results = {
        name: _method_result(
            name, config, records, qualities, meter.metrics.num_resamples, sum(ties.get(name, {}).values())
        )
        for name, config in methods.items()
    }
    return EvaluationResult(
        methods=results,
        references=dict(references or {}),
        prompts=tuple(prompts),
        warnings=tuple(_warnings(results, ties)),
        store=store,
        reference_name=meter.reference.name if meter.reference else None,
        reference_identity=meter.reference.identity if meter.reference else None,
    )


def measure_references(
    meter: QualityMeter, prompts: Sequence[PromptItem], image_tokenizer: ImageTokenizer | None = None
) -> dict[str, tuple[int, Quality]]:
    """Number and quality of the real images that the prompts name, as they are and altered.

    They show the scale: what no method can beat, and what a spoilt image scores.
    """
    if meter.reference is None:
        return {}
    subset = meter.reference.matching(prompts)
    return {
        name: (subset.num_images, meter.measure(list(images), subset.captions))
        for name, images in reference_rows(subset, image_tokenizer).items()
    }


def records_by_method(
    store: RecordStore, methods: Iterable[str], prompts: Sequence[PromptItem]
) -> dict[str, list[ImageRecord]]:
    """Records of each method, in the order of the prompts.

    Raises:
        ValueError: if an image is missing.
    """
    found = {(record.method, record.key): record for record in store.load()}
    methods = list(methods)
    missing = [(name, item.key) for name in methods for item in prompts if (name, item.key) not in found]
    if missing:
        raise ValueError(
            f"{len(missing)} images are missing, the first by method and key {missing[0]}; run again"
        )
    return {name: [found[name, item.key] for item in prompts] for name in methods}


def _method_result(
    name: str,
    config: DecodingConfig,
    records: Mapping[str, Sequence[ImageRecord]],
    qualities: Mapping[str, Quality],
    num_resamples: int,
    near_ties: int,
) -> MethodResult:
    own, baseline = records[name], records.get(BASELINE)
    figures = {
        "nfe": mean_result(
            "nfe", [r.nfe for r in own], "forward passes an image, prefill excluded", num_resamples
        ),
        "step_compression": ratio_of_totals(
            "step_compression",
            [r.num_generated for r in own],
            [r.nfe for r in own],
            "generated slots / nfe",
            num_resamples,
        ),
    }
    seconds = latency_summary([r.seconds / r.batch_size for r in own])
    figures["seconds_per_image"] = MetricResult(
        "seconds_per_image", seconds.median, None, len(own), "wall clock of a batch / images in it, median"
    )
    if baseline is not None:
        figures["speedup"] = speedup(baseline, own, num_resamples)
        scores, baseline_scores = qualities[name].clip_scores, qualities[BASELINE].clip_scores
        if scores and name != BASELINE:
            figures["clip_score_minus_ar"] = paired_difference(
                "clip_score_minus_ar", scores, baseline_scores, "paired by prompt and seed", num_resamples
            )
    counts = Counter(count for record in own for count in record.accepted)
    return MethodResult(
        name=name,
        config=config,
        figures=figures | qualities[name].figures,
        seconds_p95=seconds.p95,
        acceptance_counts=tuple(counts[n] for n in range(max(counts, default=0) + 1)),
        equal_to_ar=None if baseline is None else _share_equal(own, baseline),
        near_ties=near_ties,
        records=tuple(own),
        clip_scores=qualities[name].clip_scores,
    )


def speedup(
    baseline: Sequence[ImageRecord], method: Sequence[ImageRecord], num_resamples: int = 2000, seed: int = 0
) -> MetricResult:
    """Median over prompt batches of baseline seconds / method seconds; the interval resamples batches.

    Only batches that one process decoded by both methods are paired: a run that was stopped and resumed may
    have met another machine in between. Without any such batch all are paired, and the figure is flagged.
    """
    ours = {record.batch: record for record in method}
    theirs = {record.batch: record for record in baseline}
    paired = [batch for batch in theirs if ours[batch].process == theirs[batch].process]
    flags = () if paired else ("baseline and method were not timed side by side",)
    ratios = np.array([theirs[batch].seconds / ours[batch].seconds for batch in paired or theirs])
    interval = None
    if num_resamples and len(ratios) > 1:
        rows = np.random.default_rng(seed).integers(0, len(ratios), (num_resamples, len(ratios)))
        interval = percentile_interval(np.median(ratios[rows], axis=1))
    protocol = f"wall clock, median ratio over {len(ratios)} prompt batches decoded by both methods in turn"
    return MetricResult("speedup", float(np.median(ratios)), interval, len(method), protocol, flags)


def _share_equal(own: Sequence[ImageRecord], baseline: Sequence[ImageRecord]) -> float:
    same = [a.image_ids == b.image_ids for a, b in zip(own, baseline, strict=True)]
    return float(np.mean(same))


def _warnings(results: Mapping[str, MethodResult], ties: Mapping[str, Mapping[str, bool]]) -> Iterator[str]:
    flags: dict[str, list[str]] = {}
    for name, result in results.items():
        for figure in result.figures.values():
            for flag in figure.flags:
                flags.setdefault(f"{figure.name}: {flag}", []).append(name)
    for flag, names in flags.items():
        yield flag if len(names) == len(results) else f"{flag} ({', '.join(names)})"
    if BASELINE not in results:
        yield f"no method is called {BASELINE!r}: there is no baseline for speedup and equality"
        return
    for name, explained in ties.items():
        for key in (key for key, by_tie in explained.items() if not by_tie):
            yield f"{name}: image {key} differs from the baseline's without a near tie: report this bug"
