"""From logits to the law that tokens are drawn from: one path for every method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sjd2_lightning.run.values import Natural, Share, Within, wrong_values


@dataclass(frozen=True)
class Sampling:
    """What turns logits into the law of a slot.

    Attributes:
        temperature: 0 is greedy.
        top_k: keep the k likeliest codes; 0 keeps all.
        top_p: keep the smallest set of likeliest codes with this mass.
        guidance_scale: classifier-free guidance on logits; 1 is off and needs no unconditional rows.
        guidance_schedule: "constant"; "linear": from 1 at the first slot to `guidance_scale` at the last;
            "interval": `guidance_scale` from `guidance_start` to `guidance_end`, 1 elsewhere.
        guidance_start, guidance_end: shares of the image's slots, for "interval".
    """

    temperature: Annotated[float, Within(0, 1000)] = 1.0
    top_k: Natural = 0
    top_p: Annotated[float, Within(0, 1, without="least")] = 1.0
    guidance_scale: Annotated[float, Within(0, 1000)] = 1.0
    guidance_schedule: Literal["constant", "linear", "interval"] = "constant"
    guidance_start: Share = 0.0
    guidance_end: Share = 1.0

    def scales(self, num_slots: int) -> Float[Tensor, " N"]:
        """(N,) guidance scale of each slot of an image."""
        share = torch.arange(num_slots) / num_slots
        if self.guidance_schedule == "linear":
            return 1 + (self.guidance_scale - 1) * torch.linspace(0, 1, num_slots)
        if self.guidance_schedule == "interval":
            inside = (share >= self.guidance_start) & (share < self.guidance_end)
            return torch.where(inside, self.guidance_scale, 1.0)
        return torch.full((num_slots,), self.guidance_scale)

    def problems(self) -> list[str]:
        """What is wrong with the values, a line each, starting with the key."""
        found = wrong_values(self)
        if not found and self.guidance_start >= self.guidance_end:
            found.append(
                f"guidance_end={self.guidance_end}: must be greater than guidance_start, which is "
                f"{self.guidance_start}"
            )
        return found


def guided(
    logits: Float[Tensor, "rows *slots K"], guidance_scale: float | Tensor
) -> Float[Tensor, "B *slots K"]:
    """Classifier-free guidance `u + s (c - u)` on logits of stacked rows: conditional, then unconditional.

    A code that the prompt's side bans, by -inf, stays banned.

    Args:
        logits: (2B, ..., K); with a scale of 1 (B, ..., K), which are returned as they are.
        guidance_scale: one number, or (B, ...) one a slot.

    Returns:
        (B, ..., K) float32.
    """
    if isinstance(guidance_scale, Tensor):
        conditional, unconditional = logits.float().chunk(2)
        mixed = unconditional + guidance_scale[..., None] * (conditional - unconditional)
    elif guidance_scale == 1:
        return logits.float()
    else:
        conditional, unconditional = logits.float().chunk(2)
        mixed = torch.add(unconditional, conditional - unconditional, alpha=guidance_scale)
    return mixed.masked_fill_(conditional == -torch.inf, -torch.inf)


def log_law(logits: Float[Tensor, "*slots K"], sampling: Sampling) -> Float[Tensor, "*slots K"]:
    """Unnormalised log-probabilities (..., K) float32 after temperature, top-k, top-p; -inf where cut off.

    Ties at the top-k threshold are all kept. Greedy leaves the first maximum. Where a logit is NaN or +inf,
    or all are -inf, the largest score is not finite either, see `has_law`.
    """
    if sampling.temperature == 0:
        most, best = logits.max(-1, keepdim=True)
        return torch.full_like(logits, -torch.inf).scatter(-1, best, most - most)  # 0, or NaN
    scores = logits if sampling.temperature == 1 else logits / sampling.temperature
    if 0 < sampling.top_k < scores.shape[-1]:
        # the k-th largest value by selection: nothing is sorted
        threshold = scores.kthvalue(scores.shape[-1] - sampling.top_k + 1, dim=-1, keepdim=True).values
        scores = scores.masked_fill(scores < threshold, -torch.inf)
    if sampling.top_p < 1:
        ordered, order = scores.sort(dim=-1, descending=True)
        probs = ordered.softmax(-1)
        cut = probs.cumsum(-1) - probs >= sampling.top_p  # the first code is always kept
        scores = scores.masked_fill(torch.empty_like(cut).scatter_(-1, order, cut), -torch.inf)
    return scores


def has_law(log: Float[Tensor, "*slots K"]) -> Bool[Tensor, "*slots"]:
    """Whether scores (..., K) say a law: none is NaN or +inf, and one at least is more than -inf."""
    return log.amax(-1).isfinite()


def without_law(model: nn.Module, where: str) -> ValueError:
    """The error of logits that say no law, with its cause as far as the model's weights show it.

    Args:
        model: the model whose logits they are.
        where: place of the logits and the type of their numbers.
    """
    hurt = [
        name
        for name, value in model.named_parameters()
        # a tensor of torchao's has no such test
        if type(value) is nn.Parameter and type(value.data) is Tensor and not bool(value.isfinite().all())
    ]
    cause = "the weights are finite, so numbers overflow on their way: try model.dtype=bfloat16 or float32"
    if hurt:
        more = f" and {len(hurt) - 1} more" if len(hurt) > 1 else ""
        again = "get the weights again, or try model.dtype=float32"
        cause = f"the weight {hurt[0]}{more} holds NaN or infinity: {again}"
    return ValueError(f"the logits are not finite {where}: {cause}")


def draw(probs: Float[Tensor, "*slots K"], uniform: Float[Tensor, "*slots"]) -> Int[Tensor, "*slots"]:
    """Codes (...,) drawn from weights (..., K) by inversion of the cumulative sum.

    Weights need not be normalised; codes of weight zero are never drawn. Where they are NaN, which ends a
    decoding with an error, any code.

    Args:
        probs: non-negative weights with a positive sum.
        uniform: (...,) in (0, 1).
    """
    sums = probs.cumsum(-1)
    total = sums[..., -1:].contiguous()
    # below the total, onto which rounding may push it: the sum that first exceeds it is of a code with weight
    target = torch.minimum(uniform[..., None] * total, total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(sums, target, right=True).squeeze(-1).clamp_max(probs.shape[-1] - 1)


def residual(
    target_probs: Float[Tensor, "*slots K"], draft_probs: Float[Tensor, "*slots K"]
) -> Float[Tensor, "*slots K"]:
    """Weights `(target - draft)+`; where nothing is left, the target itself (Leviathan et al. 2023)."""
    rest = (target_probs - draft_probs).clamp_min(0)
    return torch.where(rest.sum(-1, keepdim=True) > 0, rest, target_probs)
