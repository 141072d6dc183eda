"""Next-clean-token prediction: cross-entropy against the clean next token, whatever noise the input has."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

HAS_CHUNKS = hasattr(torch.nn, "LinearCrossEntropyOptions")  # not in the oldest torch that is allowed
MANY_CODES = 32_768  # from so many on logits are not worth their memory


class TokenLoss(NamedTuple):
    """Loss in nats: `total` the mean over all codes, `per_token` (B, n)."""

    total: Tensor
    per_token: Tensor


class OwnLaw(NamedTuple):
    """What the model says of clean input, as a target: `log_probs` (B, n, K), and its `share` (B, n)."""

    log_probs: Tensor
    share: Tensor


def next_clean_token_loss(
    logits: Float[Tensor, "B n K"], image_ids: Int[Tensor, "B n"], own_law: OwnLaw | None = None
) -> TokenLoss:
    """Plain cross-entropy at every image position; no regression term, no weight by t (paper).

    The law is normalised over the image codes, which is the law that decoding draws from (ours): logits of
    other tokens take no part.

    With a share of the model's own law in the target it is consistency distillation too (consistency LLMs,
    Kou et al. 2024): the gradient is that of the divergence from the law at the fixed point, clean input, to
    the law behind noise. That law is what the true code is a draw of, so it says the same with less variance
    where the model is right, and teaches its errors where it is not.

    Args:
        logits: (B, n, K) at the position left of each code.
        image_ids: (B, n) the clean codes.
        own_law: target beside the clean codes; `None` is no share.

    Returns:
        The mean, and the loss of each token (B, n).
    """
    per_token = F.cross_entropy(logits.flatten(0, 1).float(), image_ids.flatten(), reduction="none")
    per_token = per_token.view_as(image_ids)
    if own_law is not None:
        soft = -(own_law.log_probs.exp() * logits.float().log_softmax(-1)).sum(-1)
        per_token = per_token.lerp(soft, own_law.share)
    return TokenLoss(per_token.mean(), per_token)


def chunked_loss(
    hidden: Float[Tensor, "B n D"], head: Float[Tensor, "K D"], image_ids: Int[Tensor, "B n"]
) -> TokenLoss:
    """The plain cross-entropy of the same law without its logits, by torch's chunked kernel.

    Some positions at a time are multiplied by the head, and once more in the backward pass.

    Args:
        hidden: (B, n, D) hidden states at the position left of each code.
        head: (K, D) of which the logits are `hidden @ head.T`.
        image_ids: (B, n) the clean codes.
    """
    from torch.nn import LinearCrossEntropyOptions

    device = hidden.device.type  # the kernel is none that autocast knows
    kind = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.dtype
    per_token = F.linear_cross_entropy(
        hidden.flatten(0, 1).to(kind),
        head.to(kind),
        image_ids.flatten(),
        reduction="none",
        options=LinearCrossEntropyOptions(),
    )
    per_token = per_token.float().view_as(image_ids)
    return TokenLoss(per_token.mean(), per_token)
