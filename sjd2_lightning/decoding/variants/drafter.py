"""First drafts of all slots that enter the window, guessed at once by a small network (ours).

A pass leaves the hidden states behind the laws of the window and, after redrafting, the tokens that now stand
there. A block drafter reads both through attention and guesses the slots right of them in one step, each
under its own Gumbel vector; a few rounds then fit each guess to the one on its left. Replay only: there it
does not matter what a draft is made of, only whether it is right.

Source: block-diffusion drafters that read the target's hidden states (DFlash, Chen et al. 2026, arXiv
2602.06036). Ours: they read both sides of guidance, the drafts that stand, and the noise that decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from sjd2_lightning.decoding.config import Drafting
from sjd2_lightning.decoding.law import Sampling, guided, log_law
from sjd2_lightning.decoding.rules import Scores, known_codes
from sjd2_lightning.decoding.start import SlotSource
from sjd2_lightning.decoding.state import State
from sjd2_lightning.decoding.window import OnEntry, Window
from sjd2_lightning.embedding import code_rows
from sjd2_lightning.models.backbone import ImageLayout, by_row

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
    """What a pass says of the slots right of its window: logits are `forward(...)` times a head.

    It has no numbers for single codes, nor for single places: its size depends on neither vocabulary nor
    window.

    Args:
        hidden_size: D, width of hidden states and embeddings.
        width: U, number of units.
        num_layers: number of times that fresh slots read the window.
    """

    def __init__(self, hidden_size: int, width: int, num_layers: int = 1) -> None:
        super().__init__()
        if width % 4 or width > _HEAD_WIDTH and width % _HEAD_WIDTH:
            raise ValueError(f"width={width}: must be a multiple of {_HEAD_WIDTH}, or of 4 below it")
        self.hidden_size = hidden_size
        self.state = nn.Linear(hidden_size, width)
        self.code = nn.Linear(hidden_size, width, bias=False)
        self.fresh = nn.Parameter(torch.randn(width) / 2)
        self.layers = nn.ModuleList(Reading(width) for _ in range(num_layers))
        self.known_by = nn.Linear(width, width)
        self.out = nn.Linear(width, hidden_size, bias=False)

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

    def forward(self, units: Float[Tensor, "*slots U"]) -> Float[Tensor, "*slots D"]:
        """(..., D) what a head reads logits from, of units (..., U)."""
        return self.out(units)

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
            raise ValueError(f"drafter.weights: {path} is no drafter of blocks: {error}") from None
        if theirs != hidden_size:
            raise ValueError(
                f"drafter.weights: {path} is of a model of width {theirs}, this one has {hidden_size}; train "
                "one on this model's own decodings by `sjd2 drafter`"
            )
        return found.requires_grad_(False)


@lru_cache(maxsize=4)
def _loaded(path: str, changed: int, hidden_size: int, device: torch.device) -> BlockDrafter:
    return BlockDrafter.load(path, hidden_size).to(device)


class BlockDrafts(OnEntry):
    """Slots that enter the window are clean and hold what the drafter guesses.

    Args:
        config: the network and how it is used.
        sampling: what makes laws of logits.
        table: (K + structural, D) embeddings by slot id, for their device.
        num_codes: K.
    """

    def __init__(self, config: Drafting, sampling: Sampling, table: Tensor, num_codes: int) -> None:
        self.config, self.sampling, self.num_codes = config, sampling, num_codes
        path = config.weights
        assert path is not None
        self.network = _loaded(path, Path(path).stat().st_mtime_ns, table.shape[1], table.device)
        rows = code_rows(table, num_codes)
        self.code = self.network.code(rows)  # (K + 1, U)
        self.effect = rows[:-1] @ self.network.out.weight  # (K, U)

    def start(self, source: SlotSource, layouts: Sequence[ImageLayout], state: State) -> State:
        num = state.tokens.shape[1]
        places = by_row(layouts, lambda layout: places_of(layout, num))
        return replace(state, places=places.to(state.tokens.device))

    def entered(self, window: Window, committed: Tensor, scores: Scores) -> None:
        """Called when the window has moved on by `committed` (B,) slots."""
        state, source, size = window.state, window.source, window.size
        assert state.places is not None
        first = window.index[:, -1:] + 1 - committed[:, None]
        seen, fresh = first + source.span(-size, 0), first + source.span(0, size)
        fresh = fresh.clamp_max(state.tokens.shape[1] - 1)  # no code is drawn there, so nothing is written
        noise = source.gumbel(state.seeds, fresh) if state.gumbel is None else state.gumbel[window.rows, fresh]
        standing = known_codes(state.tokens.gather(1, seen), state.levels.gather(1, seen), self.num_codes)
        is_code = state.is_code.gather(1, fresh)
        places = state.places[window.rows, torch.cat([seen, fresh], dim=1)]
        guesses = self.guesses(scores, standing, places, noise, is_code)
        # as many as may enter are guessed in every pass; these have entered
        new = is_code & (fresh <= window.index[:, -1:])
        state.tokens.scatter_(1, fresh, guesses.where(new, state.tokens.gather(1, fresh)))
        state.levels.scatter_(1, fresh, state.levels.gather(1, fresh).masked_fill(new, 0))

    def guesses(
        self,
        scores: Scores,
        standing: Int[Tensor, "B W"],
        places: Float[Tensor, "B all 2"],
        noise: Float[Tensor, "B Q K"],
        is_code: Bool[Tensor, "B Q"],
    ) -> Int[Tensor, "B Q"]:
        """(B, Q) codes of the slots right of a window.

        Args:
            scores: what the pass said of the window.
            standing: (B, W) codes that stand there now; K where none is known.
            places: (B, W + Q, 2) row and column of the slots.
            noise: (B, Q, K) their Gumbel noise.
            is_code: (B, Q) True = a code is drawn there.
        """
        read = scores.read
        assert read is not None
        sides = len(read.hidden) // len(standing)
        drafts = F.embedding(standing, self.code).repeat(sides, 1, 1)
        known = self.network.known(read.hidden, drafts, places.repeat(sides, 1, 1))  # (C * B, Q, U)
        scale = read.scale[:, -1:] if isinstance(read.scale, Tensor) else read.scale

        def units(lefts: Tensor) -> Tensor:
            """(B, Q, U) of both sides of guidance, by the codes (B, Q) to the left."""
            return guided(F.gelu(known + F.embedding(lefts, self.code).repeat(sides, 1, 1)), scale)

        # 1. the best codes of each slot, as if nothing were known of the guess on its left
        edge = standing[:, -1:]
        alone = units(torch.cat([edge, torch.full_like(standing[:, 1:], self.num_codes)], dim=1))
        law = log_law(alone @ self.effect.T, self.sampling) + noise
        best, codes = law.topk(min(self.config.candidates, self.num_codes), dim=-1)
        guesses = codes[..., 0]
        effect = F.embedding(codes, self.effect) / self.sampling.temperature  # (B, Q, n, U)
        for _ in range(self.config.rounds):
            # 2. that guess changes which of them is the best
            lefts = torch.cat([edge, guesses.where(is_code, self.num_codes)[:, :-1]], dim=1)
            change = torch.einsum("bwnu,bwu->bwn", effect, units(lefts) - alone)
            guesses = codes.gather(-1, (best + change).argmax(-1, keepdim=True)).squeeze(-1)
        return guesses


def places_of(layout: ImageLayout, num: int) -> Float[Tensor, "num 2"]:
    """(num, 2) row and column of each slot; a structural slot is behind the code on its left.

    Args:
        layout: layout of the image; of several grids the rows are counted on.
        num: number of slots, those right of the image included, which are where the last one is.
    """
    grids = layout.grids or ((layout.height, layout.width),)
    places, above = [], 0
    for height, width in grids:
        places += [(above + row, column) for row in range(height) for column in range(width)]
        above += height
    is_code = torch.tensor(layout.forced) < 0
    found = torch.tensor(places)[(is_code.cumsum(0) - 1).clamp_min(0)]
    found[:, 1] += ~is_code
    return torch.cat([found, found[-1:].expand(num, -1)])[:num].float()
