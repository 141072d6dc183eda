"""A small policy: chunks of actions as codes, drawn one after another like those of an image (CEED-VLA).

The policy is a `Backbone`, so every decoding method, noisy state and teacher sample applies to it as it is: a
chunk of A steps by D dimensions is an "image" of A x D codes, and what is in front of it are the numbers of
an observation. Source: arXiv 2506.13725, whose policies are OpenVLA and LLaVA-VLA.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from sjd2_lightning.masks import Visible
from sjd2_lightning.models.backbone import Backbone, ImageLayout
from sjd2_lightning.models.kv_cache import KVCache
from sjd2_lightning.run.files import write_whole
from sjd2_lightning.run.values import Count, wrong_values

_SIZES, _WEIGHTS = "policy.json", "policy.safetensors"


@dataclass(frozen=True)
class PolicySizes:
    """Sizes of a policy.

    Attributes:
        num_bins: K, values that an action or a number of an observation is rounded to.
        num_steps: A, steps of a chunk, which are taken before the next look.
        num_dims: D, numbers of an action.
        num_numbers: numbers of an observation.
        width: width of the trunk.
        num_layers: its layers.
        head_width: width of an attention head.
    """

    num_bins: Count = 64
    num_steps: Count = 8
    num_dims: Count = 4
    num_numbers: Count = 8
    width: Count = 64
    num_layers: Count = 2
    head_width: Count = 16

    def problems(self) -> list[str]:
        """What is wrong with the values, a line each, starting with the key."""
        found = wrong_values(self)
        if not found and self.width % self.head_width:
            found.append(f"width={self.width}: must be a multiple of head_width={self.head_width}")
        return found


class ActionPolicy(Backbone):
    """A causal transformer over the numbers of an observation and the codes of a chunk.

    Args:
        sizes: its sizes.

    Raises:
        ValueError: sizes that do not fit together.
    """

    def __init__(self, sizes: PolicySizes) -> None:
        super().__init__()
        if found := sizes.problems():
            raise ValueError("; ".join(f"sizes.{line}" for line in found))
        self.sizes = sizes
        self.num_codes, self.hidden_size = sizes.num_bins, sizes.width
        num_slots = sizes.num_steps * sizes.num_dims
        self.num_positions = sizes.num_numbers + num_slots
        self.shortest_prompt = " ".join(["0"] * sizes.num_numbers)
        self.numbers = nn.Embedding(sizes.num_bins, sizes.width)
        self.codes = nn.Embedding(sizes.num_bins, sizes.width)
        self.places = nn.Embedding(self.num_positions, sizes.width)
        self.layers = nn.ModuleList(Layer(sizes, number) for number in range(sizes.num_layers))
        self.norm = nn.LayerNorm(sizes.width)
        self.head = nn.Linear(sizes.width, sizes.num_bins, bias=False)

    def layout(self, height: int, width: int) -> ImageLayout:
        own = (self.sizes.num_steps, self.sizes.num_dims)
        if (height, width) != own:
            raise ValueError(f"the policy draws chunks of {own[0]} steps x {own[1]}, not {height} x {width}")
        return ImageLayout(*own, (-1,) * (own[0] * own[1]), own)

    @property
    def chunk(self) -> ImageLayout:
        """The only layout that it has."""
        return self.layout(self.sizes.num_steps, self.sizes.num_dims)

    def prompt_ids(self, prompt: str, layout: ImageLayout) -> list[int]:
        """The numbers of an observation, written as whole numbers below `num_bins` with blanks between."""
        words, sizes = prompt.split(), self.sizes
        if len(words) != sizes.num_numbers or not all(
            word.isdecimal() and int(word) < sizes.num_bins for word in words
        ):
            raise ValueError(
                f"the observation {prompt[:60]!r} is not {sizes.num_numbers} whole numbers below "
                f"{sizes.num_bins}; write it by data.sources.pick_place.observation_text"
            )
        return [int(word) for word in words]

    def unconditional_ids(self, layout: ImageLayout, prompt_ids: Sequence[int] = ()) -> list[int]:
        return []  # an observation is always there: no guidance

    def embed_tokens(self, token_ids: Tensor) -> Tensor:
        return self.numbers(token_ids)

    def slot_table(self) -> Tensor:
        return self.codes.weight

    def forward(
        self,
        embeddings: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | Visible,
        cache: KVCache | None = None,
        noisy: Tensor | None = None,
    ) -> Tensor:
        assert isinstance(attention_mask, Tensor)
        # nothing is read right of the chunk, where a window may reach
        hidden = embeddings + self.places(position_ids.clamp_max(self.num_positions - 1))
        for layer in self.layers:
            hidden = layer(hidden, attention_mask, cache)
        return self.norm(hidden)

    def image_logits(self, hidden: Tensor) -> Tensor:
        return self.head(hidden)

    def image_head(self) -> Tensor:
        return self.head.weight

    def new_cache(self, batch: int, max_len: int) -> KVCache:
        sizes, weight = self.sizes, self.head.weight
        return KVCache(
            sizes.num_layers,
            batch,
            sizes.width // sizes.head_width,
            max_len,
            sizes.head_width,
            dtype=weight.dtype,
            device=weight.device,
        )

    def decode_images(self, image_ids: Tensor, layout: ImageLayout | None = None) -> Tensor:
        """Chunks (B, A, D) as grey pictures (B, 3, A, D): black is the least value of a dimension."""
        return (image_ids / (self.num_codes - 1))[:, None].expand(-1, 3, -1, -1)

    def save(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        save_file({name: value.to(dtype or value.dtype) for name, value in state.items()}, folder / _WEIGHTS)
        write_whole(folder / _SIZES, json.dumps(asdict(self.sizes), indent=1) + "\n")  # last: it is whole now


class Layer(nn.Module):
    """A pre-norm layer of a transformer.

    Args:
        sizes: sizes of the policy.
        number: number of the layer, by which a cache knows it.
    """

    def __init__(self, sizes: PolicySizes, number: int) -> None:
        super().__init__()
        width = sizes.width
        self.number, self.num_heads = number, width // sizes.head_width
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attended, self.mixed = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, hidden: Tensor, mask: Tensor, cache: KVCache | None) -> Tensor:
        """Hidden states (B, L, D) behind the layer, under a boolean mask (B, 1, L, S)."""
        parts = self.attended(self.before_attention(hidden)).chunk(3, dim=-1)
        query, key, value = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in parts)
        if cache is not None:
            key, value = cache.update(key, value, self.number)
        found = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        hidden = hidden + self.mixed(found.transpose(1, 2).flatten(2))
        return hidden + self.mlp(self.before_mlp(hidden))


def load_policy(folder: str | Path) -> ActionPolicy:
    """A policy that `ActionPolicy.save` wrote, in eval mode.

    Raises:
        ValueError: a file is missing, damaged, or does not fit the other.
    """
    folder = Path(folder)
    try:
        policy = ActionPolicy(PolicySizes(**json.loads((folder / _SIZES).read_text())))
        policy.load_state_dict(load_file(folder / _WEIGHTS))
    except (OSError, SafetensorError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"no policy in {folder} ({str(error).splitlines()[0]}); train one with experiment=ceed_teacher"
        ) from error
    return policy.eval()
