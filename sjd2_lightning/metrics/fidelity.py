"""Frechet and kernel distance between the features of generated and of reference images.

Sources: Heusel et al. 2017 (FID), Binkowski et al. 2018 (KID, unbiased, cubic polynomial kernel). The names
"fid" and "kid" are kept for clean-fid's Inception features; other extractors are named in the metric.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from sjd2_lightning.metrics.bootstrap import MetricResult, mean_result, percentile_interval, resample_counts
from sjd2_lightning.metrics.features import FeatureSet, FeatureStatistics, InceptionCleanFID

FEW_IMAGES = 2048
_BLOCK = 1024  # rows of a kernel matrix held at once


def frechet_distance(first: FeatureStatistics, second: FeatureStatistics) -> float:
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) (Heusel et al. 2017, eq. 6).

    The trace of the root is the sum of the roots of the eigenvalues of S2^(1/2) S1 S2^(1/2): symmetric, so
    real and stable where a matrix root of the singular product S1 S2 is not.

    Raises:
        ValueError: the feature sizes differ.
    """
    if first.mean.shape != second.mean.shape:
        raise ValueError(
            f"features of size {len(first.mean)} and {len(second.mean)} have no distance; use one extractor"
        )
    product = second.root @ first.covariance @ second.root
    trace_of_root = torch.linalg.eigvalsh(product).clamp(min=0).sqrt().sum()
    distance = (first.mean - second.mean).square().sum()
    distance += first.covariance.trace() + second.covariance.trace() - 2 * trace_of_root
    return max(float(distance), 0.0)  # rounding leaves about -1e-9 between equal sets


def frechet_contributions(features: Tensor, reference: FeatureStatistics) -> Tensor:
    """What each image adds to the Frechet distance to first order: (N,) float64 whose mean is the distance.

    Source: ours, the influence function of eq. 6. An image x weighs |x - mu1|^2 + 2 (x - mu1).(mu1 - mu2)
    minus its part in the root of the trace, up to a constant. To resample these contributions is to resample
    the distance, but without an eigendecomposition for each resample, and without the bias of repeated images
    (it makes the spread 2 times too wide at N below the dimension).

    Args:
        features: (N, d) features of generated images.
        reference: statistics of reference images.

    Raises:
        ValueError: the feature sizes differ, or fewer than two images.
    """
    own = FeatureStatistics.of(features)
    distance = frechet_distance(own, reference)
    centred = features.double() - own.mean
    mapped = centred @ reference.root
    # diag of (M M^T)^(1/2) for M (N, d), from the eigenvectors of the smaller of the two Gram matrices
    if len(mapped) <= mapped.shape[1]:
        values, vectors = torch.linalg.eigh(mapped @ mapped.T)
        shares = vectors.square() @ values.clamp(min=0).sqrt()
    else:
        values, vectors = torch.linalg.eigh(mapped.T @ mapped)
        roots = values.clamp(min=0).sqrt()
        shares = (mapped @ vectors).square() @ roots.clamp(min=1e-7 * float(roots.max())).reciprocal()
    shares *= (len(mapped) - 1) ** 0.5
    quadratic = (centred.square().sum(1) - shares) * len(mapped) / (len(mapped) - 1)
    influence = quadratic + 2 * centred @ (own.mean - reference.mean)
    return distance + influence - influence.mean()


def frechet_result(
    generated: FeatureSet, reference: FeatureSet, num_resamples: int = 2000, seed: int = 0
) -> MetricResult:
    """Frechet distance of generated to reference images, with a bootstrap interval over the generated ones.

    The interval is the spread between sets of this N against this reference; it does not show the bias that
    depends on N. Equal seeds resample equal rows, so methods measured on the same prompts are paired.

    Raises:
        ValueError: the extractors differ, or a set holds fewer than two images.
    """
    check_comparable(generated, reference)
    contributions = frechet_contributions(generated.features, reference.statistics)
    name, protocol = _metric_name("fd", generated), distance_protocol(generated, reference)
    result = mean_result(name, contributions.numpy(), protocol, num_resamples, seed)
    interval = result.interval and (max(result.interval[0], 0.0), result.interval[1])
    return replace(result, interval=interval, flags=_flags(generated, biased=True))


def kid_result(
    generated: FeatureSet, reference: FeatureSet, num_resamples: int = 200, seed: int = 0
) -> MetricResult:
    """Unbiased squared MMD with k(x, y) = (x.y / d + 1)^3 over all images (Binkowski et al. 2018, section 4).

    The interval resamples both sets. A repeated image counts as a weight, never as a pair: pairs of equal
    images would bring back the diagonal, without which the estimate is unbiased.

    Raises:
        ValueError: the extractors differ, or a set holds fewer than two images.
    """
    check_comparable(generated, reference)
    if min(generated.num_images, reference.num_images) < 2:
        raise ValueError(f"KID needs 2 images a set; got {generated.num_images} and {reference.num_images}")
    x, y = generated.features.double(), reference.features.double()
    x_weights = _with_unit_row(resample_counts(len(x), num_resamples, seed))  # (1 + R, N)
    y_weights = _with_unit_row(resample_counts(len(y), num_resamples, seed + 1))
    estimates = (
        _mean_over_pairs(x, x_weights)
        + _mean_over_pairs(y, y_weights)
        - 2 * _weighted_kernel_sum(x, y, x_weights, y_weights) / (x_weights.sum(1) * y_weights.sum(1))
    )
    # a resample of few images may be one image alone, which has no pairs
    replicates = estimates[1:][estimates[1:].isfinite()]
    interval = percentile_interval(replicates.numpy()) if len(replicates) else None
    return MetricResult(
        _metric_name("kid", generated),
        float(estimates[0]),
        interval,
        generated.num_images,
        distance_protocol(generated, reference),
        _flags(generated, biased=False),
    )


def _with_unit_row(counts: np.ndarray) -> Tensor:
    weights = torch.from_numpy(counts).double()
    return torch.cat([torch.ones(1, weights.shape[1], dtype=torch.float64), weights])


def _mean_over_pairs(x: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean of k(x_i, x_j) over i != j, for each row of weights (R, N)."""
    squares = weights.square()
    own = squares @ _kernel((x * x).sum(1), x.shape[1])
    pairs = weights.sum(1).square() - squares.sum(1)
    return (_weighted_kernel_sum(x, x, weights, weights) - own) / pairs


def _weighted_kernel_sum(x: Tensor, y: Tensor, x_weights: Tensor, y_weights: Tensor) -> Tensor:
    """sum_ij u_i k(x_i, y_j) v_j for each row u, v of the weights, with a block of the kernel at a time."""
    total = x.new_zeros(len(x_weights))
    for start in range(0, len(x), _BLOCK):
        rows = slice(start, start + _BLOCK)
        total += (x_weights[:, rows] * (_kernel(x[rows] @ y.T, x.shape[1]) @ y_weights.T).T).sum(1)
    return total


def _kernel(products: Tensor, dim: int) -> Tensor:
    return (products / dim + 1) ** 3


def _metric_name(metric: str, features: FeatureSet) -> str:
    if features.extractor == InceptionCleanFID.name:
        return {"fd": "fid", "kid": "kid"}[metric]
    return f"{metric}_{features.extractor}"


def distance_protocol(generated: FeatureSet, reference: FeatureSet) -> str:
    """Extractor and its weights, resize, number of reference images and their hash, as far as known."""
    weights = f" (weights {generated.weights[:12]})" if generated.weights else ""
    images = f" (sha256 {reference.images_sha256[:12]})" if reference.images_sha256 else ""
    return (
        f"{generated.extractor}{weights}, {generated.preprocessing}, "
        f"{reference.num_images} reference images{images}"
    )


def _flags(generated: FeatureSet, biased: bool) -> tuple[str, ...]:
    needed = max(FEW_IMAGES, 2 * generated.dim)
    if generated.num_images >= needed:
        return ()
    effect = "biased upwards, compare only at equal N" if biased else "read it with its interval"
    return (f"N = {generated.num_images} < {needed}: {effect}",)


def check_comparable(generated: FeatureSet, reference: FeatureSet) -> None:
    """Refuses features of different extractors, weights or resizes.

    Raises:
        ValueError: they differ.
    """
    made = [(s.extractor, s.preprocessing, s.dim, s.weights) for s in (generated, reference)]
    if made[0] != made[1]:
        raise ValueError(f"features of {made[0]} and {made[1]} have no distance; use one extractor for both")
