"""What a teacher of actions shows a policy: the states of its Jacobi decodings, and labels by distance.

Source: CEED-VLA, arXiv 2506.13725; what it does not publish is chosen here and said so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sjd2_lightning.decoding.config import DecodingConfig
from sjd2_lightning.decoding.law import Sampling
from sjd2_lightning.decoding.loop import decode
from sjd2_lightning.decoding.output import Iteration
from sjd2_lightning.models.backbone import Backbone, ImageLayout
from sjd2_lightning.run.stages import counted

GREEDY = Sampling(temperature=0.0)


class Trajectories(NamedTuple):
    """Greedy Jacobi decodings of n prompts, from random codes to the fixed point.

    Attributes:
        states: (n, P, N) codes before each pass and, in the last of the P places, those at the end; a row
            that ended earlier repeats its end.
        num_passes: (n,) passes until the end, the one included that changed nothing.
    """

    states: Tensor
    num_passes: Tensor

    @property
    def ends(self) -> Tensor:
        """(n, N) the fixed points: what plain decoding draws."""
        return self.states[:, -1]

    def drawn(self, rows: Tensor, rng: torch.Generator) -> Tensor:
        """(B, N) a state of each of the rows (B,), each of a row's as likely, its end left out."""
        share = torch.rand(len(rows), generator=rng)
        return self.states[rows, (share * self.num_passes[rows]).long()]


def jacobi_trajectories(
    teacher: Backbone, prompts: Sequence[str], seeds: Sequence[int], layout: ImageLayout, batch: int = 256
) -> Trajectories:
    """Decodes prompts greedily by Jacobi's iteration and keeps every state on the way.

    Args:
        teacher: the model, in eval mode.
        prompts: n texts.
        seeds: n seeds of the random codes that each starts with.
        layout: layout of all.
        batch: prompts decoded at once.
    """
    num_slots = layout.num_slots
    config = DecodingConfig("jacobi", window=num_slots, acceptance="match", sampling=GREEDY)
    states = torch.zeros(len(prompts), num_slots + 1, num_slots, dtype=torch.int16)
    num_passes = torch.zeros(len(prompts), dtype=torch.long)
    with counted("following the teacher", len(prompts), "chunks") as advance:
        for start in range(0, len(prompts), batch):
            rows = slice(start, start + batch)
            kept = _Kept(states[rows])
            output = decode(teacher, prompts[rows], seeds[rows], config, layout, kept)
            num_passes[rows] = output.stats.nfe.cpu()
            ends = output.slot_ids.cpu().short()
            behind = torch.arange(num_slots + 1) >= num_passes[rows, None]
            states[rows] = torch.where(behind[..., None], ends[:, None], kept.states)
            advance(len(ends))
    return Trajectories(states, num_passes)


class _Kept:
    """Observer: writes the codes before each pass into `states` (B, P, N)."""

    def __init__(self, states: Tensor) -> None:
        self.states = states

    def __call__(self, iteration: Iteration) -> None:
        index, span = iteration.index, torch.arange(iteration.drafts.shape[1])
        own, following = self.states[:, index], self.states[:, index + 1]
        places = iteration.heads.cpu()[:, None] + span
        inside = places < own.shape[1]
        rows = iteration.rows.cpu()[:, None].expand_as(places)
        own[rows[inside], places[inside]] = iteration.drafts.cpu().short()[inside]
        # the next state begins as this one, with what this pass committed
        following.copy_(own)
        settled = inside & (span < iteration.num_committed.cpu()[:, None])
        following[rows[settled], places[settled]] = iteration.tokens.cpu().short()[settled]


def near_enough(teacher: Tensor, shown: Tensor, max_distance: float) -> Tensor:
    """(n,) bool: whether the label of a chunk is what the teacher decoded, and not the demonstration.

    Args:
        teacher, shown: (n, N) codes of the teacher and of the demonstrations.
        max_distance: largest mean distance over a chunk, in bins, at which the teacher is right; infinity
            takes all of the teacher's, -1 none. The paper leaves the norm's scale and the value open.
    """
    return (teacher - shown).abs().float().mean(1) <= max_distance
