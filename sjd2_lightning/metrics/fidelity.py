"""Generated images against real ones by their features: distances, and what neighbours say.

Sources: Heusel et al. 2017 (FID), Binkowski et al. 2018 (KID, unbiased, cubic polynomial kernel),
Jayasumana et al. 2024, arXiv 2401.09603 (CMMD, Gaussian kernel). The names "fid" and "kid" are kept for
clean-fid's Inception features; other extractors are named in the metric.
Kynkäänniemi et al. 2019 (precision, recall), Naeem et al. 2020 (density, coverage), with the conventions of
the latter's published code: a ball reaches to the k-th neighbour other than its centre, without its border.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from sjd2_lightning.metrics.bootstrap import (
    Interval,
    MetricResult,
    mean_result,
    percentile_interval,
    resample_counts,
)
from sjd2_lightning.metrics.features import FeatureSet, FeatureStatistics, InceptionCleanFID

FEW_IMAGES = 2048
_BLOCK = 1024  # rows of a kernel or distance matrix held at once


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
    kernel = _cubic(generated.dim)
    value, interval = _mean_discrepancy("KID", generated, reference, kernel, num_resamples, seed)
    return MetricResult(
        _metric_name("kid", generated),
        value,
        interval,
        generated.num_images,
        distance_protocol(generated, reference),
        _flags(generated, biased=False),
    )


SIGMA, SCALE = 10.0, 1000.0  # of CMMD: width of the kernel, and a factor that makes the number readable


def cmmd_result(
    generated: FeatureSet, reference: FeatureSet, num_resamples: int = 200, seed: int = 0
) -> MetricResult:
    """1000 times the squared MMD of unit CLIP embeddings, k(x, y) = exp(-|x - y|^2 / 200).

    The estimate without bias, over pairs of different images. The published program keeps the pairs of an
    image with itself, which adds about 1000 (1 - mean k) / N for either set: at the 30,000 images of papers
    less than 0.001, at 100 images 0.1. See `kid_result` for the interval.

    Raises:
        ValueError: the extractors differ, or a set holds fewer than two images.
    """
    value, interval = _mean_discrepancy("CMMD", generated, reference, _gaussian, num_resamples, seed)
    rule = f"Gaussian kernel, sigma {SIGMA:g}, times {SCALE:g}, unbiased"
    return MetricResult(
        "CMMD",
        SCALE * value,
        interval and (SCALE * interval[0], SCALE * interval[1]),
        generated.num_images,
        f"{distance_protocol(generated, reference)}; {rule}",
        _flags(generated, biased=False),
    )


# Kernel values from products x.y, and from the squared lengths of x and of y.
Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]


def _cubic(dim: int) -> Kernel:
    return lambda products, x_squares, y_squares: (products / dim + 1) ** 3


def _gaussian(products: Tensor, x_squares: Tensor, y_squares: Tensor) -> Tensor:
    return (-(x_squares + y_squares - 2 * products) / (2 * SIGMA**2)).exp()


def _mean_discrepancy(
    name: str, generated: FeatureSet, reference: FeatureSet, kernel: Kernel, num_resamples: int, seed: int
) -> tuple[float, Interval | None]:
    """Unbiased squared MMD and its interval."""
    check_comparable(generated, reference)
    if min(generated.num_images, reference.num_images) < 2:
        raise ValueError(
            f"{name} needs 2 images a set; got {generated.num_images} and {reference.num_images}"
        )
    x, y = generated.features.double(), reference.features.double()
    x_weights = _with_unit_row(resample_counts(len(x), num_resamples, seed))  # (1 + R, N)
    y_weights = _with_unit_row(resample_counts(len(y), num_resamples, seed + 1))
    pairs = x_weights.sum(1) * y_weights.sum(1)
    estimates = (
        _mean_over_pairs(x, x_weights, kernel)
        + _mean_over_pairs(y, y_weights, kernel)
        - 2 * _weighted_kernel_sum(x, y, x_weights, y_weights, kernel) / pairs
    )
    # a resample of few images may be one image alone, which has no pairs
    replicates = estimates[1:][estimates[1:].isfinite()]
    interval = percentile_interval(replicates.numpy()) if len(replicates) else None
    return float(estimates[0]), interval


def _with_unit_row(counts: np.ndarray) -> Tensor:
    weights = torch.from_numpy(counts).double()
    return torch.cat([torch.ones(1, weights.shape[1], dtype=torch.float64), weights])


def _mean_over_pairs(x: Tensor, weights: Tensor, kernel: Kernel) -> Tensor:
    """Weighted mean of k(x_i, x_j) over i != j, for each row of weights (R, N)."""
    squares, lengths = weights.square(), x.square().sum(1)
    own = squares @ kernel(lengths, lengths, lengths)
    pairs = weights.sum(1).square() - squares.sum(1)
    return (_weighted_kernel_sum(x, x, weights, weights, kernel) - own) / pairs


def _weighted_kernel_sum(
    x: Tensor, y: Tensor, x_weights: Tensor, y_weights: Tensor, kernel: Kernel
) -> Tensor:
    """sum_ij u_i k(x_i, y_j) v_j for each row u, v of the weights, with a block of the kernel at a time."""
    total = x.new_zeros(len(x_weights))
    x_squares, y_squares = x.square().sum(1), y.square().sum(1)
    for start in range(0, len(x), _BLOCK):
        rows = slice(start, start + _BLOCK)
        values = kernel(x[rows] @ y.T, x_squares[rows, None], y_squares)
        total += (x_weights[:, rows] * (values @ y_weights.T).T).sum(1)
    return total


def _metric_name(metric: str, features: FeatureSet) -> str:
    if features.extractor == InceptionCleanFID.name:
        return {"fd": "fid", "kid": "kid"}[metric]
    return f"{metric}_{features.extractor}"


def distance_protocol(generated: FeatureSet, reference: FeatureSet) -> str:
    """Extractor, its weights and resize; number, hash and reading of reference images, as far as known."""
    weights = f" (weights {generated.weights[:12]})" if generated.weights else ""
    images = f" (sha256 {reference.images_sha256[:12]})" if reference.images_sha256 else ""
    images += f", read as: {reference.reading}" if reference.reading else ""
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


MANIFOLD = ("precision", "recall", "density", "coverage")
_ROUNDING = 1e-12  # of squared distances, relative to the norms: below it two images are one point


@dataclass(frozen=True)
class Manifold:
    """What each image adds to the four metrics; each metric is the mean over its images. All float64.

    Attributes:
        precision, density: (N,) values of the generated images.
        recall, coverage: (M,) values of the real images.
    """

    precision: Tensor
    recall: Tensor
    density: Tensor
    coverage: Tensor


def manifold(generated: Tensor, reference: Tensor, nearest_k: int = 5) -> Manifold:
    """Shares of images that lie in each other's neighbourhoods (Naeem et al. 2020, section 2 and eq. 4 to 6).

    Precision: a generated image lies in the ball of some real one. Recall: a real image lies in the ball of
    some generated one. Density: in how many balls of real images a generated one lies, over k. Coverage: the
    ball of a real image holds a generated one.

    Args:
        generated: (N, d) features of generated images.
        reference: (M, d) features of real images.
        nearest_k: the neighbour, counted from 1, that a ball reaches to.

    Raises:
        ValueError: `nearest_k` is below 1, or a set does not hold more images than that.
    """
    least = min(len(generated), len(reference))
    if not 1 <= nearest_k < least:
        raise ValueError(
            f"nearest_k is {nearest_k}; it must be at least 1 and below the {least} images of the smaller set"
        )
    fake, real = generated.double(), reference.double()
    fake_radii, real_radii = _radii(fake, nearest_k), _radii(real, nearest_k)
    precision, density = [], []
    recall = torch.zeros(len(real), dtype=torch.bool)
    nearest = torch.full((len(real),), torch.inf, dtype=torch.float64)
    for rows in torch.arange(len(fake)).split(_BLOCK):
        squares = _squared_distances(fake[rows], real)
        inside = squares < real_radii
        precision.append(inside.any(1))
        density.append(inside.sum(1).double() / nearest_k)
        recall |= (squares < fake_radii[rows, None]).any(0)
        nearest = torch.minimum(nearest, squares.amin(0))
    return Manifold(
        torch.cat(precision).double(),
        recall.double(),
        torch.cat(density).double(),
        (nearest < real_radii).double(),
    )


def manifold_results(
    generated: FeatureSet,
    reference: FeatureSet,
    nearest_k: int = 5,
    num_resamples: int = 2000,
    seed: int = 0,
) -> dict[str, MetricResult]:
    """The four metrics by name, with intervals.

    Intervals resample the images that a metric is the mean over (generated ones for precision and density,
    real ones for recall and coverage) and leave all neighbourhoods as they are.

    Raises:
        ValueError: the extractors differ, or a set does not hold more than `nearest_k` images.
    """
    check_comparable(generated, reference)
    found = manifold(generated.features, reference.features, nearest_k)
    protocol = f"{distance_protocol(generated, reference)}, {nearest_k} nearest neighbours"
    least = min(generated.num_images, reference.num_images)
    flags = () if least >= FEW_IMAGES else (f"{least} images < {FEW_IMAGES}: compare only at equal N",)
    results = {}
    for name in MANIFOLD:
        own = "generated" if name in ("precision", "density") else "reference"
        result = mean_result(
            f"{name}_{generated.extractor}",
            getattr(found, name).numpy(),
            f"{protocol}, interval over {own} images",
            num_resamples,
            seed,
        )
        results[name] = replace(result, num_images=generated.num_images, flags=flags)
    return results


def _radii(points: Tensor, nearest_k: int) -> Tensor:
    """Squared distance (N,) of each point to its k-th neighbour."""
    parts = []
    for rows in torch.arange(len(points)).split(_BLOCK):
        squares = _squared_distances(points[rows], points)
        squares[torch.arange(len(rows)), rows] = 0  # itself: the smallest, and left out by k + 1
        parts.append(squares.kthvalue(nearest_k + 1, dim=1).values)
    return torch.cat(parts)


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """(N, M); equal points are at 0 exactly, whatever the rounding of the matrix product."""
    norms = x.square().sum(1)[:, None] + y.square().sum(1)
    squares = norms - 2 * x @ y.T
    return squares.where(squares > _ROUNDING * norms, 0)
