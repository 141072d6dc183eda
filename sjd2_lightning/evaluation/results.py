"""Results of a comparison: what each method cost and how good its images are, with intervals and warnings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from sjd2_lightning.decoding.config import BASELINE
from sjd2_lightning.evaluation.controls import Control
from sjd2_lightning.evaluation.prompts import PromptItem
from sjd2_lightning.evaluation.quality import Quality, QualityMeter, judged_less
from sjd2_lightning.evaluation.references import ReferenceSet, reference_rows
from sjd2_lightning.evaluation.store import Record, RecordStore
from sjd2_lightning.metrics.bootstrap import (
    Interval,
    MetricResult,
    mean_result,
    paired_difference,
    percentile_interval,
    ratio_of_totals,
)
from sjd2_lightning.metrics.judge import Verdict
from sjd2_lightning.models.image_tokenizer import ImageTokenizer


@dataclass(frozen=True)
class MethodResult:
    """What one method cost and how good its images are.

    Attributes:
        name: its name in the report.
        config: what it decoded with, a `DecodingConfig`, or what another task has in its place; see
            `flow_methods.FlowMethod`.
        measured: nfe, step_compression, speedup, seconds_per_image, images_per_second, flops_per_token,
            peak_memory_gib, fd, kid, precision, recall, density, coverage, cmmd, clip_score,
            clip_score_shuffled, clip_gain, clip_score_minus_ar, pick_score, pick_score_minus_ar, judge and
            judge_<category>, and these with _minus_ar; what could not be measured is absent.
        seconds_p95: 95th percentile of the seconds an image.
        acceptance_counts: entry n counts the forward passes that committed n slots.
        equal_to_ar: share of images that equal the baseline's, as their records say; None without a baseline.
        near_ties: number of images that differ from the baseline's in replay mode where rounding may be why;
            see `jobs.explained_by_ties`.
        records: records of all images, in the order of the prompts.
        clip_scores: CLIP score of each image, or empty.
        verdicts: the judge's verdict of each image, or empty.
    """

    name: str
    config: Any
    measured: dict[str, MetricResult]
    seconds_p95: float
    acceptance_counts: tuple[int, ...]
    equal_to_ar: float | None
    near_ties: int
    records: tuple[Record, ...]
    clip_scores: tuple[float, ...]
    verdicts: tuple[Verdict | None, ...] = ()

    @property
    def num_images(self) -> int:
        return len(self.records)


@dataclass(frozen=True)
class EvaluationResult:
    """Results of all methods and of the reference rows.

    Attributes:
        methods: results by name of the method.
        references: number and quality of real images by name of the row: as they are, reconstructed, blurred,
            patch-shuffled; empty without a reference.
        prompts: prompts in their order.
        warnings: sentences that a reader needs before the numbers.
        store: records and images.
        reference: the real images; None without them.
        controls: what judge and scorer showed on real images.
    """

    methods: dict[str, MethodResult]
    references: dict[str, tuple[int, Quality]]
    prompts: tuple[PromptItem, ...]
    warnings: tuple[str, ...]
    store: RecordStore
    reference: ReferenceSet | None
    controls: tuple[Control, ...] = ()

    @property
    def reference_name(self) -> str | None:
        return self.reference.name if self.reference else None

    @property
    def reference_identity(self) -> str | None:
        """sha256 of the real images."""
        return self.reference.identity if self.reference else None

    def real_image(self, key: str) -> Tensor | None:
        """The real picture of a prompt (h, w, 3) uint8; None where there is none."""
        if self.reference is None or key not in self.reference.keys:
            return None
        return self.reference.images[self.reference.keys.index(key)]


def measure_methods(
    store: RecordStore,
    methods: Mapping[str, Any],
    prompts: Sequence[PromptItem],
    meter: QualityMeter,
    references: Mapping[str, tuple[int, Quality]] | None = None,
    ties: Mapping[str, Mapping[str, bool]] | None = None,
    flops: Mapping[str, Mapping[str, float]] | None = None,
) -> EvaluationResult:
    """Measures images that were decoded before.

    Args:
        store: records and images.
        methods, prompts: what was decoded.
        meter: measures the quality of the images.
        references: rows of real images, from `measure_references`.
        ties: by method and image key, whether a near tie explains why the image differs from the baseline's;
            see `jobs.explained_by_ties`.
        flops: by method and image key, floating-point operations of the passes.

    Raises:
        ValueError: an image is missing or cannot be read.
    """
    records = records_by_method(store, methods, prompts)
    ties = ties or {}
    qualities = {
        name: meter.measure(
            store.images(rows), [record.prompt for record in rows], [item.asked for item in prompts]
        )
        for name, rows in records.items()
    }
    resamples = meter.metrics.num_resamples
    results = {
        name: _method_result(name, config, records, qualities, resamples, sum(ties.get(name, {}).values()))
        for name, config in methods.items()
    }
    for name, by_key in (flops or {}).items():
        results[name].measured["flops_per_token"] = ratio_of_totals(
            "flops_per_token",
            [by_key[record.key] for record in records[name]],
            [record.num_generated for record in records[name]],
            "trunk and head, guidance included, prefill excluded; "
            "torch's counter on one pass, prefix lengths of all",
            resamples,
        )
    return EvaluationResult(
        methods=results,
        references=dict(references or {}),
        prompts=tuple(prompts),
        warnings=(
            *_protocol_warnings(meter, len(prompts)),
            *(control.sentence for control in meter.controls if not control.passed),
            *_warnings(results, ties),
        ),
        store=store,
        reference=meter.reference,
        controls=meter.controls,
    )


def measure_references(
    meter: QualityMeter, prompts: Sequence[PromptItem], image_tokenizer: ImageTokenizer | None = None
) -> dict[str, tuple[int, Quality]]:
    """Number and quality of the real images that the prompts name, as they are and altered.

    They show the scale: what no method can beat, and what degraded images score.
    """
    metrics = meter.metrics
    measures = (*metrics.extractors, metrics.clip, metrics.embedder, metrics.pick)
    if meter.reference is None or all(measure is None for measure in measures):
        return {}
    subset = meter.reference.matching(prompts)
    return {
        name: (subset.num_images, meter.measure(list(images), subset.captions, subset.asked))
        for name, images in reference_rows(subset, image_tokenizer).items()
    }


def records_by_method(
    store: RecordStore, methods: Iterable[str], prompts: Sequence[PromptItem]
) -> dict[str, list[Any]]:
    """Records of each method, in the order of the prompts.

    Raises:
        ValueError: an image is missing.
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
    config: Any,
    records: Mapping[str, Sequence[Record]],
    qualities: Mapping[str, Quality],
    num_resamples: int,
    near_ties: int,
) -> MethodResult:
    own, baseline = records[name], records.get(BASELINE)
    measured = {
        "nfe": mean_result("nfe", [r.nfe for r in own], own[0].COUNTED, num_resamples),
        "step_compression": ratio_of_totals(
            "step_compression",
            [r.num_generated for r in own],
            [r.nfe for r in own],
            "generated slots / nfe",
            num_resamples,
        ),
    }
    median, seconds_p95 = np.quantile([r.seconds / r.batch_size for r in own], [0.5, 0.95])
    measured |= _clock(own, float(median), num_resamples)
    if baseline is not None:
        measured["speedup"] = speedup(baseline, own, num_resamples)
        if name != BASELINE:
            measured |= _scores_less(qualities[name], qualities[BASELINE], num_resamples)
            verdicts = qualities[name].verdicts, qualities[BASELINE].verdicts
            measured |= judged_less(*verdicts, num_resamples)
    counts = Counter(count for record in own for count in record.accepted)
    return MethodResult(
        name=name,
        config=config,
        measured=measured | qualities[name].measured,
        seconds_p95=float(seconds_p95),
        acceptance_counts=tuple(counts[n] for n in range(max(counts, default=0) + 1)),
        equal_to_ar=None if baseline is None else _share_equal(own, baseline),
        near_ties=near_ties,
        records=tuple(own),
        clip_scores=qualities[name].clip_scores,
        verdicts=qualities[name].verdicts,
    )


def _scores_less(own: Quality, baseline: Quality, num_resamples: int) -> dict[str, MetricResult]:
    """Scores of single images less those of the baseline's, paired: `<name>_minus_ar`."""
    pairs = {
        "clip_score_minus_ar": (own.clip_scores, baseline.clip_scores),
        "pick_score_minus_ar": (own.pick_scores, baseline.pick_scores),
    }
    return {
        name: paired_difference(name, *scores, "paired by prompt and seed", num_resamples)
        for name, scores in pairs.items()
        if scores[0]
    }


def _clock(own: Sequence[Record], median: float, num_resamples: int) -> dict[str, MetricResult]:
    """Latency, throughput and memory; intervals resample batches, which is what was timed."""
    batches = list({record.batch: record for record in own}.values())
    interval = _median_interval([record.seconds / record.batch_size for record in batches], num_resamples)
    found = {
        "seconds_per_image": MetricResult(
            "seconds_per_image", median, interval, len(own), "wall clock of a batch / images in it, median"
        ),
        "images_per_second": ratio_of_totals(
            "images_per_second",
            [record.batch_size for record in batches],
            [record.seconds for record in batches],
            "images / wall clock of all batches, image decoder excluded",
            num_resamples,
        ),
    }
    peaks = [record.peak_bytes for record in own if record.peak_bytes is not None]
    if peaks:
        protocol = "most the CUDA allocator held while a batch was decoded, weights included"
        found["peak_memory_gib"] = MetricResult(
            "peak_memory_gib", max(peaks) / 2**30, None, len(own), protocol
        )
    return found


def speedup(
    baseline: Sequence[Record], method: Sequence[Record], num_resamples: int = 2000, seed: int = 0
) -> MetricResult:
    """Median over prompt batches of baseline seconds / method seconds; the interval resamples batches.

    Only batches that one process decoded by both methods are paired: a run that was stopped and resumed may
    have changed machines in between. Without any such batch all are paired, and the result is flagged.
    """
    own = {record.batch: record for record in method}
    plain = {record.batch: record for record in baseline}
    paired = [batch for batch in plain if own[batch].process == plain[batch].process]
    flags = () if paired else ("baseline and method were not timed side by side",)
    ratios = [plain[batch].seconds / own[batch].seconds for batch in paired or plain]
    interval = _median_interval(ratios, num_resamples, seed)
    protocol = f"wall clock, median ratio over {len(ratios)} prompt batches decoded by both methods"
    return MetricResult("speedup", float(np.median(ratios)), interval, len(method), protocol, flags)


def _median_interval(values: Sequence[float], num_resamples: int, seed: int = 0) -> Interval | None:
    """Bootstrap interval of the median of values (N,)."""
    if not num_resamples or len(values) < 2:
        return None
    rows = np.random.default_rng(seed).integers(0, len(values), (num_resamples, len(values)))
    return percentile_interval(np.median(np.array(values)[rows], axis=1))


def _share_equal(own: Sequence[Record], baseline: Sequence[Record]) -> float:
    same = [a.percent_equal(b) == 100 for a, b in zip(own, baseline, strict=True)]
    return float(np.mean(same))


def _protocol_warnings(meter: QualityMeter, num_prompts: int) -> Iterator[str]:
    wanted = meter.reference.num_prompts if meter.reference else None
    if meter.reference and wanted is not None and wanted != num_prompts:
        yield (
            f"{meter.reference.name} asks for {wanted} prompts and {num_prompts} were decoded: "
            "not comparable with published numbers"
        )


def _warnings(results: Mapping[str, MethodResult], ties: Mapping[str, Mapping[str, bool]]) -> Iterator[str]:
    # One sentence for each flag: all metrics that carry it, and the methods where not all methods do.
    methods_of: dict[tuple[str, str], list[str]] = {}  # by flag and metric
    for name, result in results.items():
        for measure in result.measured.values():
            for flag in measure.flags:
                methods_of.setdefault((flag, measure.name), []).append(name)
    metrics_of: dict[tuple[str, tuple[str, ...]], list[str]] = {}  # by flag and methods
    for (flag, metric), names in methods_of.items():
        metrics_of.setdefault((flag, tuple(names)), []).append(metric)
    for (flag, methods), metrics in metrics_of.items():
        text = f"{', '.join(metrics)}: {flag}"
        yield text if len(methods) == len(results) else f"{text} ({', '.join(methods)})"
    if BASELINE not in results:
        yield f"no method is called {BASELINE!r}: there is no baseline for speedup and equality"
        return
    for name, explained in ties.items():
        for key in (key for key, by_tie in explained.items() if not by_tie):
            yield f"{name}: image {key} differs from the baseline's without a near tie: report this bug"
