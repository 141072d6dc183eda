"""What of a layer's forward pass is kept for its backward pass, and what is computed again there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

Checkpointing = Literal["full", "selective", "none"]

_OPS = torch.ops.aten
_MATRIX = {_OPS.mm.default, _OPS.addmm.default}
_ATTENTION = {
    _OPS._scaled_dot_product_flash_attention.default,
    _OPS._scaled_dot_product_efficient_attention.default,
    _OPS._scaled_dot_product_cudnn_attention.default,
    _OPS._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.higher_order.flex_attention,
}


def checkpoint_arguments(kind: Literal["full", "selective"]) -> dict[str, Any]:
    """Arguments of `torch.utils.checkpoint.checkpoint`: `full` keeps a layer's input alone.

    `selective` keeps what attention found, whose cost grows with the square of the length, and every second
    matrix product; half of the products and all that is cheap are computed again.
    """
    found: dict[str, Any] = {"use_reentrant": False}
    return found if kind == "full" else found | {"context_fn": _contexts}


def _contexts() -> Any:
    return create_selective_checkpoint_contexts(_every_second())


def _every_second() -> Callable[..., CheckpointPolicy]:
    seen = {False: 0, True: 0}  # matrix products, of the forward pass and of computing again

    def policy(context: Any, op: Any, *_: Any, **__: Any) -> CheckpointPolicy:
        if op in _MATRIX:
            seen[context.is_recompute] += 1
        kept = op in _ATTENTION or (op in _MATRIX and seen[context.is_recompute] % 2 == 1)
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    return policy
