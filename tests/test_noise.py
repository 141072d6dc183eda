"""Noise: its moments, its limits, its grids, and the ramps of training."""

import math
from itertools import pairwise

import pytest
import torch

from sjd2_lightning.decoding import DecodingConfig
from sjd2_lightning.decoding.method import Method
from sjd2_lightning.embedding import EmbeddingSpace
from sjd2_lightning.models.backbone import rows_with_newlines
from sjd2_lightning.noise import NoiseProcess, denoise, perturb, tied_noise, tied_rows, timesteps
from sjd2_lightning.training.noise import RampLaw, draw_levels, random_timesteps
from sjd2_lightning.training.states import posterior_gumbel


def _normals(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_level_zero_is_the_identity_bit_for_bit():
    x0, eps = _normals(50, 16), _normals(50, 16, seed=1)
    assert torch.equal(perturb(x0, timesteps(4)[:1], eps), x0)


def test_top_level_is_pure_noise_bit_for_bit():
    x0, eps = 100 * _normals(50, 16), _normals(50, 16, seed=1)
    for kind in ("linear", "karras"):
        assert torch.equal(perturb(x0, timesteps(7, kind)[-1:], eps), eps)


@pytest.mark.parametrize("t", [0.2, 0.5, 1.0])
def test_moments(t):
    """Mean (1 - t) x0 and standard deviation t, within five standard errors."""
    num_draws = 200_000
    x0 = torch.tensor([2.0, -3.0, 0.5])
    xt = perturb(x0.expand(num_draws, 3), torch.tensor([t]), _normals(num_draws, 3))
    assert torch.allclose(xt.mean(0), (1 - t) * x0, atol=5 * t / num_draws**0.5)
    assert torch.allclose(xt.std(0), torch.full((3,), t), atol=5 * t / (2 * num_draws) ** 0.5)
    assert torch.corrcoef(xt.T).fill_diagonal_(0).abs().max() < 5 / num_draws**0.5


@pytest.mark.parametrize("kind", ["linear", "karras"])
@pytest.mark.parametrize("num_levels", [0, 1, 2, 5, 25])
def test_grid_rises_from_exactly_zero_to_exactly_one(kind, num_levels):
    grid = timesteps(num_levels, kind)
    assert grid.shape == (num_levels + 1,)
    assert grid[0] == 0
    assert (grid.diff() > 0).all()
    if num_levels:
        assert grid[-1] == 1


def test_linear_grid():
    assert timesteps(4).tolist() == [0, 0.25, 0.5, 0.75, 1]


@pytest.mark.parametrize(("num_levels", "t_min", "rho"), [(2, 0.02, 7.0), (5, 0.1, 7.0), (25, 0.002, 3.0)])
def test_karras_grid_is_edm_equation_five(num_levels, t_min, rho):
    """EDM's own form: from sigma_max = 1 down to sigma_min = t_min with i = 0..n-1, then zero."""
    largest, smallest = 1.0, t_min
    falling = [
        (largest ** (1 / rho) + i / (num_levels - 1) * (smallest ** (1 / rho) - largest ** (1 / rho))) ** rho
        for i in range(num_levels)
    ]
    wanted = torch.tensor([*falling, 0.0]).flip(0)
    assert torch.allclose(timesteps(num_levels, "karras", t_min, rho), wanted, atol=1e-6)
    assert timesteps(num_levels, "karras", t_min, rho)[1] == pytest.approx(t_min, rel=1e-4)


@pytest.mark.parametrize("kind", ["linear", "karras"])
def test_denoising_with_the_truth_follows_the_same_noise(kind):
    """`denoise(x_t, x0)` is `x_s` of the same eps, from every level to every lower one, t = 1 included."""
    x0, eps, grid = _normals(20, 8), _normals(20, 8, seed=1), timesteps(6, kind)
    for high in range(1, 7):
        for low in range(high):
            t, s = grid[high : high + 1], grid[low : low + 1]
            assert torch.allclose(denoise(perturb(x0, t, eps), x0, t, s), perturb(x0, s, eps), atol=1e-5)


def test_denoising_to_level_zero_is_the_estimate():
    xt, x0_hat = 1e4 * _normals(20, 8), _normals(20, 8, seed=1)
    for t in (0.01, 0.5, 1.0):
        assert torch.equal(denoise(xt, x0_hat, torch.tensor([t]), torch.zeros(1)), x0_hat)


def test_denoising_a_clean_slot_is_the_estimate():
    xt, x0_hat = _normals(20, 8), _normals(20, 8, seed=1)
    assert torch.equal(denoise(xt, x0_hat, torch.zeros(1), torch.zeros(1)), x0_hat)


def test_denoising_takes_a_level_for_each_slot():
    xt, x0_hat, grid = _normals(3, 8), _normals(3, 8, seed=1), timesteps(4)
    levels = torch.tensor([0, 2, 4])
    together = denoise(xt, x0_hat, grid[levels][:, None], grid[(levels - 1).clamp_min(0)][:, None])
    assert torch.equal(together[0], x0_hat[0])
    assert torch.allclose(together[1], 0.5 * xt[1] + 0.5 * x0_hat[1])
    assert torch.allclose(together[2], 0.75 * xt[2] + 0.25 * x0_hat[2])


@pytest.mark.parametrize("num_levels", [0, 1, 2, 6])
def test_random_grids_are_order_statistics_of_uniforms(num_levels):
    """From 0 to 1, sorted; the mean of the i-th of m uniforms is i / (m + 1), in five standard errors."""
    rng = torch.Generator().manual_seed(0)
    grids = torch.stack([random_timesteps(num_levels, rng) for _ in range(2000)])
    assert grids.shape == (2000, num_levels + 1)
    assert (grids[:, 0] == 0).all()
    if num_levels:
        assert (grids[:, -1] == 1).all()
        assert (grids[:, 1] > 0).all()
    assert (grids.diff(dim=1) >= 0).all()
    wanted = timesteps(num_levels)
    assert (grids.mean(0) - wanted).abs().max() < 5 * 0.29 / 2000**0.5


def test_unknown_schedule_and_negative_levels_are_named():
    with pytest.raises(ValueError, match="cosine"):
        timesteps(4, "cosine")
    with pytest.raises(ValueError, match="-1"):
        timesteps(-1)


LAW = RampLaw(clean_run=(2, 5), segment=(1, 3), top_run=(0, 4), clean_share=0.0)


def runs(row: list[int]) -> list[tuple[int, int]]:
    """(level, length) of each run of equal levels."""
    found: list[list[int]] = []
    for level in row:
        if found and found[-1][0] == level:
            found[-1][1] += 1
        else:
            found.append([level, 1])
    return [(level, length) for level, length in found]


@pytest.mark.parametrize("num_levels", [1, 2, 5])
def test_levels_form_a_chain_of_ramps(num_levels):
    """Inside a ramp a segment is followed by the next level; behind a ramp comes a clean run."""
    levels = draw_levels(120, 60, num_levels, LAW, torch.Generator().manual_seed(0))
    assert levels.shape == (120, 60)
    assert levels.dtype == torch.long
    assert set(levels.unique().tolist()) == set(range(num_levels + 1))
    tops = set()
    for row in levels.tolist():
        for (level, _), (following, _) in pairwise(runs(row)):
            assert following in (level + 1, 0)
            if following == 0:
                tops.add(level)
    assert tops == set(range(1, num_levels + 1)), "a ramp may stop at any level"


def test_run_lengths_keep_their_bounds():
    levels = draw_levels(150, 80, 4, LAW, torch.Generator().manual_seed(1))
    lengths: dict[str, set[int]] = {"clean": set(), "middle": set(), "top": set()}
    for row in levels.tolist():
        for level, length in runs(row)[1:-1]:  # the row's ends cut a run short
            lengths["clean" if level == 0 else "top" if level == 4 else "middle"].add(length)
    assert lengths == {"clean": {2, 3, 4, 5}, "middle": {1, 2, 3}, "top": set(range(1, 8))}


def test_a_sequence_may_start_inside_a_ramp():
    """As the window does when decoding starts; every level is a possible start."""
    levels = draw_levels(200, 6, 3, LAW, torch.Generator().manual_seed(2))
    assert set(levels[:, 0].tolist()) == {0, 1, 2, 3}


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_clean_share(share):
    law = RampLaw(clean_run=(1, 3), clean_share=share)
    clean = (draw_levels(800, 12, 3, law, torch.Generator().manual_seed(3)) == 0).all(1).float().mean()
    assert abs(clean - share) <= 5 * (share * (1 - share) / 800) ** 0.5


def test_levels_belong_to_the_generator():
    first, again, other = (draw_levels(8, 40, 4, LAW, torch.Generator().manual_seed(s)) for s in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first[0], first[1])


def test_no_levels_are_all_clean():
    assert not draw_levels(3, 20, 0, LAW, torch.Generator()).any()


def _laws(num_laws: int, num_codes: int, seed: int = 0) -> torch.Tensor:
    """(num_laws, K) log-probabilities, from nearly flat to nearly certain."""
    rng = torch.Generator().manual_seed(seed)
    sharpness = torch.linspace(0.1, 6, num_laws)[:, None]
    return (sharpness * torch.randn(num_laws, num_codes, generator=rng)).log_softmax(-1)


def _race(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.empty(shape).exponential_(generator=torch.Generator().manual_seed(seed))


def test_the_token_is_what_the_vector_decides():
    """Whatever the token: of likely ones, and of each code of every law."""
    log_probs = _laws(200, 30)[:, None].expand(-1, 30, -1)
    tokens = torch.arange(30).expand(200, -1)
    gumbel = posterior_gumbel(log_probs, tokens, _race(200, 30, 30))
    assert torch.equal((log_probs + gumbel).argmax(-1), tokens)
    assert torch.isfinite(gumbel).all()


def test_impossible_codes_are_never_decided():
    log_probs = torch.tensor([0.5, -math.inf, 0.5]).log_softmax(-1).expand(1000, 3)
    tokens = torch.tensor([0, 2]).repeat(500)
    gumbel = posterior_gumbel(log_probs, tokens, _race(1000, 3))
    assert torch.isfinite(gumbel).all()
    assert torch.equal((log_probs + gumbel).argmax(-1), tokens)


@pytest.mark.parametrize("law", [0, 2, 4])
def test_over_tokens_of_the_law_vectors_are_standard_gumbel(law):
    """Kolmogorov-Smirnov for each code, and all correlations; a false alarm once in 10^4 runs or rarer.

    9 codes of 20,000 draws: the statistic passes 2.45 / sqrt(n) with probability 2 exp(-2 * 2.45^2) = 1.2e-5
    each; one of 36 correlations passes five standard errors with probability 2e-5 in all.
    """
    num_draws, num_codes = 20_000, 9
    log_probs = _laws(5, num_codes)[law].expand(num_draws, -1)
    rng = torch.Generator().manual_seed(3)
    tokens = torch.multinomial(log_probs[0].exp(), num_draws, replacement=True, generator=rng)
    gumbel = posterior_gumbel(log_probs, tokens, _race(num_draws, num_codes))
    uniforms = torch.exp(-torch.exp(-gumbel.double())).sort(dim=0).values
    above = torch.arange(1, num_draws + 1).double()[:, None] / num_draws - uniforms
    distance = torch.maximum(above, 1 / num_draws - above).amax(0)
    assert (distance < 2.45 / math.sqrt(num_draws)).all(), distance
    correlation = torch.corrcoef(gumbel.T) - torch.eye(num_codes)
    assert correlation.abs().max() < 5 / math.sqrt(num_draws)


def test_the_maximum_does_not_depend_on_the_token():
    """The best perturbed score is standard Gumbel given any token: two moments in five standard errors."""
    num_draws = 50_000
    log_probs = _laws(5, 9)[2]
    for token in range(9):
        tokens = torch.full((num_draws,), token)
        gumbel = posterior_gumbel(log_probs.expand(num_draws, -1), tokens, _race(num_draws, 9, seed=token))
        best = (log_probs + gumbel).amax(-1)
        assert abs(best.mean() - 0.5772) < 5 * 1.2825 / num_draws**0.5
        assert abs(best.var() - math.pi**2 / 6) < 5 * 3.5 / num_draws**0.5  # kurtosis 5.4


@pytest.mark.parametrize("white", [False, True])
def test_tied_noise_has_mean_zero_and_variance_one(white):
    """Within five standard errors, of a table with correlated dimensions; white noise has none."""
    rng = torch.Generator().manual_seed(0)
    table = torch.randn(60, 8, generator=rng) @ torch.randn(8, 8, generator=rng) + 3
    rows = EmbeddingSpace(table).normalise(table)
    num_draws = 50_000
    noise = tied_noise(-_race(num_draws, 60).log(), tied_rows(rows, white))
    assert noise.mean(0).abs().max() < 5 / num_draws**0.5
    assert (noise.var(0) - 1).abs().max() < 5 * 1.6 / num_draws**0.5
    wanted = torch.eye(8) if white else torch.corrcoef(rows.T)
    assert (torch.corrcoef(noise.T) - wanted).abs().max() < 5 * 1.2 / num_draws**0.5
    assert (torch.corrcoef(rows.T) - torch.eye(8)).abs().max() > 0.3, "the table is correlated"


def test_white_noise_of_a_table_of_few_directions_is_finite():
    table = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    rows = tied_rows(EmbeddingSpace(table).normalise(table), white=True)
    values = torch.linalg.eigvalsh(rows.T @ rows)
    assert torch.allclose(values[-3:], torch.ones(3), atol=1e-4)
    assert torch.allclose(values[:-3], torch.zeros(13), atol=1e-4)


@pytest.mark.parametrize("source", ["tied", "tied_white"])
def test_decoding_starts_slots_from_the_noise_of_training(source):
    """The same Gumbel vectors give the same noise in both."""
    table = torch.randn(13, 6, generator=torch.Generator().manual_seed(0))
    config = DecodingConfig("sjd2", 5, 2, noise=NoiseProcess(source=source))
    layouts = [rows_with_newlines(3, 4, 12, (3, 4))] * 2
    state = Method(config, table, 12).begin(torch.tensor([4, 5]), layouts, 20)
    found = {"gumbel": state.gumbel, "noisy": state.noisy}
    rows = EmbeddingSpace(table[:12]).normalise(table[:12])
    noise = tied_noise(found["gumbel"], tied_rows(rows, source == "tied_white"))
    assert torch.allclose(found["noisy"], noise, atol=1e-6)
    by_hand = sum(
        (float(found["gumbel"][1, 7, code]) - 0.577216) / 1.282550 * rows[code] / 12**0.5
        for code in range(12)
    )
    assert torch.allclose(noise[1, 7], by_hand, atol=1e-5) is (source == "tied")
