"""The drafter of blocks, learnt from what a model's own decodings went through (ours).

A frozen model draws images by replay. Each pass leaves the hidden states of its window and the drafts that
stand there when it moves on; the finished image says what the slots right of it became. The target is the
very token, under the slot's own Gumbel vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sjd2_lightning.decoding import DecodingConfig, decode
from sjd2_lightning.decoding.law import guided
from sjd2_lightning.decoding.output import Iteration
from sjd2_lightning.decoding.randomness import Purpose, gumbel, slot_keys, stream
from sjd2_lightning.decoding.rules import known_codes
from sjd2_lightning.decoding.variants.drafter import places_of
from sjd2_lightning.models.backbone import Backbone, ImageLayout
from sjd2_lightning.models.block_drafter import BlockDrafter, copied_logits
from sjd2_lightning.run.stages import Advance
from sjd2_lightning.run.values import Share, Within, wrong_values
from sjd2_lightning.training.recipes.fitting import fit


@dataclass(frozen=True)
class DrafterRecipe:
    """How a drafter is trained.

    Attributes:
        width: number of units.
        layers: number of times that fresh slots read the window.
        steps: number of steps, each on `batch` passes.
        batch: passes of a step.
        lr: learning rate at its peak; it rises over the first twentieth and falls to zero by a cosine.
        unknown: share of slots that learn without their left neighbour, as guesses begin.
        least: slots that are learnt of a pass, though fewer entered.
        per_image: most passes that are kept of an image, on the average of a batch, drawn at random.
        val_share: share of the batches of images that measure and do not train; at least one.
        seed: decides order and first weights.
    """

    width: Annotated[int, Within(4, 2**16)] = 96
    layers: Annotated[int, Within(1, 64)] = 1
    steps: Annotated[int, Within(1, 10**9)] = 2000
    batch: Annotated[int, Within(1, 2**20)] = 16
    lr: Annotated[float, Within(0, 1, without="least")] = 1e-3
    unknown: Share = 0.3
    least: Annotated[int, Within(1, 2**16)] = 16
    per_image: Annotated[int, Within(1, 2**24)] = 64
    val_share: Annotated[float, Within(0, 1, without="both")] = 0.1
    seed: Annotated[int, Within(0, 2**31)] = 0

    def problems(self) -> list[str]:
        """What is wrong with the values, a line each, starting with the key."""
        return wrong_values(self)


class Windows(NamedTuple):
    """Windows of passes, n in all, and what entered behind them; Q slots of each, W of a window.

    Attributes:
        hidden: (n, C, W, D) hidden states behind their laws; with guidance those of both sides.
        scale: (n,) guidance scales at their last slots.
        standing: (n, W) codes that stood there when the window moved on; K = noise or no code.
        places: (n, W + Q, 2) row and column of their slots and of those to the right.
        codes: (n, Q) what these became; K = no code, or right of the image.
        keys: (n, Q) keys of their Gumbel vectors.
        entered: (n,) number of slots that entered.
    """

    hidden: Tensor
    scale: Tensor
    standing: Tensor
    places: Tensor
    codes: Tensor
    keys: Tensor
    entered: Tensor


def windows_of(
    backbone: Backbone,
    prompts: Sequence[str],
    seeds: Sequence[int],
    config: DecodingConfig,
    layout: ImageLayout,
    most: int,
) -> Windows:
    """Draws images and keeps windows of their passes, on the CPU; other arguments as of `decode`.

    Args:
        most: number of passes that are kept for each image, on average, if there are so many.
    """
    num_codes, device = backbone.num_codes, backbone.device
    before: list[Iteration] = []
    parts: list[tuple[Tensor, ...]] = []

    def keep(this: Iteration) -> None:
        """What the pass before left is known now: its drafts are those that this one was fed."""
        if before:
            parts.append(_left(before.pop(), this, num_codes))
        before.append(this)

    final = decode(backbone, prompts, seeds, config, layout, keep).slot_ids
    fields = (torch.cat(part) for part in zip(*parts, strict=True))
    hidden, scale, standing, images, heads, entered = fields
    size = standing.shape[1]
    slots = heads[:, None] + torch.arange(2 * size, device=device)
    # of slots that were committed meanwhile, what they are
    padded = F.pad(final.clamp_max(num_codes), (0, 2 * size), value=num_codes)
    became = padded[images[:, None], slots]
    committed = torch.arange(size, device=device) < entered[:, None]
    standing = became[:, :size].where(committed, standing)
    places = places_of(layout, padded.shape[1]).to(device)[slots]
    seeds_of = torch.tensor(list(seeds), device=device)[images]
    keys = stream(slot_keys(seeds_of[:, None], slots[:, size:]), Purpose.GUMBEL)
    found = Windows(hidden, scale, standing, places, became[:, size:], keys, entered)
    inside = (found.codes < num_codes).any(1).nonzero().squeeze(1).cpu()
    order = inside[torch.randperm(len(inside), generator=torch.Generator().manual_seed(seeds[0]))]
    return Windows(*(field.cpu()[order[: most * len(prompts)]] for field in found))


def _left(before: Iteration, this: Iteration, num_codes: int) -> tuple[Tensor, ...]:
    """What a pass left in the rows that the next one has too: hidden states, scales, drafts and so on."""
    assert before.read is not None
    num_rows, size = before.drafts.shape
    device = before.drafts.device
    places = {int(image): row for row, image in enumerate(before.rows)}
    rows = torch.tensor([places[int(image)] for image in this.rows], device=device)
    entered = before.num_committed[rows]
    going = entered > 0
    # the slots of the old window, where the new one has them; those left of it are looked up later
    at = (torch.arange(size, device=device) - entered[:, None]).clamp_min(0)
    standing = known_codes(this.drafts, this.levels, num_codes).gather(1, at)
    hidden = before.read.hidden.unflatten(0, (-1, num_rows)).movedim(0, 1)[rows]  # (R, C, W, D)
    scale = torch.as_tensor(before.read.scale, device=device)
    scale = (scale[rows, -1] if scale.ndim else scale.expand(len(rows))).float()
    fields = hidden.half(), scale, standing, before.rows[rows], before.heads[rows], entered
    return tuple(field[going] for field in fields)


class BlockLearner:
    """A drafter and what its guesses are measured on.

    Args:
        backbone: the model, which stays as it is.
        temperature: that of the law.
        drafter: what is trained.
    """

    def __init__(self, backbone: Backbone, temperature: float, drafter: BlockDrafter) -> None:
        self.num_codes, self.temperature, self.drafter = backbone.num_codes, temperature, drafter
        with torch.no_grad():
            self.table = backbone.slot_table()

    def scores(self, windows: Windows, lefts: Tensor) -> Tensor:
        """(n, Q, K) perturbed logarithms of what slots right of windows hold, by the codes to their left."""
        sides, num = windows.hidden.shape[1], lefts.shape[1]
        codes = self.drafter.of_codes(self.table, self.num_codes)
        hidden = windows.hidden.movedim(1, 0).flatten(0, 1)  # (C * n, W, D), as decoding has it
        places = windows.places[:, : hidden.shape[1] + num].repeat(sides, 1, 1)
        known = self.drafter.known(hidden, windows.standing.repeat(sides, 1), places, codes)
        units = self.drafter.units(known, lefts.repeat(sides, 1), codes)
        scale: float | Tensor = 1 if sides == 1 else windows.scale[:, None]
        copied = copied_logits(guided(known.copied, scale), windows.standing, lefts, self.num_codes)
        noise = gumbel(windows.keys[:, :num], self.num_codes)
        return (guided(units, scale) @ codes.effect.T + copied) / self.temperature + noise

    def loss(self, windows: Windows, least: int, unknown: Tensor) -> Tensor:
        """Cross-entropy of the perturbed scores against the tokens.

        Args:
            windows: what to learn from.
            least: slots that are learnt of each, though fewer entered.
            unknown: (n, Q) True = the slot does not know its left neighbour.
        """
        num = min(windows.codes.shape[1], max(least, int(windows.entered.max())))
        codes = windows.codes[:, :num]
        lefts = torch.cat([windows.standing[:, -1:], codes[:, :-1]], dim=1)
        scores = self.scores(windows, lefts.masked_fill(unknown[:, :num], self.num_codes))
        learnt = (codes < self.num_codes) & (
            torch.arange(num, device=codes.device) < windows.entered[:, None].clamp_min(least)
        )
        return F.cross_entropy(scores[learnt], codes[learnt])

    @torch.no_grad()
    def right(self, windows: Windows, batch: int = 64) -> tuple[float, float]:
        """Shares of slots that entered whose guess is right: behind no left neighbour, behind the true."""
        found, total = torch.zeros(2), 0
        for start in range(0, len(windows.codes), batch):
            part = self._there(Windows(*(field[start : start + batch] for field in windows)))
            num = part.codes.shape[1]
            new = torch.arange(num, device=part.codes.device) < part.entered[:, None]
            new &= part.codes < self.num_codes
            lefts = torch.cat([part.standing[:, -1:], part.codes[:, :-1]], dim=1)
            alone = lefts.clone()
            alone[:, 1:] = self.num_codes
            for which, given in enumerate((alone, lefts)):
                guesses = self.scores(part, given).argmax(-1)
                found[which] += (guesses == part.codes)[new].sum().cpu()
            total += int(new.sum())
        without, behind = (found / max(1, total)).tolist()
        return without, behind

    def _there(self, windows: Windows) -> Windows:
        device = self.table.device
        return Windows(*(field.to(device) for field in windows))

    def fit(self, windows: Windows, recipe: DrafterRecipe, advance: Advance) -> None:
        """Trains the drafter.

        Args:
            windows: what to learn from.
            recipe: how.
            advance: called with the number of steps done.
        """
        rng = torch.Generator().manual_seed(recipe.seed)

        def loss_of(rows: Windows) -> Tensor:
            part = self._there(rows)
            unknown = torch.rand(part.codes.shape, generator=rng) < recipe.unknown
            return self.loss(part, recipe.least, unknown.to(part.codes.device))

        fit(self.drafter.parameters(), windows, loss_of, recipe, advance)
