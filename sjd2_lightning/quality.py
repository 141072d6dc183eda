"""Quality of image sets: distances to real images and CLIP score, every image looked at once (ours).

Methods that replay the same randomness draw the same images. Features and embeddings are kept by content
within one `QualityMeter`, so equal images cost nothing and get equal numbers, to the last bit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sjd2_lightning.metrics.alignment import CLIPScorer, own_scores, scores_of_others
from sjd2_lightning.metrics.bootstrap import MetricResult, mean_result, paired_difference
from sjd2_lightning.metrics.features import FeatureExtractor, FeatureSet, cached_features, extract_features
from sjd2_lightning.metrics.fidelity import frechet_result, kid_result
from sjd2_lightning.references import ReferenceSet

_MIN_IMAGES = 2  # a covariance needs two


@dataclass(frozen=True)
class QualityMetrics:
    """What to measure images with.

    Attributes:
        extractors: of features for fd and kid; the first one gives the figures `fd` and `kid`, each further
            one `fd_<name>` and `kid_<name>`.
        clip: scorer of images against prompts; None leaves the CLIP score out.
        num_resamples: bootstrap resamples of means.
        num_distance_resamples: bootstrap resamples of distances; 0 leaves their intervals out.
        cache_dir: keeps features of the reference images between runs; None computes them every time.
    """

    extractors: Sequence[FeatureExtractor] = ()
    clip: CLIPScorer | None = None
    num_resamples: int = 2000
    num_distance_resamples: int = 100
    cache_dir: str | Path | None = None


@dataclass(frozen=True)
class Quality:
    """Figures of one image set by name, and the CLIP score of each image (empty without a scorer)."""

    figures: dict[str, MetricResult]
    clip_scores: tuple[float, ...]


class QualityMeter:
    """Measures image sets against one reference set.

    Args:
        metrics: what to measure with.
        reference: real images; None leaves the distances out.
    """

    def __init__(self, metrics: QualityMetrics, reference: ReferenceSet | None) -> None:
        self.metrics = metrics
        self.reference = reference
        self._features = [_ContentCache(_rows_of(extractor)) for extractor in metrics.extractors]
        self._embeddings = _ContentCache(metrics.clip.embed_images) if metrics.clip else None
        self._measured: dict[bytes, Quality] = {}
        self._reference = [self._reference_features(extractor, reference) for extractor in metrics.extractors]

    def forget_images(self) -> None:
        """Drops what was kept of images; features of the reference stay."""
        for cache in (*self._features, *filter(None, [self._embeddings])):
            cache.rows.clear()
        self._measured.clear()

    def measure(self, images: Sequence[Tensor], captions: Sequence[str]) -> Quality:
        """Quality of uint8 images (h, w, 3) that should show their captions; "" means no caption is known."""
        content = hashlib.sha256(b"".join(map(_content, images)) + "\n".join(captions).encode()).digest()
        if content not in self._measured:
            self._measured[content] = self._measure(images, captions)
        return self._measured[content]

    def _measure(self, images: Sequence[Tensor], captions: Sequence[str]) -> Quality:
        figures: dict[str, MetricResult] = {}
        for place, (extractor, reference) in enumerate(
            zip(self.metrics.extractors, self._reference, strict=True)
        ):
            if reference is None or len(images) < _MIN_IMAGES:
                continue
            rows = self._features[place](images)
            generated = FeatureSet(extractor.name, extractor.preprocessing, rows)
            suffix = f"_{extractor.name}" if place else ""
            resamples = self.metrics.num_distance_resamples
            figures[f"fd{suffix}"] = frechet_result(generated, reference, resamples)
            figures[f"kid{suffix}"] = kid_result(generated, reference, resamples)
        clip_figures, scores = self._alignment(images, captions)
        return Quality(figures | clip_figures, scores)

    def _alignment(
        self, images: Sequence[Tensor], captions: Sequence[str]
    ) -> tuple[dict[str, MetricResult], tuple[float, ...]]:
        clip = self.metrics.clip
        if clip is None or self._embeddings is None or not all(captions):
            return {}, ()
        embedded, texts = self._embeddings(images), clip.embed_captions(captions)
        matched = own_scores(embedded, texts).numpy()
        protocol, resamples = f"open_clip {clip.name}", self.metrics.num_resamples
        figures = {"clip_score": mean_result(clip.metric_name, matched, protocol, resamples)}
        if len(set(captions)) > 1:
            shuffled = scores_of_others(embedded, texts, captions).numpy()
            against = f"{protocol}, mean over all other prompts"
            name = f"{clip.metric_name}_shuffled"
            figures["clip_score_shuffled"] = mean_result(name, shuffled, against, resamples)
            name = f"{clip.metric_name}_matched_minus_shuffled"
            figures["clip_gain"] = paired_difference(name, matched, shuffled, against, resamples)
        return figures, tuple(matched.tolist())

    def _reference_features(
        self, extractor: FeatureExtractor, reference: ReferenceSet | None
    ) -> FeatureSet | None:
        if reference is None or reference.num_images < _MIN_IMAGES:
            return None
        if self.metrics.cache_dir is not None:
            return cached_features(extractor, reference.images, self.metrics.cache_dir)
        return extract_features(extractor, reference.images)


class _ContentCache:
    """A function of images, row by row, that sees every different image once."""

    def __init__(self, function: Callable[[Sequence[Tensor]], Tensor]) -> None:
        self.function = function
        self.rows: dict[bytes, Tensor] = {}

    def __call__(self, images: Sequence[Tensor]) -> Tensor:
        keys = [_content(image) for image in images]
        new = {key: image for key, image in zip(keys, images, strict=True) if key not in self.rows}
        if new:
            self.rows |= dict(zip(new, self.function(list(new.values())), strict=True))
        return torch.stack([self.rows[key] for key in keys])


def _content(image: Tensor) -> bytes:
    return hashlib.sha256(f"{tuple(image.shape)}".encode() + image.numpy().tobytes()).digest()


def _rows_of(extractor: FeatureExtractor) -> Callable[[Sequence[Tensor]], Tensor]:
    return lambda images: extract_features(extractor, images).features
