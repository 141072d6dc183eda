"""Next-clean-token loss against a sum written out."""

import math

import pytest
import torch
from torch.nn import functional as F

from sjd2_lightning.training import objective
from sjd2_lightning.training.objective import OwnLaw, next_clean_token_loss
from tests.training.test_module import NOISE, OFF, batch_of, module_of


def test_loss_is_the_mean_negative_log_probability():
    rng = torch.Generator().manual_seed(0)
    logits, ids = torch.randn(3, 5, 7, generator=rng), torch.randint(7, (3, 5), generator=rng)
    wanted = [
        [math.log(sum(math.exp(x) for x in row)) - row[code] for row, code in zip(image, codes, strict=True)]
        for image, codes in zip(logits.tolist(), ids.tolist(), strict=True)
    ]
    loss = next_clean_token_loss(logits, ids)
    assert torch.allclose(loss.per_token, torch.tensor(wanted), atol=1e-5)
    assert torch.allclose(loss.total, torch.tensor(wanted).mean(), atol=1e-6)


def test_half_precision_logits_are_summed_in_single_precision():
    logits, ids = torch.zeros(2, 3, 1000, dtype=torch.bfloat16), torch.zeros(2, 3, dtype=torch.long)
    loss = next_clean_token_loss(logits, ids)
    assert loss.total.dtype == torch.float32
    assert torch.allclose(loss.total, torch.tensor(math.log(1000)), atol=1e-5)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_a_share_of_the_own_law_is_torch_cross_entropy_with_mixed_labels(share):
    """Against `cross_entropy` with probabilities as targets, and its gradient."""
    rng = torch.Generator().manual_seed(1)
    logits, ids = torch.randn(3, 5, 7, generator=rng), torch.randint(7, (3, 5), generator=rng)
    law = torch.randn(3, 5, 7, generator=rng).log_softmax(-1)
    behind = torch.rand(3, 5, generator=rng) < 0.5
    shares = share * behind
    mixed = torch.lerp(F.one_hot(ids, 7).float(), law.exp(), shares[..., None])
    gradients = []
    for call in (
        lambda x: next_clean_token_loss(x, ids, OwnLaw(law, shares)).total,
        lambda x: F.cross_entropy(x.flatten(0, 1), mixed.flatten(0, 1)),
    ):
        leaf = logits.clone().requires_grad_()
        loss = call(leaf)
        loss.backward()
        gradients.append((loss.detach(), leaf.grad))
    assert torch.allclose(gradients[0][0], gradients[1][0], atol=1e-6)
    assert torch.allclose(gradients[0][1], gradients[1][1], atol=1e-7)


@pytest.mark.parametrize("noise", ["off", "on"])
def test_chunks_give_the_losses_and_gradients_of_whole_logits(monkeypatch, noise):
    """In float32 to 1e-5, and the head's gradient with them."""
    batch, found, calls, real = batch_of(), {}, [], objective.chunked_loss
    monkeypatch.setattr(objective, "chunked_loss", lambda *given: calls.append(1) or real(*given))
    for name, most in (("chunks", 1), ("logits", 10**9)):
        monkeypatch.setattr(objective, "MANY_CODES", most)
        module = module_of(NOISE if noise == "on" else OFF)
        module.log = lambda *_, **__: None
        loss = module.training_step(batch, 0)
        loss.backward()
        found[name] = {"loss": loss.detach()} | {
            key: p.grad for key, p in module.named_parameters() if p.grad is not None
        }
    assert len(calls) == 1
    assert found["chunks"].keys() == found["logits"].keys()
    for key, value in found["logits"].items():
        assert torch.allclose(found["chunks"][key], value, atol=1e-5), key


def test_chunks_follow_autocast():
    rng = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(2, 8, 16, generator=rng), torch.randn(100, 16, generator=rng)
    ids = torch.randint(100, (2, 8), generator=rng)
    wanted = next_clean_token_loss(hidden @ head.T, ids).per_token
    with torch.autocast("cpu", torch.bfloat16):
        found = objective.chunked_loss(hidden, head, ids).per_token
    assert found.dtype == torch.float32
    assert not torch.equal(found, wanted)
    assert torch.allclose(found, wanted, atol=0.1)
