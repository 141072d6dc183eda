"""Adapters that act on noisy tokens alone: clean tokens are computed by the weights as they were.

So training cannot change what the model draws: replay gives the images of the model that it began with, and
what is learnt shows in the number of passes alone.

Source of the gate: gated LoRA (Samragh et al. 2025, arXiv 2507.11851), there for mask tokens behind a text.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

NOISY_ONLY = "noisy_only"  # in the metadata of an adapter's weights


class NoiseGate:
    """What the updates of one model's adapter are multiplied by: 1 for noisy tokens, else 0.

    Args:
        model: model with a low-rank adapter of peft.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.noisy: Tensor | None = None
        self.is_shut = False  # the adapter is not even computed
        self.layers: list[Any] = [module for module in model.modules() if hasattr(module, "lora_B")]
        for layer in self.layers:
            for update in layer.lora_B.values():
                update.register_forward_hook(self._gated)

    def open_for(self, noisy: Bool[Tensor, "B L"] | None) -> None:
        """Sets which tokens of the next pass are noisy; where none is (None) the adapter costs nothing.

        Unless gradients are asked for: those of a clean batch are 0, and not missing.
        """
        self._set(noisy, noisy is None and not torch.is_grad_enabled())

    @contextmanager
    def opened_for(self, noisy: Bool[Tensor, "B L"] | None) -> Iterator[None]:
        """The same inside the block.

        Without gradients it is then as it was before: a backward pass that is still to come may compute
        layers of an earlier pass again.
        """
        before = self.noisy, self.is_shut
        self.open_for(noisy)
        try:
            yield
        finally:
            if not torch.is_grad_enabled():
                self._set(*before)

    def _set(self, noisy: Tensor | None, is_shut: bool) -> None:
        self.noisy, self.is_shut = noisy, is_shut
        for layer in self.layers:
            layer._disable_adapters = is_shut  # peft's public switch freezes the adapter too

    def _gated(self, module: nn.Module, inputs: Any, update: Tensor) -> Tensor:
        return update * (0 if self.noisy is None else self.noisy[..., None].to(update.dtype))

    def __deepcopy__(self, memo: dict[int, Any]) -> NoiseGate:
        if id(self.model) not in memo:
            return self  # a copied layer, to be compiled, belongs to the same model
        memo[id(self)] = copied = copy.copy(self)  # of a copied model: its own
        copied.model, copied.layers = memo[id(self.model)], copy.deepcopy(self.layers, memo)
        return copied


def always_open(template: nn.Module) -> None:
    """Lets a copied layer compute its adapter in every pass: it does not know when the model's gate opens."""
    for layer in template.modules():
        if hasattr(layer, "lora_B"):
            layer._disable_adapters = False  # type: ignore[assignment]
