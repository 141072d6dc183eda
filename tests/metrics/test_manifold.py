"""Precision, recall, density and coverage: equal to a brute force, known cases, and what is refused."""

import numpy as np
import pytest
import torch

from sjd2_lightning.metrics import manifold as module
from sjd2_lightning.metrics.features import FeatureSet
from sjd2_lightning.metrics.manifold import MANIFOLD, manifold, manifold_results


def draw(num, dim, seed, shift=0.0, scale=1.0):
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
    fake, real = draw(40, 4, 0, shift, 0.8), draw(55, 4, 1)
    assert means(fake, real, k) == pytest.approx(brute_force(fake, real, k), abs=1e-12)


def test_repeated_images_equal_a_brute_force():
    """White pictures are one point: radii of 0, which rounding must not open."""
    points = draw(20, 64, 0, scale=100.0)
    fake, real = points.repeat(3, 1), torch.cat([points.repeat(3, 1), draw(4, 64, 1)])
    expected = brute_force(fake, real, 2)
    assert expected["precision"] == 0
    assert means(fake, real, 2) == pytest.approx(expected, abs=1e-12)


def test_known_cases():
    real = draw(300, 8, 0)
    same = means(real.clone(), real, 5)
    assert (same["precision"], same["recall"], same["coverage"]) == (1, 1, 1)
    assert set(means(real + 100, real, 5).values()) == {0}
    one_mode = means(draw(300, 8, 1, scale=0.05), real, 5)  # all in the middle: likely, and nothing else
    assert one_mode["precision"] > 0.95
    assert one_mode["recall"] < 0.05
    law = means(draw(300, 8, 2), real, 5)
    assert law["density"] == pytest.approx(1, abs=0.15)  # its expectation for equal laws
    assert law["coverage"] == pytest.approx(1 - 0.5**5, abs=0.06)


def test_blocks_change_nothing(monkeypatch):
    fake, real = draw(50, 6, 0, 0.5), draw(70, 6, 1)
    whole = means(fake, real, 4)
    monkeypatch.setattr(module, "_BLOCK", 16)
    assert means(fake, real, 4) == whole


def test_results_carry_what_is_needed_to_read_them():
    fake = FeatureSet("EffNetLite0", "resize", draw(50, 6, 0, 0.5), "w" * 64)
    real = FeatureSet("EffNetLite0", "resize", draw(70, 6, 1), "w" * 64, "f" * 64)
    found = manifold_results(fake, real, 4, num_resamples=100)
    assert tuple(found) == MANIFOLD
    for name, result in found.items():
        assert result.name == f"{name}_EffNetLite0"
        assert (result.num_images, len(result.flags)) == (50, 1)
        assert result.interval[0] <= result.value <= result.interval[1]
        for part in ("weights wwww", "resize", "70 reference images", "sha256 ffff", "4 nearest"):
            assert part in result.protocol


def test_what_cannot_be_measured_is_refused():
    x = draw(5, 3, 0)
    for k in (0, 5):
        with pytest.raises(ValueError, match=f"nearest_k is {k}"):
            manifold(x, draw(9, 3, 1), k)
    other = FeatureSet("Other", "resize", x)
    with pytest.raises(ValueError, match="one extractor"):
        manifold_results(FeatureSet("EffNetLite0", "resize", x), other, 2)
