"""Pictures of a TarFlow by several inversions, side by side: the shared comparison, with pixels for codes.

Every batch is inverted by every method, in an order that rotates with the batch, as `jobs` does with codes.
Timing covers all blocks and their caches, not the text encoder or the denoising step.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from sjd2_lightning import __version__
from sjd2_lightning.decoding.config import BASELINE
from sjd2_lightning.evaluation.flow_methods import FlowMethod
from sjd2_lightning.evaluation.jobs import process_name, unfinished_batches
from sjd2_lightning.evaluation.prompts import PromptItem, check_prompts
from sjd2_lightning.evaluation.store import Record, RecordStore, discard_other_run, method_fields
from sjd2_lightning.fixed_point import Solution
from sjd2_lightning.metrics.efficiency import timed
from sjd2_lightning.models.image_tokenizer import to_uint8
from sjd2_lightning.models.tarflow import FlowBlock, TarFlow
from sjd2_lightning.run.files import sha256_of_json
from sjd2_lightning.run.provenance import weights_hash
from sjd2_lightning.run.stages import stage

EQUAL = 1e-3  # largest difference of a pixel in [-1, 1] that counts as equal: an eighth of a grey level


@dataclass(frozen=True, kw_only=True)
class FlowRecord(Record):
    """One picture of a flow.

    Attributes:
        block_passes: passes of each block, in the order of inversion.
        difference: largest difference of a pixel in [-1, 1] from the loop's picture, before denoising.
        num_nonfinite: iterates that were not finite.
    """

    block_passes: tuple[int, ...]
    difference: float
    num_nonfinite: int

    SAME: ClassVar[str] = f"to {EQUAL:g} in every pixel"

    def percent_equal(self, other: FlowRecord) -> int:
        """100 where neither is far from the loop's picture, else 0."""
        return 100 * (max(self.difference, other.difference) < EQUAL)


def invert_methods(
    flow: TarFlow,
    vectors: Mapping[str, Tensor],
    methods: Mapping[str, FlowMethod],
    prompts: Sequence[PromptItem],
    out_dir: str | Path,
    *,
    batch_size: int = 1,
    denoise: bool = True,
    replace: bool = False,
) -> RecordStore:
    """Draws all prompts by all methods; a killed run continues with the batch that it was at.

    Args:
        flow: the flow, in eval mode.
        vectors: (D,) vector of each prompt's text.
        methods: methods by name; with "ar", the loop.
        prompts: prompts with their seeds.
        out_dir: folder of records and images.
        batch_size: pictures inverted together.
        denoise: whether pictures lose their gaussian noise at the end.
        replace: remove records of another configuration, instead of raising.

    Raises:
        ValueError: unusable prompts, or a folder of another configuration.
    """
    check_prompts(prompts)
    device = flow.dropped_text.device
    identity = {
        "code": __version__,
        "weights": weights_hash(flow),
        "device": device.type,
        "methods": {name: method_fields(method) for name, method in methods.items()},
        "prompts": sha256_of_json([item.identity for item in prompts]),
        "batch_size": batch_size,
        "denoise": denoise,
    }
    if replace:
        discard_other_run(out_dir, identity)
    store = RecordStore(out_dir, identity, kind=FlowRecord)
    is_warm = False
    doing = "inverting", "pictures"
    for number, batch, order in unfinished_batches(prompts, list(methods), batch_size, store, doing):
        text = torch.stack([vectors[item.prompt] for item in batch]).to(device)
        z = start_of(flow, batch).to(device)
        calls = {
            name: partial(flow.invert, z, text, methods[name].schedules, methods[name].guidance)
            for name in order
        }
        if not is_warm:  # the first call of a shape is slower
            with stage("warming up"):
                is_warm = all(call() for call in calls.values())
        found = {name: timed(call, device) for name, call in calls.items()}
        loop = found[BASELINE][0][0]
        for name, ((pixels, solutions), seconds) in found.items():
            gaps = (pixels - loop).abs().amax((1, 2, 3)).tolist()
            shown = flow.denoised(pixels, text) if denoise and flow.sizes.noise == "gaussian" else pixels
            records = _records(flow, name, number, batch, solutions, gaps, seconds)
            store.append(records, to_uint8(((shown + 1) / 2).clamp(0, 1)))
    return store


def start_of(flow: TarFlow, prompts: Sequence[PromptItem]) -> Tensor:
    """(B, T, C) standard normal numbers of prompts' seeds: a picture does not depend on its batch."""
    shape = (flow.sizes.num_patches, 3 * flow.sizes.patch_size**2)
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(p.seed)) for p in prompts])


def _records(
    flow: TarFlow,
    method: str,
    number: int,
    batch: Sequence[PromptItem],
    solutions: Sequence[Solution],
    gaps: Sequence[float],
    seconds: float,
) -> list[FlowRecord]:
    """Records of one batch by one method; their settling map is that of the block with most passes."""
    passes = [int(solution.stats.nfe[0]) for solution in solutions]
    hardest = passes.index(max(passes))
    block = flow.blocks[len(solutions) - 1 - hardest]
    assert isinstance(block, FlowBlock)
    settled = torch.cat([torch.zeros(1, dtype=torch.long), solutions[hardest].stats.settled_iteration[0]])
    side = flow.sizes.image_size // flow.sizes.patch_size
    return [
        FlowRecord(
            key=item.key,
            prompt=item.prompt,
            seed=item.seed,
            method=method,
            batch=number,
            batch_size=len(batch),
            nfe=sum(passes),
            num_generated=sum(int(solution.stats.num_generated[row]) for solution in solutions),
            accepted=tuple(n for solution in solutions for n in solution.stats.accepted[row]),
            settled_iteration=tuple(block.ordered(settled[None, :, None]).flatten().tolist()),
            size=(side, side),
            seconds=seconds,
            process=process_name(os.getpid()),
            block_passes=tuple(passes),
            difference=gaps[row],
            num_nonfinite=sum(solution.num_nonfinite for solution in solutions),
        )
        for row, item in enumerate(batch)
    ]
