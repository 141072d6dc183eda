"""Precision, recall, density and coverage of generated images against real ones, by nearest neighbours.

Sources: Kynkäänniemi et al. 2019 (precision, recall), Naeem et al. 2020 (density, coverage). The conventions
are those of the latter's published code: a ball reaches to the k-th neighbour other than its centre, and its
border does not belong to it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sjd2_lightning.metrics.bootstrap import MetricResult, mean_result
from sjd2_lightning.metrics.features import FeatureSet
from sjd2_lightning.metrics.fidelity import FEW_IMAGES, check_comparable, distance_protocol

MANIFOLD = ("precision", "recall", "density", "coverage")
_BLOCK = 1024  # rows of a distance matrix held at once
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
