"""What the blocks of a TarFlow are like to invert: CRM and IGM, one pass, and the fastest schedules.

Source: GS-Jacobi for TarFlow (arXiv 2505.12849). Measured passes are the honest figure; the others tell it
ahead, more or less well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from sjd2_lightning.fixed_point import Schedule, solve, unroll
from sjd2_lightning.metrics.efficiency import timed
from sjd2_lightning.models.tarflow import BlockInverse, FlowBlock, TarFlow


@dataclass(frozen=True)
class BlockFigures:
    """How hard one block is to invert, on real pictures.

    Attributes:
        block: number of the block, from 0; the last one is inverted first.
        crm: convergence ranking metric, ||mean exp(-s) x|| ||W_s|| + ||W_u||, norms spectral.
        igm_given, igm_zero: initial guess metric, ||mean (one pass from a guess - x)||, of guesses z and 0.
        one_pass: mean over pictures of ||one pass from z - x||, Frobenius: no two errors cancel.
    """

    block: int
    crm: float
    igm_given: float
    igm_zero: float
    one_pass: float


@torch.no_grad()
def block_figures(flow: TarFlow, pixels: Tensor, text: Tensor) -> list[BlockFigures]:
    """CRM, IGM and the residual of one pass of every block.

    Args:
        flow: the flow, in eval mode.
        pixels: (N, 3, h, w) in about [-1, 1], with the noise of training.
        text: (N, D) vectors of their captions.
    """
    found, patches = [], flow.patches(pixels)
    for number, block in enumerate(flow.blocks):
        assert isinstance(block, FlowBlock)
        after, _ = block(patches, text)
        x, z = block.ordered(patches), block.ordered(after)
        scale, _ = block.scale_and_shift(0, x[:, :-1], text)
        weight_s, weight_u = block.out.weight.chunk(2)
        spread = _spectral((torch.exp(-scale) * x[:, 1:]).mean(0))
        zero = torch.cat([z[:, :1], torch.zeros_like(z[:, 1:])], dim=1)
        errors = [
            unroll(BlockInverse(block, z, text, flow.dropped_text, 0.0), guess, 1) - x for guess in (z, zero)
        ]
        found.append(
            BlockFigures(
                block=number,
                crm=spread * _spectral(weight_s) + _spectral(weight_u),
                igm_given=_spectral(errors[0].mean(0)),
                igm_zero=_spectral(errors[1].mean(0)),
                one_pass=float(errors[0].flatten(1).norm(dim=1).mean()),
            )
        )
        patches = after
    return found


def _spectral(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix, 2))


@torch.no_grad()
def fastest_schedules(
    flow: TarFlow,
    z: Tensor,
    text: Tensor,
    schedules: Mapping[str, Schedule],
    guidance: float = 0.0,
    repeats: int = 2,
) -> tuple[str, ...]:
    """Name of the fastest schedule of each block, in the order of inversion, for this batch and device.

    Args:
        flow: the flow, in eval mode.
        z: (B, T, C) what is inverted.
        text: (B, D) vectors of prompts.
        schedules: the schedules to choose from.
        guidance: see `BlockInverse`.
        repeats: number of timed inversions; the least time counts.
    """
    chosen = []
    for block in reversed(flow.blocks):
        assert isinstance(block, FlowBlock)
        own = block.ordered(z)
        times: dict[str, float] = {}
        for name, schedule in schedules.items():

            def invert(schedule: Schedule = schedule, block: FlowBlock = block, own: Tensor = own) -> Tensor:
                inverse = BlockInverse(block, own, text, flow.dropped_text, guidance)
                return solve(inverse, own, schedule).values

            runs = [timed(partial(invert), z.device) for _ in range(repeats)]
            times[name] = min(seconds for _, seconds in runs)
            values = runs[0][0]
        chosen.append(min(times, key=lambda name: times[name]))
        z = block.ordered(values)
    return tuple(chosen)
