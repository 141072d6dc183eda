"""The drafted region right of the accepted tokens: drafts, levels and noisy embeddings of W slots a row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sjd2_lightning.decoding.methods import DecodingConfig
from sjd2_lightning.decoding.randomness import Purpose, gumbel, integers, normal, slot_keys, stream
from sjd2_lightning.embedding import EmbeddingSpace
from sjd2_lightning.models.backbone import ImageLayout
from sjd2_lightning.noise import denoise, timesteps


@dataclass
class Slots:
    """Contents of some slots, (B, n, ...) each. A field that a method has no use for is None.

    Attributes:
        keys: (B, n) of the slots' random numbers.
        tokens: (B, n) drafts, as slot ids.
        levels: (B, n) noise level; 0 = fed as the clean embedding of its draft.
        noisy: (B, n, D) normalised noisy embedding; its value matters where the level is above 0.
        draft_probs: (B, n, K) the law that the draft was drawn from (speculative rules).
        gumbel: (B, n, K) the slot's noise (replay).
    """

    keys: Tensor
    tokens: Tensor
    levels: Tensor
    noisy: Tensor | None
    draft_probs: Tensor | None
    gumbel: Tensor | None

    def fields(self) -> tuple[Tensor | None, ...]:
        """All fields in order."""
        return (self.keys, self.tokens, self.levels, self.noisy, self.draft_probs, self.gumbel)

    def keep_rows(self, rows: Tensor) -> Slots:
        """The slots of some rows, (R,) int64."""
        return Slots(*(None if field is None else field[rows] for field in self.fields()))  # type: ignore[arg-type]


class SlotSource:
    """Makes and renews slots; all randomness is keyed by (seed, slot).

    Args:
        config: the method.
        layout: which slots are structural.
        table: (K + structural, D) embeddings by slot id.
        num_codes: K.
    """

    def __init__(self, config: DecodingConfig, layout: ImageLayout, table: Tensor, num_codes: int) -> None:
        self.config = config
        self.num_codes = num_codes
        self.table = table
        self.space = EmbeddingSpace(table[:num_codes])
        # single precision whatever the trunk's: timestep tokens are of 1000 t, which half precision garbles
        grid = timesteps(config.num_levels, config.schedule, config.t_min, config.rho)
        self.timesteps = grid.to(table.device)
        beyond = [0] * (config.window + 1)  # slots right of the image: any clean content, never committed
        self.forced = torch.tensor([*layout.forced, *beyond], device=table.device)

    def new(self, seeds: Tensor, slots: Tensor) -> Slots:
        """Slots that enter the window; seeds (B,), slots (B, n) absolute.

        Noise N(0, I) at the top level with an independent uniform draft (paper); without levels a random
        code (SJD). Structural slots start, and stay, at their token.
        """
        config, num_codes = self.config, self.num_codes
        keys = slot_keys(seeds[:, None], slots)
        noise = None
        if config.acceptance == "replay":
            noise = gumbel(stream(keys, Purpose.GUMBEL), num_codes)
        if config.draft_init == "gumbel" and noise is not None:
            tokens = noise.argmax(-1)
        else:
            tokens = integers(stream(keys, Purpose.INITIAL), num_codes)
        probs = None
        if config.acceptance != "replay":
            probs = torch.full((*slots.shape, num_codes), 1 / num_codes, device=slots.device)
        levels = torch.full_like(slots, config.num_levels)
        noisy = None
        if config.num_levels:
            noisy = normal(stream(keys, Purpose.NOISE), self.table.shape[1]).to(self.table)
        forced = self.forced[slots]
        tokens, levels = tokens.where(forced < 0, forced), levels.where(forced < 0, 0)
        return Slots(keys, tokens, levels, noisy, probs, noise)

    def embeddings(self, slots: Slots) -> Tensor:
        """(B, n, D) what the trunk is fed."""
        clean = self.table[slots.tokens]
        if slots.noisy is None:
            return clean
        return clean.where(slots.levels[..., None] == 0, self.space.denormalise(slots.noisy))

    def renew(self, slots: Slots, tokens: Tensor, probs: Tensor | None) -> Slots:
        """One iteration later: drafts `tokens` (B, n) of law `probs`, and noisy slots one level cleaner."""
        levels = (slots.levels - 1).clamp_min(0)
        noisy = slots.noisy
        if noisy is not None:
            # forced slots are never noisy, so the row that clamp picks for them is not used
            x0_hat = self.space.normalise(self.table[tokens])
            t, s = (self.timesteps[step][..., None].to(noisy) for step in (slots.levels, levels))
            noisy = denoise(noisy, x0_hat, t, s)
        return Slots(slots.keys, tokens, levels, noisy, probs, slots.gumbel)


def advance(slots: Slots, num_committed: Tensor, entering: Slots) -> Slots:
    """Drops the committed slots of each row on the left and fills up on the right.

    Args:
        slots: the window, W slots.
        num_committed: (B,) slots to drop.
        entering: contents of the last M slots of the new window, M >= every `num_committed`.
    """
    window, num_new = slots.tokens.shape[1], entering.tokens.shape[1]
    source = torch.arange(window, device=num_committed.device) + num_committed[:, None]
    stays = source < window
    source = source.clamp_max(window - 1)

    def shift(old: Tensor, new: Tensor) -> Tensor:
        extra = (1,) * (old.ndim - 2)
        moved = old.gather(1, source.view(*source.shape, *extra).expand_as(old))
        kept, tail = moved.split([window - num_new, num_new], dim=1)
        tail = tail.where(stays[:, window - num_new :].view(-1, num_new, *extra), new)
        return torch.cat([kept, tail], dim=1)

    pairs = zip(slots.fields(), entering.fields(), strict=True)
    fields = (None if old is None or new is None else shift(old, new) for old, new in pairs)
    return Slots(*fields)  # type: ignore[arg-type]
