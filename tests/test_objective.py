"""Next-clean-token loss against a sum written out."""

import math

import torch

from sjd2_lightning.objective import next_clean_token_loss


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
