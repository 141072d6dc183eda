"""How a trunk is run while decoding: its layers in turn as they are, or all through one compiled function.

Layers of one trunk differ by their weights alone, but each holds its own number, which the compiler would
guard on: it would compile every layer. So one copy of a layer without weights is called with the weights of
each (`torch.func.functional_call`), and all share what is compiled. The model itself is not touched.
"""

from __future__ import annotations

import copy
import inspect
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from sjd2_lightning.masks import Visible, additive
from sjd2_lightning.models.attention import DENSE, FLEX, SMALLEST_HEAD
from sjd2_lightning.models.backbone import Backbone, Trunk
from sjd2_lightning.models.kv_cache import KVCache, LayerCache
from sjd2_lightning.models.noise_gate import always_open

ARTEFACTS = 64  # versions of a layer that may be compiled: by sizes that are 1, dtype and device


class EagerTrunk(Trunk):
    """A trunk of transformers whose layers are called in turn, with its own forward for prompts alone.

    What that forward does around the layers takes a twentieth of a pass of the shipped model on a CPU.

    Args:
        backbone: the model; its `trunk` has `layers`, `norm` and `rotary_emb`.
    """

    def __init__(self, backbone: Backbone) -> None:
        super().__init__(backbone, compiled=False)
        trunk: Any = backbone.trunk
        self.trunk = trunk
        self.cache_name = cache_argument(trunk.layers[0])

    def run(self, embeddings: Tensor, positions: Tensor, visible: Visible, cache: KVCache) -> Tensor:
        named = {
            "attention_mask": additive(visible.dense(cache.num_visible), embeddings.dtype),
            "position_embeddings": self.trunk.rotary_emb(embeddings, positions),
            self.cache_name: cache,
        }
        self.backbone.open_gate(visible)
        hidden = embeddings
        # layers that training compiled are not compiled for windows too
        with torch.compiler.set_stance("force_eager") if self.backbone.compiled else nullcontext():
            for layer in self.trunk.layers:
                found = layer(hidden, **named)
                hidden = found[0] if isinstance(found, tuple) else found
        return self.trunk.norm(hidden)


class LayeredTrunk(Trunk):
    """A trunk of transformers, called layer by layer through one compiled function.

    Args:
        backbone: the model; its `trunk` has `layers`, `norm` and `rotary_emb`.
        flex: whether layers attend by FlexAttention; not those whose heads are smaller than it takes.
    """

    def __init__(self, backbone: Backbone, flex: bool = False) -> None:
        super().__init__(backbone, compiled=False)
        trunk: Any = backbone.trunk
        self.trunk = trunk
        self.head_size = backbone.new_cache(1, 1).keys[0].shape[-1]
        self.attention = FLEX if flex and self.head_size >= SMALLEST_HEAD else DENSE
        self.template = self.template_of(trunk.layers[0])
        self.groups = self.template.self_attn.num_key_value_groups
        self.cache_name = cache_argument(self.template)
        self.layer: Any = self.one_layer
        self.norm: nn.Module = trunk.norm
        self.prepare()

    def template_of(self, layer: nn.Module) -> Any:
        """A layer without weights, whose attention is ours."""
        template: Any = copy.deepcopy(layer).to("meta")
        template.self_attn.config._attn_implementation = self.attention.name
        always_open(template)
        return template

    def prepare(self) -> None:
        """Compiles what all layers share; sizes stay open, so that windows, rows and lengths share it too."""
        # not where FlexAttention runs on a CPU, whose code mixes up the names of open sizes (torch 2.14)
        opened = self.attention is DENSE or self.backbone.device.type != "cpu"
        self.layer = torch.compile(self.one_layer, dynamic=opened, fullgraph=True)
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, ARTEFACTS)

    def run(self, embeddings: Tensor, positions: Tensor, visible: Visible, cache: KVCache) -> Tensor:
        rotations = self.trunk.rotary_emb(embeddings, positions)
        mask = self.mask(visible, cache, embeddings.dtype)
        self.backbone.open_gate(visible)
        hidden = embeddings
        for number, weights in enumerate(self.weights):
            hidden = self.layer(weights, hidden, mask, rotations, cache.layer(number))
        return self.norm(hidden)

    def prefill(self, embeddings: Tensor, positions: Tensor, visible: Visible, cache: KVCache) -> None:
        # as they are now: a batch keeps its weights, and the next one may find other parameters
        self.weights = [weights_of(layer) for layer in self.trunk.layers]
        super().prefill(embeddings, positions, visible, cache)

    def mask(self, visible: Visible, cache: KVCache, dtype: torch.dtype) -> Any:
        """What the template's attention takes as its mask."""
        return self.attention.mask(visible, cache.num_visible, dtype, self.groups)

    def one_layer(
        self,
        weights: dict[str, Tensor],
        hidden: Tensor,
        mask: Any,
        rotations: tuple[Tensor, Tensor],
        cache: LayerCache,
    ) -> Tensor:
        """Hidden states (B, L, D) behind a layer.

        Args:
            weights: parameters and buffers of the layer, by name.
            hidden: (B, L, D) hidden states in front of it.
            mask: what `mask` gives.
            rotations: cosines and sines of the positions.
            cache: keys and values of the layer.
        """
        named = {"attention_mask": mask, "position_embeddings": rotations, self.cache_name: cache}
        found = functional_call(self.template, weights, (hidden,), named)
        return found[0] if isinstance(found, tuple) else found


class InvariantTrunk(LayeredTrunk):
    """The same through batch-invariant layers, prompts and head included; see `models.invariant`.

    Raises:
        ValueError: if the device or a part of the model has no invariant arithmetic.
    """

    def template_of(self, layer: nn.Module) -> Any:
        from sjd2_lightning.models import invariant

        if found := invariant.problems(self.head_size, self.backbone.device):
            raise ValueError("\n".join(found))
        template = invariant.invariant_copy(layer)
        always_open(template)
        return template

    def prepare(self) -> None:
        from sjd2_lightning.models import invariant

        self.norm = invariant.invariant_copy(self.trunk.norm)

    def prefill(self, embeddings: Tensor, positions: Tensor, visible: Visible, cache: KVCache) -> None:
        self.weights = [weights_of(layer) for layer in self.trunk.layers]
        self.run(embeddings, positions, visible, cache)

    def head(self, hidden: Tensor) -> Tensor:
        from sjd2_lightning.models import invariant

        return invariant.rowwise(self.backbone.image_logits, hidden)

    def mask(self, visible: Visible, cache: KVCache, dtype: torch.dtype) -> Any:
        return visible.filled()


def cache_argument(module: nn.Module) -> str:
    """What a trunk or layer of transformers calls its cache: `past_key_values` became `cache` in 5.24."""
    return "cache" if "cache" in inspect.signature(module.forward).parameters else "past_key_values"


def weights_of(layer: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of a layer, by name."""
    return {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
