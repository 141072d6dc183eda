"""Gumbel vectors given what they decided: the token, their law over tokens, noise made of them."""

import math

import pytest
import torch

from sjd2_lightning.decoding import DecodingConfig
from sjd2_lightning.decoding.method import Method
from sjd2_lightning.embedding import EmbeddingSpace
from sjd2_lightning.models.backbone import rows_with_newlines
from sjd2_lightning.noise import NoiseProcess, tied_noise, tied_rows
from sjd2_lightning.training.states import posterior_gumbel


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
    slots = Method(config, [rows_with_newlines(3, 4, 12, (3, 4))], table, 12)
    found = slots.fresh(torch.tensor([4, 5]), torch.arange(10).expand(2, -1))
    rows = EmbeddingSpace(table[:12]).normalise(table[:12])
    noise = tied_noise(found["gumbel"], tied_rows(rows, source == "tied_white"))
    assert torch.allclose(found["noisy"], noise, atol=1e-6)
    by_hand = sum(
        (float(found["gumbel"][1, 7, code]) - 0.577216) / 1.282550 * rows[code] / 12**0.5
        for code in range(12)
    )
    assert torch.allclose(noise[1, 7], by_hand, atol=1e-5) is (source == "tied")
