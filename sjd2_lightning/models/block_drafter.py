"""A small network that guesses a block of slots from what a pass says of those to their left.

Slots to guess read the window of the pass through attention: the hidden states behind its laws, and the
drafts that now stand there. All are guessed at once; how decoding uses it is in `decoding.variants.drafter`.

Source: block-diffusion drafters that read the hidden states of the model that they draft for (DFlash, arXiv
2602.06036). Ours: a slot reads rows and columns of an image, and its guess is fitted to that on its left.
"""

from __future__ import annotations

from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from sjd2_lightning.models.draft_corrector import code_rows

_HEAD_WIDTH = 32  # of attention: rotations need a multiple of 4
_SLOWEST = 100.0  # places after which the slowest rotation has turned by one radian


class Reading(nn.Module):
    """Fresh slots read the window and the fresh slots to their left, then a small network.

    Args:
        width: U.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.num_heads = width, max(1, width // _HEAD_WIDTH)
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(width, 2 * width, bias=False)
        self.mix = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width, bias=False)
        for last in (self.mix, self.down):
            nn.init.zeros_(last.weight)

    def forward(self, fresh: Tensor, seen: Tensor, places: Tensor, mask: Tensor) -> Tensor:
        """(B, Q, U) what fresh slots (B, Q, U) become.

        Args:
            fresh: (B, Q, U) the slots that read.
            seen: (B, W, U) the window to their left.
            places: (B, W + Q, 2) row and column of all of them.
            mask: (Q, W + Q) True = it may look there.
        """
        size = (self.width,)
        all_slots = torch.cat([F.rms_norm(seen, size), F.rms_norm(fresh, size)], dim=1)
        query = self._turned(self.query(all_slots[:, seen.shape[1] :]), places[:, seen.shape[1] :])
        key, value = self.key_value(all_slots).chunk(2, dim=-1)
        read = F.scaled_dot_product_attention(
            query, self._turned(key, places), self._by_head(value), attn_mask=mask
        )
        fresh = fresh + self.mix(read.transpose(1, 2).flatten(2))
        return fresh + self.down(F.gelu(self.up(F.rms_norm(fresh, size))))

    def _by_head(self, values: Tensor) -> Tensor:
        return values.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def _turned(self, values: Tensor, places: Tensor) -> Tensor:
        """(B, heads, n, U / heads) rotated by row and column: products know differences of places alone."""
        first, second = self._by_head(values).chunk(2, dim=-1)
        num = first.shape[-1] // 2
        pace = _SLOWEST ** (-torch.arange(num, device=values.device) / num)
        angles = (places[..., None] * pace).flatten(2)[:, None]  # (B, 1, n, 2 num)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


class BlockDrafter(nn.Module):
    """What a pass says of the slots right of its window: units whose products with codes are logits.

    It has no numbers for single codes, nor for single places: its size depends on neither vocabulary nor
    window.

    Args:
        hidden_size: D, width of hidden states and embeddings.
        width: U, number of units.
        num_layers: number of times that fresh slots read the window.
    """

    def __init__(self, hidden_size: int, width: int, num_layers: int = 1) -> None:
        super().__init__()
        if width % 4 or (width > _HEAD_WIDTH and width % _HEAD_WIDTH):
            raise ValueError(f"width={width}: must be a multiple of {_HEAD_WIDTH}, or of 4 below it")
        self.hidden_size = hidden_size
        self.state = nn.Linear(hidden_size, width)
        self.code = nn.Linear(hidden_size, width, bias=False)
        self.fresh = nn.Parameter(torch.randn(width) / 2)
        self.layers = nn.ModuleList(Reading(width) for _ in range(num_layers))
        self.known_by = nn.Linear(width, width)
        self.out = nn.Linear(width, hidden_size, bias=False)

    def of_codes(self, table: Float[Tensor, "rows D"], num_codes: int) -> tuple[Tensor, Tensor]:
        """What codes are read as, (K + 1, U), the last one unknown, and what units make of logits, (K, U).

        Args:
            table: (K + structural, D) embeddings by slot id.
            num_codes: K.
        """
        rows = code_rows(table, num_codes)
        return self.code(rows), rows[:-1] @ self.out.weight

    def known(
        self,
        hidden: Float[Tensor, "rows W D"],
        drafts: Float[Tensor, "rows W U"],
        places: Float[Tensor, "rows all 2"],
    ) -> Float[Tensor, "rows Q U"]:
        """(B, Q, U) what fresh slots are known by, whatever their left neighbours become.

        Args:
            hidden: (B, W, D) hidden states that the laws of the window were read from.
            drafts: (B, W, U) the part `code` of what now stands there.
            places: (B, W + Q, 2) row and column in the image of the window's slots, then of the fresh ones.
        """
        size, num = hidden.shape[1], places.shape[1] - hidden.shape[1]
        seen = self.state(F.rms_norm(hidden.float(), (self.hidden_size,))) + drafts
        # a fresh slot sees the window, itself and what lies between: so nothing depends on how many there are
        mask = torch.ones(num, size + num, dtype=torch.bool, device=hidden.device).tril(size)
        fresh = self.fresh.expand(len(hidden), num, -1)
        for layer in self.layers:
            fresh = layer(fresh, seen, places, mask)
        return self.known_by(fresh)

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
