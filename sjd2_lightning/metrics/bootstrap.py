"""Metric results and their bootstrap intervals over images or prompts.

Source: Efron and Tibshirani, "An Introduction to the Bootstrap", percentile intervals, by scipy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

Interval = tuple[float, float]
CONFIDENCE = 0.95  # coverage that every interval aims at


@dataclass(frozen=True)
class MetricResult:
    """One number with what is needed to read it.

    Attributes:
        name: name of the metric, with that of its extractor or scorer.
        value: the number.
        interval: its bootstrap interval; None where no resampling was asked for or possible.
        num_images: images that it comes from.
        protocol: how it was measured: extractor, resize, reference images.
        flags: sentences on what the number must not be used for.
    """

    name: str
    value: float
    interval: Interval | None
    num_images: int
    protocol: str
    flags: tuple[str, ...] = ()


def mean_result(
    name: str, values: ArrayLike, protocol: str, num_resamples: int = 2000, seed: int = 0
) -> MetricResult:
    """Mean of per-image values with its bootstrap interval.

    Args:
        name: name of the metric.
        values: (N,) one value an image.
        protocol: how the values were measured.
        num_resamples: bootstrap resamples; 0 leaves the interval out.
        seed: seed of the resampling; the same seed resamples the same images.

    Raises:
        ValueError: there are no values, or some are not finite.
    """
    sample = _checked(name, values)
    interval = _interval((sample,), np.mean, num_resamples, seed)
    return MetricResult(name, float(sample.mean()), interval, len(sample), protocol)


def share_result(name: str, hits: Sequence[bool], protocol: str) -> MetricResult:
    """Share of hits (N,) with Wilson's interval, which holds near 0 and 1 and with few samples too."""
    sample = _checked(name, hits)
    share = stats.binomtest(int(sample.sum()), len(sample)).proportion_ci(CONFIDENCE, method="wilson")
    return MetricResult(
        name, float(sample.mean()), (float(share.low), float(share.high)), len(sample), protocol
    )


def paired_difference(
    name: str, first: ArrayLike, second: ArrayLike, protocol: str, num_resamples: int = 2000, seed: int = 0
) -> MetricResult:
    """Mean of first - second over the same images, with its paired bootstrap interval.

    `first` and `second` are (N,), row by row of the same image; see `mean_result` for the rest.
    """
    minuend, subtrahend = _checked_pair(name, first, second)
    return mean_result(name, minuend - subtrahend, protocol, num_resamples, seed)


def ratio_of_totals(
    name: str,
    numerators: ArrayLike,
    denominators: ArrayLike,
    protocol: str,
    num_resamples: int = 2000,
    seed: int = 0,
) -> MetricResult:
    """sum(numerators) / sum(denominators), with an interval that resamples the pairs.

    Both are (N,), row by row of the same prompt, denominators positive; see `mean_result` for the rest.
    """
    above, below = _checked_pair(name, numerators, denominators)
    if (below <= 0).any():
        raise ValueError(f"{name}: denominator {int(below.argmin())} is {below.min()}; it must be positive")

    def ratio(a: NDArray[Any], b: NDArray[Any], axis: int = -1) -> NDArray[Any]:
        return a.sum(axis=axis) / b.sum(axis=axis)

    interval = _interval((above, below), ratio, num_resamples, seed)
    value = float(above.sum() / below.sum())
    return MetricResult(name, value, interval, len(above), protocol)


def resample_counts(num_items: int, num_resamples: int, seed: int) -> NDArray[np.int64]:
    """How often each item occurs in each bootstrap resample, (num_resamples, num_items).

    For the kernel distance: it is cheaper by weight than by index, and must not take a repeated image for two
    similar ones.
    """
    rng = np.random.default_rng(seed)
    return rng.multinomial(num_items, np.full(num_items, 1 / num_items), size=num_resamples)


def percentile_interval(replicates: ArrayLike) -> Interval:
    """The central `CONFIDENCE` share of the bootstrap replicates (R,)."""
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(np.asarray(replicates, dtype=np.float64), [tail, 1 - tail])
    return float(low), float(high)


def _interval(
    samples: tuple[NDArray[Any], ...], statistic: Callable[..., Any], num_resamples: int, seed: int
) -> Interval | None:
    if num_resamples == 0 or len(samples[0]) < 2:
        return None
    found = stats.bootstrap(
        samples,
        statistic,
        paired=len(samples) > 1,
        vectorized=True,
        n_resamples=num_resamples,
        # bounds the matrix of resamples at about 40 MB, whatever the number of images
        batch=max(1, 5_000_000 // len(samples[0])),
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(found.low), float(found.high)


def _checked(name: str, values: ArrayLike) -> NDArray[np.float64]:
    sample = np.asarray(values, dtype=np.float64)
    if sample.ndim != 1 or len(sample) == 0:
        raise ValueError(f"{name}: needs a non-empty list of numbers; got shape {sample.shape}")
    if not np.isfinite(sample).all():
        where = int(np.flatnonzero(~np.isfinite(sample))[0])
        raise ValueError(f"{name}: sample {where} is {sample[where]}; find where it comes from")
    return sample


def _checked_pair(
    name: str, first: ArrayLike, second: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    one, other = _checked(name, first), _checked(name, second)
    if len(one) != len(other):
        raise ValueError(f"{name}: {len(one)} samples against {len(other)}; pair them by key")
    return one, other
