"""Next-clean-token prediction: cross-entropy against the clean next token, whatever noise the input has."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F


class TokenLoss(NamedTuple):
    """Loss in nats: `total` the mean over all codes, `per_token` (B, n)."""

    total: Tensor
    per_token: Tensor


def next_clean_token_loss(logits: Float[Tensor, "B n K"], image_ids: Int[Tensor, "B n"]) -> TokenLoss:
    """Plain cross-entropy at every image position; no regression term, no weight by t (paper).

    The law is normalised over the image codes, which is the law that decoding draws from (ours): logits of
    other tokens take no part.

    Args:
        logits: (B, n, K) at the position left of each code.
        image_ids: (B, n) the clean codes.

    Returns:
        The mean, and the loss of each token (B, n).
    """
    per_token = F.cross_entropy(logits.flatten(0, 1).float(), image_ids.flatten(), reduction="none")
    return TokenLoss(per_token.mean(), per_token.view_as(image_ids))
