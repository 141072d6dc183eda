"""From logits to laws: against float64 code written anew, and draws against their weights."""

from itertools import product

import numpy as np
import pytest
import torch
from scipy import stats

from sjd2_lightning.decoding.law import Sampling, draw, guided, has_law, log_law, residual
from tests.tools.enumeration import code_law, slot_scale


def _logits(*shape: int) -> torch.Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=0.5),
        Sampling(top_k=3),
        Sampling(top_k=99),
        Sampling(top_p=0.6),
        Sampling(top_p=1e-9),
        Sampling(temperature=1.7, top_k=6, top_p=0.8, guidance_scale=3.0),
        Sampling(guidance_scale=0.0, top_k=1),
    ],
    ids=str,
)
def test_laws(sampling):
    logits = _logits(2 * 50, 9)  # conditional rows, then unconditional ones
    single = logits[:50] if sampling.guidance_scale == 1 else logits
    ours = log_law(guided(single, sampling.guidance_scale), sampling).softmax(-1)
    sides = logits[:50].double().numpy(), logits[50:].double().numpy()
    theirs = code_law(*sides, sampling, sampling.guidance_scale)
    assert np.allclose(ours.numpy(), theirs, atol=1e-5)
    assert ((ours == 0).numpy() == (theirs == 0)).all()


def test_order_of_steps_is_temperature_top_k_top_p():
    """Top-p sees what top-k and temperature left: 0.5, 0.25 of (0.4, 0.2, 0.2, 0.2) by top-2 is 2/3, 1/3."""
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    kept = log_law(logits, Sampling(top_k=2, top_p=0.55)).softmax(-1)
    assert kept.tolist() == [1, 0, 0, 0]
    kept = log_law(logits, Sampling(top_k=2, top_p=0.55, temperature=4.0)).softmax(-1)
    assert (kept > 0).tolist() == [True, True, False, False]


def test_greedy_keeps_the_first_maximum_alone():
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    assert log_law(logits, Sampling(temperature=0)).softmax(-1).tolist() == [[0, 1, 0, 0], [1, 0, 0, 0]]


def test_low_temperature_approaches_greedy():
    logits = _logits(40, 9)
    cold = log_law(logits, Sampling(temperature=1e-3)).softmax(-1)
    assert torch.allclose(cold, log_law(logits, Sampling(temperature=0)).softmax(-1), atol=1e-3)


def test_guidance_pairs_conditional_with_unconditional_rows():
    logits = torch.tensor([[1.0], [2.0], [10.0], [20.0]], dtype=torch.bfloat16)
    assert guided(logits, 3.0).tolist() == [[10 - 27.0], [20 - 54.0]]
    assert guided(logits, 3.0).dtype == guided(logits, 1).dtype == torch.float32
    assert guided(logits, 1).tolist() == [[1], [2], [10], [20]]
    assert guided(logits, 0.0).tolist() == [[10], [20]]


def test_draws_follow_unnormalised_weights():
    weights = torch.tensor([0.0, 2.0, 0.0, 5.0, 1.0, 0.0])
    numbers = (torch.arange(80_000) + 0.5) / 80_000
    drawn = draw(weights.expand(80_000, 6), numbers)
    assert torch.allclose(drawn.bincount(minlength=6) / 80_000, weights / 8, atol=1e-4)


def test_draws_at_the_ends_have_weight():
    weights = torch.tensor([[0.0, 0.3, 0.7, 0.0], [0.1, 0.0, 0.0, 1e-8]])
    for number in (1e-9, 1 - 2**-24, 1.0):
        drawn = draw(weights, torch.full((2,), number))
        assert (weights.gather(1, drawn[:, None]) > 0).all()


def test_residual_is_the_positive_part_and_falls_back_to_the_target():
    target = torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]])
    draft = torch.tensor([[0.2, 0.2, 0.6], [0.2, 0.3, 0.5]])
    assert torch.allclose(residual(target, draft), torch.tensor([[0.3, 0.3, 0.0], [0.2, 0.3, 0.5]]))


def test_residual_after_acceptance_restores_the_target():
    """min(target, draft) + (1 - its mass) * normalised residual = target."""
    target, draft = _logits(30, 7).softmax(-1), _logits(60, 7)[30:].softmax(-1)
    accepted = torch.minimum(target, draft)
    rest = residual(target, draft)
    total = accepted + (1 - accepted.sum(-1, keepdim=True)) * rest / rest.sum(-1, keepdim=True)
    assert torch.allclose(total, target, atol=1e-6)


def test_guidance_by_slot():
    """One scale a slot, and the schedules that make them."""
    logits = _logits(2 * 3, 4, 9)
    scales = torch.tensor([1.5, 0.0, 2.5, 7.0]).expand(3, -1)
    together = guided(logits, scales)
    for slot in range(4):
        assert torch.allclose(together[:, slot], guided(logits[:, slot], float(scales[0, slot])), atol=1e-5)
    for schedule, wanted in [
        ("constant", [5.0] * 5),
        ("linear", [1.0, 2.0, 3.0, 4.0, 5.0]),
        ("interval", [1.0, 5.0, 5.0, 1.0, 1.0]),
    ]:
        sampling = Sampling(
            guidance_scale=5.0, guidance_schedule=schedule, guidance_start=0.2, guidance_end=0.6
        )
        assert sampling.scales(5).tolist() == wanted
        assert [slot_scale(sampling, slot, 5) for slot in range(5)] == wanted


def test_bad_values_are_all_named():
    found = Sampling(temperature=-1, top_k=-2, top_p=0, guidance_scale=-1).problems()
    assert [key for key in ("temperature", "top_k", "top_p", "guidance_scale") if key in " ".join(found)]
    assert len(found) == 4
    [line] = Sampling(guidance_start=0.5, guidance_end=0.5).problems()
    assert line.startswith("guidance_end=0.5: must be greater than guidance_start")
    assert not Sampling(temperature=0, top_p=1).problems()


def test_a_small_difference_of_laws_is_seen_by_the_test_of_draws():
    weights = torch.tensor([0.2, 0.3, 0.5])
    rng = torch.Generator().manual_seed(1)
    counts = draw(weights.expand(60_000, 3), torch.rand(60_000, generator=rng)).bincount().numpy()
    assert stats.chisquare(counts, 60_000 * np.array([0.2, 0.3, 0.5])).pvalue > 1e-6
    assert stats.chisquare(counts, 60_000 * np.array([0.22, 0.28, 0.5])).pvalue < 1e-12


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(0), Sampling(0.5, 2), Sampling(top_p=0.5)], ids=str
)
def test_what_is_no_law_is_seen_through_every_cut(sampling):
    nan, inf = torch.nan, torch.inf
    rows = [[0, 1, 2], [-inf, 1, 2], [-inf, -inf, 0], [nan, 1, 2], [0, 1, inf], [-inf] * 3, [inf, -inf, nan]]
    found = has_law(log_law(torch.tensor(rows).float(), sampling))
    assert found.tolist() == [True, True, True, False, False, False, False]


def test_guidance_keeps_a_banned_code_banned():
    """By both sides, or by the prompt's alone."""
    for theirs, scale in product((-torch.inf, 0.2), (3.0, 0.0, torch.tensor([3.0]))):
        mixed = guided(torch.tensor([[0.0, -torch.inf, 1.0], [0.5, theirs, 0.0]]), scale)
        assert mixed[0, 1] == -torch.inf
        assert mixed[0, [0, 2]].isfinite().all()


@pytest.mark.parametrize("uniform", [1e-9, 0.5, 1 - 1e-7])
def test_a_draw_from_nan_is_still_a_code(uniform):
    drawn = draw(torch.full((2, 5), torch.nan), torch.full((2,), uniform))
    assert ((drawn >= 0) & (drawn < 5)).all()
