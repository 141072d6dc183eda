"""On-policy noise: training on the states that decoding itself goes through (ours).

The Gumbel vectors of a real image are drawn from their posterior, so that the image is the fixed point of
the replay map, and its trajectory comes from data: no samples of a teacher are needed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sjd2_lightning.noise import blend, kept_share
from sjd2_lightning.sequence import NoisyCodes


def decoding_states(
    noise: NoisyCodes,
    gumbel: Tensor,
    normalised: Tensor,
    path: str,
    logits_of: Callable[[NoisyCodes], Tensor],
) -> Tensor:
    """Normalised states (B, n, D) of noisy codes after the iterations that their levels tell of.

    All start as noise at the top level. In each iteration those that are to be cleaner take a step towards
    the code that is drawn for them, as `Window.renew` does. A pass without gradient for each level but one.

    Args:
        noise: levels (B, n) to reach, the grid, and eps (B, n, D).
        gumbel: (B, n, K) of the codes.
        normalised: (K, D) table.
        path: "flow" or "drafts", see `module.NoiseConfig`.
        logits_of: logits (B, n, K) of noisy codes.
    """
    levels, grid = noise.levels, noise.timesteps
    top = len(grid) - 1
    states = noise.eps.to(normalised)
    current = torch.where(levels > 0, top, 0)
    for level in range(top, 1, -1):
        drawn = (logits_of(NoisyCodes(current, grid, noise.eps, states)).log_softmax(-1) + gumbel).argmax(-1)
        kept = kept_share(grid[level], grid[level - 1]) * (path == "flow")
        moving = (levels < current)[..., None].to(states.device)
        x0_hat = torch.nn.functional.embedding(drawn, normalised)
        states = blend(states, x0_hat, kept.to(states).expand(1, 1)).where(moving, states)
        current = torch.where(levels < current, level - 1, current)
    return states
