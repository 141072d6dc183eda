"""Quality of image sets: distances to real images, scores by prompts, verdicts; each different image once.

Methods that replay the same randomness draw the same images. A `QualityMeter` keeps features and embeddings
by content, so equal images cost nothing and get equal numbers, to the last bit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sjd2_lightning.data.pictures import LazyImages
from sjd2_lightning.evaluation.controls import Control, judge_control, scorer_control
from sjd2_lightning.evaluation.references import ReferenceSet
from sjd2_lightning.metrics.alignment import CLIPScorer, own_scores, scores_of_others
from sjd2_lightning.metrics.bootstrap import MetricResult, mean_result, paired_difference
from sjd2_lightning.metrics.features import (
    FeatureExtractor,
    FeatureSet,
    cached_features,
    check_rows,
    extract_features,
    feature_rows,
)
from sjd2_lightning.metrics.fidelity import cmmd_result, frechet_result, kid_result, manifold_results
from sjd2_lightning.metrics.judge import Asked, Judge, Verdict, difference, summary
from sjd2_lightning.run.provenance import weights_hash

if TYPE_CHECKING:
    from sjd2_lightning.metrics.preference import PickScorer

_MIN_IMAGES = 2  # a covariance needs two


@dataclass(frozen=True)
class QualityMetrics:
    """What to measure images with.

    Attributes:
        extractors: feature extractors behind fd, kid, precision, recall, density and coverage; results of the
            first one have these names, those of a further one end in its name, as in `fd_<name>`.
        clip: scorer of images against prompts; None leaves the CLIP score out.
        num_resamples: bootstrap resamples of means.
        num_distance_resamples: bootstrap resamples of distances; 0 leaves their intervals out.
        nearest_k: neighbours that precision, recall, density and coverage look at; None leaves them out.
        cache_dir: folder that keeps features of the reference images between runs; None computes them anew.
        judge: judge of images whose prompts say what they ask for; None leaves it out.
        embedder: extractor of unit CLIP embeddings behind cmmd; None leaves it out.
        pick: scorer of which image people would prefer; None leaves PickScore out.
    """

    extractors: Sequence[FeatureExtractor] = ()
    clip: CLIPScorer | None = None
    num_resamples: int = 2000
    num_distance_resamples: int = 100
    nearest_k: int | None = 5
    cache_dir: str | Path | None = None
    judge: Judge | None = None
    embedder: FeatureExtractor | None = None
    pick: PickScorer | None = None


@dataclass(frozen=True)
class Quality:
    """What one image set measured.

    Attributes:
        measured: results by name.
        clip_scores: CLIP score of each image; empty without a scorer that is shown.
        verdicts: the judge's verdict of each image; None where the prompt does not say what it asks for.
        pick_scores: PickScore of each image; empty without its scorer.
    """

    measured: dict[str, MetricResult]
    clip_scores: tuple[float, ...]
    verdicts: tuple[Verdict | None, ...] = ()
    pick_scores: tuple[float, ...] = ()


class QualityMeter:
    """Measures image sets against one reference set.

    Args:
        metrics: extractors and scorer.
        reference: real images; None leaves the distances out.
    """

    def __init__(self, metrics: QualityMetrics, reference: ReferenceSet | None) -> None:
        self.metrics = metrics
        self.reference = reference
        self._extractors = [*metrics.extractors, *filter(None, [metrics.embedder])]
        self._weights = [_weights_sha256(extractor) for extractor in self._extractors]
        self._clip_weights = _weights_sha256(metrics.clip.model) if metrics.clip else ""
        self._pick_weights = _weights_sha256(metrics.pick)
        self._features = [_ContentCache(_rows_of(extractor)) for extractor in self._extractors]
        self._embeddings = _ContentCache(metrics.clip.embed_images) if metrics.clip else None
        self._picked = _ContentCache(metrics.pick.embed_images) if metrics.pick else None
        self._measured: dict[bytes, Quality] = {}
        self._reference = [
            self._reference_features(extractor, weights, reference)
            for extractor, weights in zip(self._extractors, self._weights, strict=True)
        ]
        self.controls = tuple(self._controls())
        self._hidden = {control.metric for control in self.controls if not control.passed}

    def _controls(self) -> Iterator[Control]:
        """What judge and scorers show on real images; nothing where there are none."""
        metrics, reference = self.metrics, self.reference
        if reference is not None and metrics.judge is not None and reference.asked:
            yield judge_control(metrics.judge, reference, metrics.num_resamples)
        scorers = ((metrics.clip, self._clip_weights), (metrics.pick, self._pick_weights))
        for scorer, weights in scorers:
            if reference is not None and scorer is not None:
                resamples, folder = metrics.num_resamples, metrics.cache_dir
                yield scorer_control(scorer, weights, reference, resamples, folder)

    def forget_images(self) -> None:
        """Drops features and embeddings of measured images; features of the reference stay."""
        for cache in (*self._features, *filter(None, [self._embeddings, self._picked])):
            cache.rows.clear()
        self._measured.clear()

    def measure(
        self, images: Sequence[Tensor], captions: Sequence[str], asked: Sequence[Asked | None] = ()
    ) -> Quality:
        """Quality of uint8 images (h, w, 3).

        Args:
            images: the images.
            captions: caption of each; "" where none is known.
            asked: what each caption asks for; empty where the judge is not at home.

        Raises:
            ValueError: a feature or an embedding is not finite; the message names the set and the image.
        """
        keys = [_content(image) for image in images]
        content = hashlib.sha256(
            b"".join(keys) + "\n".join(captions).encode() + repr(asked).encode()
        ).digest()
        if content not in self._measured:
            found = self._measure(images, keys, captions)
            verdicts = self._verdicts(images, asked)
            self._measured[content] = replace(
                found,
                measured=found.measured | judged(verdicts, self.metrics.num_resamples),
                verdicts=verdicts,
            )
        return self._measured[content]

    def _measure(self, images: Sequence[Tensor], keys: Sequence[bytes], captions: Sequence[str]) -> Quality:
        measured: dict[str, MetricResult] = {}
        for place, (extractor, reference) in enumerate(zip(self._extractors, self._reference, strict=True)):
            if reference is None or len(images) < _MIN_IMAGES:
                continue
            rows = self._features[place](images, keys)
            generated = FeatureSet(
                extractor.name,
                extractor.preprocessing,
                rows,
                self._weights[place],
                of="the images to be measured",
            )
            if extractor is self.metrics.embedder:
                resamples = self.metrics.num_distance_resamples
                measured["cmmd"] = cmmd_result(generated, reference, resamples)
            else:
                measured |= self._distances(generated, reference, f"_{extractor.name}" if place else "")
        alignment, scores = self._alignment(images, keys, captions)
        preference, picked = self._preference(images, keys, captions)
        return Quality(measured | alignment | preference, scores, pick_scores=picked)

    def _distances(
        self, generated: FeatureSet, reference: FeatureSet, suffix: str
    ) -> dict[str, MetricResult]:
        """Distances by one extractor, by their names with a suffix."""
        resamples = self.metrics.num_distance_resamples
        found = {
            "fd": frechet_result(generated, reference, resamples),
            "kid": kid_result(generated, reference, resamples),
        }
        nearest_k = self.metrics.nearest_k
        if nearest_k is not None and min(generated.num_images, reference.num_images) > nearest_k:
            found |= manifold_results(generated, reference, nearest_k, self.metrics.num_resamples)
        return {f"{name}{suffix}": result for name, result in found.items()}

    def _alignment(
        self, images: Sequence[Tensor], keys: Sequence[bytes], captions: Sequence[str]
    ) -> tuple[dict[str, MetricResult], tuple[float, ...]]:
        clip = self.metrics.clip
        if clip is None or self._embeddings is None or not all(captions) or clip.metric_name in self._hidden:
            return {}, ()
        embedded, texts = self._embeddings(images, keys), clip.embed_captions(captions)
        check_rows(embedded, f"CLIP {clip.name} of the images to be measured")
        check_rows(texts, f"CLIP {clip.name} of the captions")
        matched = own_scores(embedded, texts).numpy()
        weights = f" (weights {self._clip_weights[:12]})" if self._clip_weights else ""
        protocol = f"open_clip {clip.name}{weights}, the resize of that model"
        resamples = self.metrics.num_resamples
        flags = _cut_prompts(clip.num_cut(captions), "CLIP", clip.context)
        measured = {"clip_score": mean_result(clip.metric_name, matched, protocol, resamples)}
        if len(set(captions)) > 1:
            shuffled = scores_of_others(embedded, texts, captions).numpy()
            against = f"{protocol}, mean over all other prompts"
            name = f"{clip.metric_name}_shuffled"
            measured["clip_score_shuffled"] = mean_result(name, shuffled, against, resamples)
            name = f"{clip.metric_name}_matched_minus_shuffled"
            measured["clip_gain"] = paired_difference(name, matched, shuffled, against, resamples)
        measured = {name: replace(result, flags=flags) for name, result in measured.items()}
        return measured, tuple(matched.tolist())

    def _preference(
        self, images: Sequence[Tensor], keys: Sequence[bytes], captions: Sequence[str]
    ) -> tuple[dict[str, MetricResult], tuple[float, ...]]:
        pick = self.metrics.pick
        if pick is None or self._picked is None or not all(captions) or pick.metric_name in self._hidden:
            return {}, ()
        embedded, texts = self._picked(images, keys), pick.embed_captions(captions)
        check_rows(embedded, "PickScore of the images to be measured")
        check_rows(texts, "PickScore of the captions")
        scores = pick.scores(embedded, texts).numpy()
        protocol = (
            f"PickScore, {pick.source} (weights {self._pick_weights[:12]}), cosine times {pick.scale:.1f}, "
            "image processor of the release, whose code is under the MIT licence (its model card states none)"
        )
        found = mean_result("PickScore", scores, protocol, self.metrics.num_resamples)
        flags = _cut_prompts(pick.num_cut(captions), "PickScore", pick.context)
        return {pick.metric_name: replace(found, flags=flags)}, tuple(scores.tolist())

    def _verdicts(
        self, images: Sequence[Tensor], asked: Sequence[Asked | None]
    ) -> tuple[Verdict | None, ...]:
        judge = self.metrics.judge
        if judge is None or "judge" in self._hidden or not any(asked):
            return ()
        return tuple(
            None if wanted is None else judge(image[None], [wanted])[0]
            for image, wanted in zip(images, asked, strict=True)
        )

    def _reference_features(
        self, extractor: FeatureExtractor, weights: str, reference: ReferenceSet | None
    ) -> FeatureSet | None:
        if reference is None or reference.num_images < _MIN_IMAGES:
            return None
        if self.metrics.cache_dir is not None:
            folder = self.metrics.cache_dir
            found = cached_features(
                extractor, reference.images, folder, weights=weights, of="the reference images"
            )
        else:
            found = extract_features(extractor, reference.images, weights=weights, of="the reference images")
        return replace(found, images_sha256=reference.identity, reading=reference.reading)


def judged(verdicts: Sequence[Verdict | None], num_resamples: int) -> dict[str, MetricResult]:
    """Shares of right images: `judge` of all categories but names, `judge_<category>` of each."""
    known = [verdict for verdict in verdicts if verdict is not None]
    found = summary(known, num_resamples) if known else {}
    return {judge_key(name): result for name, result in found.items()}


def judged_less(
    first: Sequence[Verdict | None], second: Sequence[Verdict | None], num_resamples: int
) -> dict[str, MetricResult]:
    """`judged` of the first images less that of the second, of the same prompts: `<name>_minus_ar`."""
    ones, others = ([verdict for verdict in each if verdict is not None] for each in (first, second))
    found = difference(ones, others, num_resamples) if ones else {}
    return {f"{judge_key(name)}_minus_ar": result for name, result in found.items()}


def judge_key(category: str) -> str:
    """Key of a category's share in reports."""
    return "judge" if category == "overall" else f"judge_{category}"


class _ContentCache:
    """A function from images to rows that is called once for every different image."""

    def __init__(self, function: Callable[[Sequence[Tensor]], Tensor]) -> None:
        self.function = function
        self.rows: dict[bytes, Tensor] = {}

    def __call__(self, images: Sequence[Tensor], keys: Sequence[bytes]) -> Tensor:
        new = {key: place for place, key in enumerate(keys) if key not in self.rows}
        if new:
            unseen = LazyImages(images.__getitem__, list(new.values()))
            self.rows |= dict(zip(new, self.function(unseen), strict=True))
        return torch.stack([self.rows[key] for key in keys])


def _cut_prompts(count: int, by: str, context: int) -> tuple[str, ...]:
    """A flag that names how many prompts a scorer cuts; nothing where it cuts none."""
    prompts = "1 prompt" if count == 1 else f"{count} prompts"
    return (f"{prompts} cut by {by}, which reads {context} tokens",) if count else ()


def _content(image: Tensor) -> bytes:
    return hashlib.sha256(f"{tuple(image.shape)}".encode() + image.numpy().tobytes()).digest()


def _weights_sha256(module: object) -> str:
    """Hash of a module's weights; "" for what has none of its own."""
    return weights_hash(module) if isinstance(module, nn.Module) and module.state_dict() else ""


def _rows_of(extractor: FeatureExtractor) -> Callable[[Sequence[Tensor]], Tensor]:
    return lambda images: feature_rows(extractor, images)
