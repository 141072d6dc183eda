"""How a trunk is run while decoding: as the model's own forward, or layer by layer through one shared function.

Layers of one trunk differ by their weights alone, but each holds its own number, which the compiler would
guard on: it would compile every layer. So one copy of a layer without weights is called with the weights of
each (`torch.func.functional_call`), and all share what is compiled. The model itself is not touched.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from transformers import AttentionInterface

from sjd2_lightning.masks import Visible, additive
from sjd2_lightning.models.backbone import Backbone, KVCache, LayerCache

# (embeddings (B, L, D), positions (B, L), what each query sees, cache) -> hidden states (B, L, D)
Trunk = Callable[[Tensor, Tensor, Visible, KVCache], Tensor]

PACKED = "sjd2_packed"  # name of `packed_attention` in transformers
_ARTEFACTS = 64  # versions of a layer that may be compiled: by rows and window where they are 1, and by dtype


def trunk_of(backbone: Backbone, compiled: bool) -> Trunk:
    """What runs the trunk of a backbone.

    Args:
        backbone: the model; one without `layers` is compiled as a whole.
        compiled: whether through `torch.compile`.
    """
    trunk = getattr(backbone, "trunk", None)
    if compiled and hasattr(trunk, "layers"):
        return LayeredTrunk(trunk)
    forward = torch.compile(backbone, dynamic=True) if compiled else backbone

    def run(embeddings: Tensor, positions: Tensor, visible: Visible, cache: KVCache) -> Tensor:
        return forward(embeddings, positions, visible.dense(cache.num_visible), cache)

    return run


class LayeredTrunk:
    """A trunk of transformers, called layer by layer through one compiled function.

    Args:
        trunk: the module, with `layers`, `norm` and `rotary_emb`.
    """

    def __init__(self, trunk: Any) -> None:
        self.trunk = trunk
        self.template = copy.deepcopy(trunk.layers[0]).to("meta")
        self.template.self_attn.config._attn_implementation = PACKED
        self.groups = self.template.self_attn.num_key_value_groups
        # transformers renames the argument: 5.24 says `cache`
        names = inspect.signature(self.template.forward).parameters
        self.cache_name = "cache" if "cache" in names else "past_key_values"
        self.layer = torch.compile(self._layer, dynamic=True, fullgraph=True)
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _ARTEFACTS)

    def __call__(self, embeddings: Tensor, positions: Tensor, visible: Visible, cache: KVCache) -> Tensor:
        """Hidden states (B, L, D) of embeddings (B, L, D) at positions (B, L)."""
        rotations = self.trunk.rotary_emb(embeddings, positions)
        mask = additive(visible.dense(cache.num_visible), embeddings.dtype).repeat(1, 1, self.groups, 1)
        hidden = embeddings
        for number, layer in enumerate(self.trunk.layers):
            hidden = self.layer(weights_of(layer), hidden, mask, rotations, cache.layer(number))
        return self.trunk.norm(hidden)

    def _layer(
        self,
        weights: dict[str, Tensor],
        hidden: Tensor,
        mask: Tensor,
        rotations: tuple[Tensor, Tensor],
        cache: LayerCache,
    ) -> Tensor:
        named = {"attention_mask": mask, "position_embeddings": rotations, self.cache_name: cache}
        found = functional_call(self.template, weights, (hidden,), named)
        return found[0] if isinstance(found, tuple) else found


def weights_of(layer: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of a layer, by name."""
    return {**dict(layer.named_parameters()), **dict(layer.named_buffers())}


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Attention whose keys are never repeated: query heads that share a key head are further rows of it.

    transformers repeats keys and values for each query head as soon as there is a mask.

    Args:
        module: the attention of a layer.
        query: (B, H, L, D); H is a multiple of G.
        key, value: (B, G, S, D).
        attention_mask: (B, 1, H / G * L, S) additive; the same L rows for each head.
        scaling: factor of the scores.
    """
    rows = query.reshape(*key.shape[:2], -1, query.shape[-1])  # (B, G, H / G * L, D)
    found = F.scaled_dot_product_attention(rows, key, value, attn_mask=attention_mask, scale=scaling)
    return found.reshape(query.shape).transpose(1, 2), None


AttentionInterface.register(PACKED, packed_attention)
