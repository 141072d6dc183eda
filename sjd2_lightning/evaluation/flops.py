"""Floating-point operations of decoding: counted on two forward passes, summed over the passes of a record.

A pass of L tokens that attend to S columns takes L (a + b S) operations: two passes that differ in S, counted
by torch, give a and b, and a record says at which prefix each of its passes was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sjd2_lightning.decoding.config import DecodingConfig
from sjd2_lightning.evaluation.store import ImageRecord
from sjd2_lightning.models.backbone import Backbone, ImageLayout


def decoding_flops(
    backbone: Backbone,
    methods: Mapping[str, DecodingConfig],
    records: Mapping[str, Sequence[ImageRecord]],
    layout: ImageLayout,
) -> dict[str, dict[str, float]]:
    """By method and key of an image, the operations of all passes of trunk and head; prefill excluded.

    Columns that a compiled or captured pass reads beyond what it needs are not counted.
    In `paper` mode accepted tokens that were fed noisy are fed again: they are counted as if all were, so the
    number is an upper bound there.

    Args:
        backbone: model, in eval mode.
        methods: methods by name.
        records: records of each method.
        layout: layout of the images.
    """
    lengths: dict[str, int] = {}
    for rows in records.values():
        for record in rows:
            if record.prompt not in lengths:
                lengths[record.prompt] = len(backbone.prompt_ids(record.prompt, layout))
    found, counted = {}, {}
    for name, config in methods.items():
        copies = 1 if config.sampling.guidance_scale == 1 else 2
        side = config.num_levels
        kind = (config.size, copies, side > 0)
        if kind not in counted:
            counted[kind] = _per_token(backbone, config.size, layout.num_slots, copies, side > 0)
        fixed, per_column = counted[kind]
        found[name] = {
            record.key: _of_record(record, config, side + lengths[record.prompt], fixed, per_column)
            for record in records[name]
        }
    return found


def pass_flops(
    backbone: Backbone, num_tokens: int, num_columns: int, copies: int = 1, noisy: bool = False
) -> int:
    """Operations of one forward of trunk and head, by torch's counter.

    Args:
        backbone: model.
        num_tokens: L, fed and read.
        num_columns: S >= L, attended to.
        copies: rows of an image: 2 with guidance.
        noisy: whether some tokens may be noisy, for which an adapter of noise alone is computed.
    """
    device = backbone.device
    table = backbone.slot_table()
    embeddings = torch.zeros(copies, num_tokens, table.shape[-1], dtype=table.dtype, device=device)
    columns = torch.arange(num_columns - num_tokens, num_columns, device=device).expand(copies, -1)
    mask = torch.ones(copies, 1, num_tokens, num_columns, dtype=torch.bool, device=device)
    cache = backbone.new_cache(copies, num_columns)
    cache.place(columns, num_columns)
    # The counter knows matrix products, and only some of the fused attention kernels.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        backbone.image_logits(backbone(embeddings, columns, mask, cache, columns >= 0 if noisy else None))
    return int(counter.get_total_flops())


def _per_token(
    backbone: Backbone, window: int, num_slots: int, copies: int, noisy: bool
) -> tuple[float, float]:
    """a and b of the module's formula."""
    near, far = window + 1, window + 1 + num_slots
    first, second = (pass_flops(backbone, window, columns, copies, noisy) / window for columns in (near, far))
    slope = (second - first) / num_slots
    return first - slope * near, slope


def _of_record(
    record: ImageRecord, config: DecodingConfig, first_slot: int, fixed: float, per_column: float
) -> float:
    total, head, again = 0.0, 0, 1
    for accepted in record.accepted:
        tokens = config.size - 1 + again
        columns = first_slot + head - 1 + config.size
        total += tokens * (fixed + per_column * columns)
        head += accepted
        again = max(1, accepted) if config.acceptance == "paper" else 1
    return total
