"""Random numbers that belong to (prompt seed, slot, purpose, draw), not to the order of calls.

A counter-based generator: SplitMix64 (Steele, Lea, Flood 2014) over a mixed key, in integer tensor
operations. So the numbers of a prompt do not depend on its batch, its window or the device, and nothing has
to be kept between iterations.
"""

from __future__ import annotations

import math
from enum import IntEnum

import torch
from jaxtyping import Float, Int
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64


class Purpose(IntEnum):
    """What a number is drawn for; one stream each."""

    GUMBEL = 1
    INITIAL = 2
    NOISE = 3
    VERDICT = 4
    SIBLINGS = 5
    SIBLING_VERDICT = 6


def _shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # logical shift of a signed integer


def _wrapped(x: int) -> int:
    return (x + 2**63) % 2**64 - 2**63  # as int64 arithmetic overflows


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _MIX_1
    x = (x ^ _shift(x, 27)) * _MIX_2
    return x ^ _shift(x, 31)


def slot_keys(seeds: Tensor, slots: Tensor) -> Tensor:
    """Keys, int64, of slots of images; seeds and slots broadcast against each other."""
    return _mix(_mix(seeds + _GOLDEN) + (slots + 1) * _GOLDEN)


def stream(slot_key: Tensor, purpose: Purpose, draw: int | Tensor = 0) -> Tensor:
    """The key of one stream of a slot: what it is for, and in which iteration it is drawn.

    Args:
        slot_key: (...,) from `slot_keys`.
        purpose: what the numbers are for.
        draw: the iteration; several, int64, broadcast against the keys.
    """
    first = ((int(purpose) << 32) + 1) * _GOLDEN
    if isinstance(draw, Tensor):
        return _mix(slot_key + (draw * _GOLDEN + _wrapped(first)))
    return _mix(slot_key + _wrapped(first + draw * _GOLDEN))


def _bits(key: Tensor, count: int) -> Tensor:
    steps = torch.arange(1, count + 1, device=key.device) * _GOLDEN
    return _shift(_mix(key[..., None] + steps), 41)  # 23 bits: with the half of `uniform`, what float32 holds


def uniform(key: Int[Tensor, "*slots"], count: int) -> Float[Tensor, "*slots count"]:
    """(..., count) float32 in the open interval (0, 1)."""
    return (_bits(key, count).float() + 0.5) * 2.0**-23


def gumbel(key: Int[Tensor, "*slots"], count: int) -> Float[Tensor, "*slots count"]:
    """(..., count) standard Gumbel numbers, float32."""
    return -torch.log(-torch.log(uniform(key, count)))


def normal(key: Int[Tensor, "*slots"], count: int) -> Float[Tensor, "*slots count"]:
    """(..., count) standard normal numbers, float32 (Box-Muller)."""
    half = (count + 1) // 2
    u, v = uniform(key, 2 * half).chunk(2, dim=-1)
    radius, angle = torch.sqrt(-2 * torch.log(u)), 2 * math.pi * v
    return torch.cat([radius * angle.cos(), radius * angle.sin()], dim=-1)[..., :count]


def integers(key: Int[Tensor, "*slots"], bound: int) -> Int[Tensor, "*slots"]:
    """(...,) int64 uniform in [0, bound)."""
    return (uniform(key, 1)[..., 0].double() * bound).long().clamp_max(bound - 1)
