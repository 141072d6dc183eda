"""What turns gradients into steps: AdamW, also with states of 8 bits, or Muon for the trunk's matrices.

The learning rate warms up and decays by a cosine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

import torch
from torch.nn import Parameter
from torch.optim.lr_scheduler import LambdaLR

from sjd2_lightning.run.values import Natural, Share, Within, wrong_values

_LOOKUPS = ("embed", "head")  # parts of the names of tables whose rows are tokens: Muon does not suit them
_PARTS, _CONTEXT = "eight_bit_parts", "eight_bit_context"  # of a tensor of torchao's, in a checkpoint

DecayRate = Annotated[float, Within(0, 1, without="most")]


@dataclass(frozen=True)
class OptimizerConfig:
    """Linear warm-up to `lr`, then cosine decay to `final_lr_share * lr`.

    Attributes:
        name: `adamw`; `adamw8bit`: the same with its two moments in a byte each (Dettmers et al. 2021), by
            torchao; or `muon`: the trunk's matrices take orthogonalised momentum steps (Jordan et al. 2024)
            of the size of AdamW's (Liu et al. 2025), everything else AdamW's own.
        lr: peak learning rate.
        weight_decay: decay of matrices; biases and gains do not decay.
        betas: AdamW's decay rates of the two moments.
        warmup_steps: number of optimizer steps of the warm-up.
        final_lr_share: learning rate at the end, as a share of `lr`.
        freeze: prefixes of names of the backbone's parameters that are not trained.
    """

    name: Literal["adamw", "adamw8bit", "muon"] = "adamw"
    lr: Annotated[float, Within(0, 100, without="least")] = 2e-4
    weight_decay: Annotated[float, Within(0, 1000)] = 0.05
    betas: tuple[DecayRate, DecayRate] = (0.9, 0.95)
    warmup_steps: Natural = 50
    final_lr_share: Share = 0.05
    freeze: tuple[str, ...] = ()

    def problems(self) -> list[str]:
        """What is wrong with the values, a line each, starting with the key."""
        return wrong_values(self)


def build_optimizer(
    named_parameters: Iterable[tuple[str, Parameter]],
    config: OptimizerConfig,
    rates: Mapping[str, float] | None = None,
) -> torch.optim.Optimizer:
    """The optimizer of all parameters that are trained.

    Args:
        named_parameters: parameters with their names; those without a gradient are left out.
        config: which optimizer, and its numbers.
        rates: peak learning rates of parts of their own, which AdamW trains, by prefixes of names.
    """
    trained = [(name, p) for name, p in named_parameters if p.requires_grad]
    apart = [
        {"params": own, "lr": rate, "weight_decay": 0.0}
        for prefix, rate in (rates or {}).items()
        if (own := [p for name, p in trained if name.startswith(prefix)])
    ]
    trained = [(name, p) for name, p in trained if not name.startswith(tuple(rates or ()))]
    tables = [p for name, p in trained if p.ndim > 1 and any(part in name for part in _LOOKUPS)]
    matrices = [p for name, p in trained if p.ndim > 1 and not any(part in name for part in _LOOKUPS)]
    decay, lr = config.weight_decay, config.lr
    vectors = {"params": [p for _, p in trained if p.ndim <= 1], "weight_decay": 0.0}
    if config.name != "muon":
        groups = [{"params": tables + matrices, "weight_decay": decay}, vectors, *apart]
        if config.name == "adamw":
            return torch.optim.AdamW(groups, lr=lr, betas=config.betas)
        from torchao.optim import AdamW8bit

        return AdamW8bit(groups, lr=lr, betas=config.betas)
    from timm.optim import Muon, muon  # a second to import

    if matrices and matrices[0].device.type == "cpu" and not torch.cpu._is_avx512_bf16_supported():
        # timm orthogonalises in bfloat16 and has no option: 20 times slower without bf16 units
        name = "zeropower_via_newtonschulz"
        original = getattr(muon, name)
        setattr(muon, name, partial(getattr(original, "func", original), dtype=torch.float32))
    groups = [
        {"params": matrices, "weight_decay": decay},
        {"params": tables, "weight_decay": decay, "use_fallback": True},
        *({**group, "use_fallback": True} for group in (vectors, *apart)),
    ]
    return Muon(groups, lr=lr, betas=config.betas, adjust_lr_fn="match_rms_adamw")


def plain_states(found: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state without tensors of torchao's, which checkpoints do not hold: by their parts.

    Args:
        found: what `state_dict` of the optimizer gave; it is left as it is.
    """

    def plain(value: Any) -> Any:
        if not hasattr(value, "qmap"):
            return value
        names, context = value.__tensor_flatten__()
        return {_PARTS: {name: getattr(value, name) for name in names}, _CONTEXT: list(context)}

    return _with_states(found, plain)


def whole_states(found: dict[str, Any], name: str) -> dict[str, Any]:
    """What `plain_states` was given.

    Args:
        found: what it gave.
        name: name of the optimizer that goes on from it.

    Raises:
        ValueError: the states have 8 bits, and the optimizer another name.
    """

    def whole(value: Any) -> Any:
        if not isinstance(value, dict) or _PARTS not in value:
            return value
        if name != "adamw8bit":
            raise ValueError(
                f"optimizer.name={name}: the checkpoint has states of 8 bits; go on with "
                "optimizer=adamw8bit, or begin anew"
            )
        from torchao.optim.subclass_8bit import OptimState8bit

        return OptimState8bit.__tensor_unflatten__(value[_PARTS], value[_CONTEXT])

    return _with_states(found, whole)


def _with_states(found: dict[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    if "state" not in found:  # DeepSpeed's own
        return found
    states = {
        parameter: {name: change(value) for name, value in own.items()}
        for parameter, own in found["state"].items()
    }
    return {**found, "state": states}


def warmup_cosine(optimizer: torch.optim.Optimizer, config: OptimizerConfig, num_steps: int) -> LambdaLR:
    """The learning rate by step: linear warm-up, then a cosine that ends at step `num_steps`."""

    def share(step: int) -> float:
        if step < config.warmup_steps:
            return (step + 1) / config.warmup_steps
        done = min(1.0, (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps))
        return config.final_lr_share + (1 - config.final_lr_share) * 0.5 * (1 + math.cos(math.pi * done))

    return LambdaLR(optimizer, share)


def with_one_cycle(
    optimizer: torch.optim.Optimizer, lr: float, num_steps: int, warmup_share: float
) -> dict[str, Any]:
    """What `configure_optimizers` returns where the rate rises to a peak once, then falls by a cosine.

    Args:
        optimizer: what steps.
        lr: learning rate at the peak.
        num_steps: number of steps of the whole training.
        warmup_share: share of the steps in which the rate rises.
    """
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=num_steps + 1, pct_start=warmup_share, cycle_momentum=False
    )
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
