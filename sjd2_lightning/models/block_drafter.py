"""A small network that guesses a block of slots from what a pass says of those to their left.

Slots to guess read the window of the pass through attention: the hidden states behind its laws, and the
drafts that now stand there. All are guessed at once; how decoding uses it is in `decoding.variants.drafter`.

Source: block-diffusion drafters that read the hidden states of the model that they draft for (DFlash, arXiv
2602.06036). Ours: a slot reads rows and columns of an image, and its guess is fitted to that on its left.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from sjd2_lightning.models.draft_corrector import code_rows

_HEAD_WIDTH = 32  # of attention
_ROWS, _COLUMNS = 4, 8  # differences of places that have a number of their own; those beyond share the last
_COPIED = 12.0  # what copying adds to the logit of a code that has all the weight, at first
_NEAR = 8.0  # what attention gives the slot one row up, at first


class Nearness(nn.Module):
    """What attention gives a slot for where it lies: a number for each difference of rows and columns.

    Args:
        num_heads: numbers of one difference.
    """

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        numbers = torch.zeros(num_heads, _ROWS, 2 * _COLUMNS + 1)
        numbers[:, 1, _COLUMNS] = _NEAR
        self.numbers = nn.Parameter(numbers)

    def forward(self, places: Float[Tensor, "rows all 2"], num: int) -> Float[Tensor, "rows heads Q all"]:
        """(B, heads, Q, W + Q) of the last Q slots towards all; -inf towards those on their right.

        Args:
            places: (B, W + Q, 2) row and column of the slots.
            num: Q.
        """
        rows, columns = (places[:, -num:, None] - places[:, None]).unbind(-1)
        index = rows.clamp(0, _ROWS - 1) * (2 * _COLUMNS + 1) + (columns + _COLUMNS).clamp(0, 2 * _COLUMNS)
        found = F.embedding(index.long(), self.numbers.flatten(1).T).movedim(-1, 1)
        size = places.shape[1]
        right = torch.ones(num, size, dtype=torch.bool, device=places.device).triu(size - num + 1)
        return found.masked_fill(right, -torch.inf)


class Reading(nn.Module):
    """Fresh slots read the window and the fresh slots to their left, then a small network.

    Args:
        width: U.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.num_heads = width, max(1, width // _HEAD_WIDTH)
        self.near = Nearness(self.num_heads)
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(width, 2 * width, bias=False)
        self.mix = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width, bias=False)
        for last in (self.mix, self.down):
            nn.init.zeros_(last.weight)

    def forward(self, fresh: Tensor, seen: Tensor, places: Tensor) -> Tensor:
        """(B, Q, U) what fresh slots (B, Q, U) become.

        Args:
            fresh: (B, Q, U) the slots that read.
            seen: (B, W, U) the window to their left.
            places: (B, W + Q, 2) row and column of all of them.
        """
        size = (self.width,)
        all_slots = torch.cat([F.rms_norm(seen, size), F.rms_norm(fresh, size)], dim=1)
        parts = self.query(all_slots[:, seen.shape[1] :]), *self.key_value(all_slots).chunk(2, dim=-1)
        query, key, value = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in parts)
        near = self.near(places, fresh.shape[1])
        read = F.scaled_dot_product_attention(query, key, value, attn_mask=near)
        fresh = fresh + self.mix(read.transpose(1, 2).flatten(2))
        return fresh + self.down(F.gelu(self.up(F.rms_norm(fresh, size))))


class Codes(NamedTuple):
    """What a drafter makes of codes.

    Attributes:
        read: (K + 1, U) what it reads of each; the last one is unknown.
        effect: (K, U) what units make of logits.
    """

    read: Tensor
    effect: Tensor


class Known(NamedTuple):
    """What fresh slots are known by, whatever their left neighbours become.

    Attributes:
        units: (B, Q, U) before these are added.
        copied: (B, Q, W + 1) what copying adds to the logits of the window's codes; last: of the neighbour's.
    """

    units: Tensor
    copied: Tensor


class BlockDrafter(nn.Module):
    """What a pass says of the slots right of its window: units, whose products with codes are logits.

    Many codes of an image repeat one nearby. So beside a network, whose units say which codes are likely, an
    attention of its own copies codes. It has no number for single codes, so that its size depends on neither
    vocabulary nor window.

    Args:
        hidden_size: D, width of hidden states and embeddings.
        width: U, number of units.
        num_layers: number of times that fresh slots read the window.
    """

    def __init__(self, hidden_size: int, width: int, num_layers: int = 1) -> None:
        super().__init__()
        if width % 4 or (width > _HEAD_WIDTH and width % _HEAD_WIDTH):
            raise ValueError(f"width={width}: must be a multiple of {_HEAD_WIDTH}, or of 4 below it")
        self.hidden_size, self.width = hidden_size, width
        self.state = nn.Linear(hidden_size, width)
        self.code = nn.Linear(hidden_size, width, bias=False)
        self.fresh = nn.Parameter(torch.randn(width) / 2)
        self.layers = nn.ModuleList(Reading(width) for _ in range(num_layers))
        self.last = nn.Linear(width, width)
        self.near = Nearness(1)
        self.pointer = nn.Linear(width, min(width, _HEAD_WIDTH))
        self.pointed = nn.Linear(width, min(width, _HEAD_WIDTH), bias=False)
        self.shares = nn.Linear(width, 2)
        self.out = nn.Linear(width, hidden_size, bias=False)
        for last in (self.out.weight, self.pointer.weight, self.pointer.bias, self.shares.weight):
            nn.init.zeros_(last)
        self.shares.bias.data = torch.tensor([_COPIED, 0.0])

    def of_codes(self, table: Float[Tensor, "rows D"], num_codes: int) -> Codes:
        """What it makes of K codes.

        Args:
            table: (K + structural, D) embeddings by slot id.
            num_codes: K.
        """
        rows = code_rows(table, num_codes)
        return Codes(self.code(rows), rows[:-1] @ self.out.weight)

    def known(
        self,
        hidden: Float[Tensor, "rows W D"],
        standing: Int[Tensor, "rows W"],
        places: Float[Tensor, "rows all 2"],
        codes: Codes,
    ) -> Known:
        """What fresh slots are known by.

        Args:
            hidden: (B, W, D) hidden states that the laws of the window were read from.
            standing: (B, W) codes that stand there now; K = unknown.
            places: (B, W + Q, 2) row and column of the window's slots, then of the fresh ones.
            codes: what is made of codes.
        """
        size, num = hidden.shape[1], places.shape[1] - hidden.shape[1]
        seen = self.state(F.rms_norm(hidden.float(), (self.hidden_size,))) + F.embedding(standing, codes.read)
        fresh = self.fresh.expand(len(hidden), num, -1)
        for layer in self.layers:
            fresh = layer(fresh, seen, places)
        near = self.near(places, num)[:, 0, :, :size]
        looks = self.pointer(fresh) @ self.pointed(F.rms_norm(seen, (self.width,))).mT
        weights = (looks / self.pointed.out_features**0.5 + near).softmax(-1)  # (B, Q, W)
        of_window, of_left = self.shares(fresh).chunk(2, dim=-1)
        return Known(self.last(fresh), torch.cat([of_window * weights, of_left], dim=-1))

    def units(self, known: Known, lefts: Int[Tensor, "rows Q"], codes: Codes) -> Float[Tensor, "rows Q U"]:
        """(B, Q, U) units of fresh slots, by the codes (B, Q) to their left."""
        return F.gelu(known.units + F.embedding(lefts, codes.read))

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file, in half precision."""
        save_file({name: value.half().contiguous() for name, value in self.state_dict().items()}, path)

    @classmethod
    def load(cls, path: str | Path, hidden_size: int) -> BlockDrafter:
        """Reads a file of `save`.

        Raises:
            ValueError: the file is something else, or of a model of another width.
        """
        try:
            state = {name: value.float() for name, value in load_file(path).items()}
            width, theirs = state["code.weight"].shape
            layers = {name.split(".")[1] for name in state if name.startswith("layers.")}
            found = cls(theirs, width, len(layers))
            found.load_state_dict(state)
        except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
            raise ValueError(f"{path} is no drafter of blocks: {error}") from None
        if theirs != hidden_size:
            raise ValueError(
                f"the drafter {path} is of a model of width {theirs}, this one has {hidden_size}; train one "
                "for this model by `sjd2 drafter`"
            )
        return found.requires_grad_(False)


def copied_logits(
    copied: Float[Tensor, "rows Q all"],
    standing: Int[Tensor, "rows W"],
    lefts: Int[Tensor, "rows Q"],
    num_codes: int,
) -> Float[Tensor, "rows Q K"]:
    """(B, Q, K) what copying adds to logits; what is unknown is not copied.

    Args:
        copied: (B, Q, W + 1) of `Known`, both sides of guidance combined.
        standing: (B, W) codes of the window; K = unknown.
        lefts: (B, Q) codes to the left; K = unknown.
        num_codes: K.
    """
    which = (standing[..., None] == torch.arange(num_codes, device=standing.device)).to(copied)
    found = F.pad(copied[..., :-1] @ which, (0, 1))  # a place for what is unknown
    return found.scatter_add(-1, lefts[..., None], copied[..., -1:])[..., :-1]
