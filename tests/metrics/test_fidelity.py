"""Frechet and kernel distance: closed forms, independent implementations, intervals, names."""

import math

import numpy as np
import pytest
import torch
from cleanfid import fid as clean_fid
from scipy import linalg
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance, poly_mmd

from sjd2_lightning.metrics import fidelity as module
from sjd2_lightning.metrics.features import EffNetLite0, FeatureSet, FeatureStatistics, InceptionCleanFID
from sjd2_lightning.metrics.fidelity import (
    MANIFOLD,
    frechet_contributions,
    frechet_distance,
    frechet_result,
    kid_result,
    manifold,
    manifold_results,
)


def draw(num: int, dim: int, seed: int, shift: float = 0.0, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=torch.Generator().manual_seed(99)) / dim**0.5
    return shift + scale * torch.randn(num, dim, generator=generator) @ mixing


def named(features: torch.Tensor, extractor: str = "EffNetLite0") -> FeatureSet:
    return FeatureSet(extractor, "resize", features)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return frechet_distance(FeatureStatistics.of(a), FeatureStatistics.of(b))


class Raw(nn.Module):
    """An extractor for torchmetrics whose images are features already."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.num_features = dim

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images


@pytest.mark.parametrize("num", [30, 400])  # fewer and more images than dimensions
def test_distance_to_itself_is_zero(num):
    x = draw(num, 64, 0)
    assert distance(x, x) == pytest.approx(0, abs=1e-6)
    assert distance(x, x[torch.randperm(num)]) == pytest.approx(0, abs=1e-6)


def test_closed_form_of_commuting_gaussians():
    a = torch.tensor([1.0, 4.0, 9.0, 0.0], dtype=torch.float64)
    b = torch.tensor([4.0, 1.0, 9.0, 1.0], dtype=torch.float64)
    rotation = torch.linalg.qr(draw(4, 4, 0).double()).Q
    first = FeatureStatistics(torch.zeros(4).double(), rotation @ a.diag() @ rotation.T, 10)
    second = FeatureStatistics(torch.full((4,), 2.0).double(), rotation @ b.diag() @ rotation.T, 10)
    expected = 4 * 2.0**2 + float((a.sqrt() - b.sqrt()).square().sum())
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(second, first) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("num", "dim"), [(300, 32), (60, 96)])
def test_distance_equals_torchmetrics(num, dim):
    x, y = draw(num, dim, 0), draw(num + 7, dim, 1, shift=0.1, scale=1.2)
    metric = FrechetInceptionDistance(feature=Raw(dim), normalize=True).set_dtype(torch.float64)
    for part in y.split(50):
        metric.update(part, real=True)
    for part in x.split(33):
        metric.update(part, real=False)
    assert distance(x, y) == pytest.approx(float(metric.compute()), rel=1e-3)


def test_distance_equals_clean_fid(monkeypatch):
    # scipy's sqrtm returns a pair for disp=False up to 1.17 and knows no disp afterwards; both are the root.
    def root(matrix, disp=True):
        return linalg.sqrtm.__wrapped__(matrix) if disp else (plain(matrix), 0.0)

    plain = linalg.sqrtm
    monkeypatch.setattr(clean_fid.linalg, "sqrtm", root)
    x, y = draw(300, 32, 0), draw(280, 32, 1, shift=0.1, scale=1.2)
    assert distance(x, y) == pytest.approx(clean_fid.fid_from_feats(x.numpy(), y.numpy()), rel=1e-3)


def test_kid_equals_torchmetrics_and_clean_fid():
    x, y = draw(120, 32, 0), draw(120, 32, 1, shift=0.2)
    found = kid_result(named(x), named(y), num_resamples=0).value
    assert found == pytest.approx(float(poly_mmd(x.double(), y.double())), rel=1e-9)
    metric = KernelInceptionDistance(feature=Raw(32), subsets=1, subset_size=120)
    metric.update(y, real=True)
    metric.update(x, real=False)
    assert found == pytest.approx(float(metric.compute()[0]), rel=1e-3)
    assert found == pytest.approx(clean_fid.kernel_distance(x.numpy(), y.numpy(), num_subsets=1), rel=1e-3)


def test_kid_is_unbiased_and_its_interval_covers_zero_for_equal_laws():
    results = [
        kid_result(named(draw(40, 8, 2 * t)), named(draw(60, 8, 2 * t + 1)), num_resamples=100, seed=t)
        for t in range(120)
    ]
    values = np.array([r.value for r in results])
    assert abs(values.mean()) < 3 * values.std() / math.sqrt(len(values))
    assert np.mean([r.interval[0] <= 0 <= r.interval[1] for r in results]) >= 0.9


def test_kid_interval_covers_the_true_distance():
    truth = np.mean([_kid_value(500, 500, 1000 + t) for t in range(10)])
    results = [
        kid_result(named(draw(50, 8, 2 * t, shift=0.5)), named(draw(50, 8, 2 * t + 1)), 150, t)
        for t in range(100)
    ]
    assert np.mean([r.interval[0] <= truth <= r.interval[1] for r in results]) >= 0.88


def _kid_value(num: int, num_reference: int, seed: int) -> float:
    x, y = draw(num, 8, 2 * seed, shift=0.5), draw(num_reference, 8, 2 * seed + 1)
    return kid_result(named(x), named(y), num_resamples=0).value


def test_kid_of_few_images_has_an_interval():
    low, high = kid_result(named(draw(2, 8, 0)), named(draw(3, 8, 1)), num_resamples=50).interval
    assert math.isfinite(low)
    assert low < high


def test_kid_in_blocks_equals_kid_at_once(monkeypatch):
    x, y = named(draw(50, 8, 0)), named(draw(70, 8, 1))
    whole = kid_result(x, y, 20)
    monkeypatch.setattr("sjd2_lightning.metrics.fidelity._BLOCK", 16)
    blocks = kid_result(x, y, 20)
    assert (blocks.value, *blocks.interval) == pytest.approx((whole.value, *whole.interval), rel=1e-9)


@pytest.mark.parametrize("num", [40, 200])  # both Gram matrices
@pytest.mark.parametrize("shift", [0.1, 0.5])
def test_frechet_interval_is_the_spread_over_sets_of_this_size(num, shift):
    reference = named(draw(400, 64, 500))
    sets = [draw(num, 64, t, shift=shift) for t in range(60)]
    low, high = np.quantile([distance(x, reference.features) for x in sets], [0.025, 0.975])
    found = [frechet_result(named(x), reference, 300, t).interval for t, x in enumerate(sets[:12])]
    assert 0.7 < np.mean([upper - lower for lower, upper in found]) / (high - low) < 1.5


@pytest.mark.parametrize("num", [40, 200])
def test_contributions_are_the_derivative_of_the_distance(num):
    x, against = draw(num, 64, 0).double(), FeatureStatistics.of(draw(300, 64, 1))
    contributions = frechet_contributions(x, against)
    value = frechet_distance(FeatureStatistics.of(x), against)
    assert float(contributions.mean()) == pytest.approx(value)

    def distance_towards_image_3(step: float) -> float:
        weights = torch.full((num,), (1 - step) / num).double()
        weights[3] += step
        mean = weights @ x
        covariance = ((x - mean).T * weights) @ (x - mean) * num / (num - 1)
        return frechet_distance(FeatureStatistics(mean, covariance, num), against)

    slope = (distance_towards_image_3(1e-4) - distance_towards_image_3(-1e-4)) / 2e-4
    assert slope == pytest.approx(float(contributions[3] - value), rel=1e-2)


def test_only_clean_fid_inception_is_called_fid():
    x, y = draw(20, 8, 0), draw(20, 8, 1)
    for extractor, names in [
        (EffNetLite0.name, ("fd_EffNetLite0", "kid_EffNetLite0")),
        (InceptionCleanFID.name, ("fid", "kid")),
    ]:
        results = [f(named(x, extractor), named(y, extractor), 2) for f in (frechet_result, kid_result)]
        assert tuple(r.name for r in results) == names
        for r in results:
            assert r.protocol == f"{extractor}, resize, 20 reference images"
            assert "N = 20 < 2048" in r.flags[0]


def test_many_images_are_not_flagged():
    x = named(draw(2048, 4, 0))
    assert frechet_result(x, x, 2).flags == ()


def test_sets_that_cannot_be_compared_are_refused():
    x = named(draw(20, 8, 0))
    for other in (named(draw(20, 9, 0)), named(draw(20, 8, 0), "InceptionCleanFID")):
        for compare in (frechet_result, kid_result):
            with pytest.raises(ValueError, match="one extractor"):
                compare(x, other)
    with pytest.raises(ValueError, match="2 images"):
        kid_result(named(draw(1, 8, 0)), x)
    with pytest.raises(ValueError, match="2 images"):
        frechet_result(named(draw(1, 8, 0)), x)


def points(num, dim, seed, shift=0.0, scale=1.0):
    return shift + scale * torch.randn(num, dim, generator=torch.Generator().manual_seed(seed))


def means(generated, reference, k):
    found = manifold(generated, reference, k)
    return {name: float(getattr(found, name).mean()) for name in MANIFOLD}


def brute_force(fake, real, k):
    """The definitions, one pair of points at a time."""
    fake, real = np.asarray(fake, dtype=np.float64), np.asarray(real, dtype=np.float64)

    def radius(points, i):
        others = [np.linalg.norm(points[i] - p) for j, p in enumerate(points) if j != i]
        return sorted(others)[k - 1]

    fake_radii = [radius(fake, i) for i in range(len(fake))]
    real_radii = [radius(real, j) for j in range(len(real))]
    near = [[np.linalg.norm(f - r) for r in real] for f in fake]
    pairs = [(i, j) for i in range(len(fake)) for j in range(len(real))]
    in_real = [(i, j) for i, j in pairs if near[i][j] < real_radii[j]]
    in_fake = [(i, j) for i, j in pairs if near[i][j] < fake_radii[i]]
    return {
        "precision": len({i for i, _ in in_real}) / len(fake),
        "recall": len({j for _, j in in_fake}) / len(real),
        "density": len(in_real) / (k * len(fake)),
        "coverage": len({j for _, j in in_real}) / len(real),
    }


@pytest.mark.parametrize(("k", "shift"), [(1, 0.0), (3, 0.7), (5, 1.5)])
def test_figures_equal_a_brute_force(k, shift):
    fake, real = points(40, 4, 0, shift, 0.8), points(55, 4, 1)
    assert means(fake, real, k) == pytest.approx(brute_force(fake, real, k), abs=1e-12)


def test_repeated_images_equal_a_brute_force():
    """White pictures are one point: radii of 0, which rounding must not open."""
    some = points(20, 64, 0, scale=100.0)
    fake, real = some.repeat(3, 1), torch.cat([some.repeat(3, 1), points(4, 64, 1)])
    expected = brute_force(fake, real, 2)
    assert expected["precision"] == 0
    assert means(fake, real, 2) == pytest.approx(expected, abs=1e-12)


def test_known_cases():
    real = points(300, 8, 0)
    same = means(real.clone(), real, 5)
    assert (same["precision"], same["recall"], same["coverage"]) == (1, 1, 1)
    assert set(means(real + 100, real, 5).values()) == {0}
    one_mode = means(points(300, 8, 1, scale=0.05), real, 5)  # all in the middle: likely, and nothing else
    assert one_mode["precision"] > 0.95
    assert one_mode["recall"] < 0.05
    law = means(points(300, 8, 2), real, 5)
    assert law["density"] == pytest.approx(1, abs=0.15)  # its expectation for equal laws
    assert law["coverage"] == pytest.approx(1 - 0.5**5, abs=0.06)


def test_blocks_change_nothing(monkeypatch):
    fake, real = points(50, 6, 0, 0.5), points(70, 6, 1)
    whole = means(fake, real, 4)
    monkeypatch.setattr(module, "_BLOCK", 16)
    assert means(fake, real, 4) == whole


def test_results_carry_what_is_needed_to_read_them():
    fake = FeatureSet("EffNetLite0", "resize", points(50, 6, 0, 0.5), "w" * 64)
    real = FeatureSet("EffNetLite0", "resize", points(70, 6, 1), "w" * 64, "f" * 64)
    found = manifold_results(fake, real, 4, num_resamples=100)
    assert tuple(found) == MANIFOLD
    for name, result in found.items():
        assert result.name == f"{name}_EffNetLite0"
        assert (result.num_images, len(result.flags)) == (50, 1)
        assert result.interval[0] <= result.value <= result.interval[1]
        for part in ("weights wwww", "resize", "70 reference images", "sha256 ffff", "4 nearest"):
            assert part in result.protocol


def test_what_cannot_be_measured_is_refused():
    x = points(5, 3, 0)
    for k in (0, 5):
        with pytest.raises(ValueError, match=f"nearest_k is {k}"):
            manifold(x, points(9, 3, 1), k)
    other = FeatureSet("Other", "resize", x)
    with pytest.raises(ValueError, match="one extractor"):
        manifold_results(FeatureSet("EffNetLite0", "resize", x), other, 2)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_features_that_are_not_finite_are_refused(value):
    features = draw(12, 6, 0)
    features[4, 1] = value
    with pytest.raises(ValueError, match="features of images by EffNetLite0: number 5 of 12"):
        named(features)
    with pytest.raises(ValueError, match="number 5 of 12"):
        distance(draw(12, 6, 1), features)
