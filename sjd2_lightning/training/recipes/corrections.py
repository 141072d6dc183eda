"""The corrector of drafts, learnt from what a model's own decodings went through (ours).

A frozen model draws images by replay. Each pass leaves, of every slot that it did not commit, its law and
what its neighbours were then; the finished image says what all of them became. The target is the very token,
under the slot's own Gumbel vector: what counts is which code comes first, not the law.
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
from sjd2_lightning.decoding.variants.first_drafts import neighbours
from sjd2_lightning.models.backbone import Backbone, ImageLayout
from sjd2_lightning.models.draft_corrector import DraftCorrector, code_rows
from sjd2_lightning.run.stages import Advance
from sjd2_lightning.run.values import Within, wrong_values
from sjd2_lightning.training.recipes.fitting import fit


@dataclass(frozen=True)
class CorrectorRecipe:
    """How a corrector is trained.

    Attributes:
        width: number of units.
        steps: number of steps, each on `batch` slots.
        batch: slots of a step.
        lr: learning rate at its peak; it rises over the first twentieth and falls to zero by a cosine.
        per_image: most slots that are kept of an image, on the average of a batch, drawn at random.
        val_share: share of the batches of images that measure and do not train; at least one.
        seed: decides order and first weights.
    """

    width: Annotated[int, Within(1, 2**16)] = 64
    steps: Annotated[int, Within(1, 10**9)] = 2000
    batch: Annotated[int, Within(1, 2**20)] = 256
    lr: Annotated[float, Within(0, 1, without="least")] = 2e-3
    per_image: Annotated[int, Within(1, 2**24)] = 1500
    val_share: Annotated[float, Within(0, 1, without="both")] = 0.1
    seed: Annotated[int, Within(0, 2**31)] = 0

    def problems(self) -> list[str]:
        """What is wrong with the values, a line each, starting with the key."""
        return wrong_values(self)


class Traces(NamedTuple):
    """Slots that passes did not commit, n in all.

    Attributes:
        hidden: (n, C, D) hidden states behind their laws; with guidance those of both sides.
        scale: (n,) guidance scales.
        old: (n, 2) what their neighbours to the left and above were; K = noise or no code.
        new: (n, 2) what these became.
        codes: (n,) what the slots became.
        keys: (n,) keys of their Gumbel vectors.
    """

    hidden: Tensor
    scale: Tensor
    old: Tensor
    new: Tensor
    codes: Tensor
    keys: Tensor


def traces_of(
    backbone: Backbone,
    prompts: Sequence[str],
    seeds: Sequence[int],
    config: DecodingConfig,
    layout: ImageLayout,
    most: int,
) -> Traces:
    """Draws images and keeps some open slots of their passes, on the CPU; other arguments as of `decode`.

    Args:
        most: number of slots that are kept for each image, on average, if there are so many.
    """
    num_codes, device = backbone.num_codes, backbone.device
    is_code = torch.tensor(layout.forced, device=device) < 0
    upper = neighbours(layout, "repeat_above", layout.num_slots)
    of_rows = torch.tensor(list(seeds), device=device)
    parts: list[tuple[Tensor, ...]] = []

    def keep(this: Iteration) -> None:
        """Copies what open slots need: scores of all passes would not fit memory."""
        assert this.read is not None
        window = this.drafts.shape[1]
        numbers = torch.arange(window, device=device)
        slots = (this.heads[:, None] + numbers).clamp_max(layout.num_slots - 1)
        inside = this.heads[:, None] + numbers < layout.num_slots
        # committed slots are what they are, and the head's neighbour was settled before
        is_open = (numbers >= this.num_committed[:, None].clamp_min(1)) & inside & is_code[slots]
        was = known_codes(this.drafts, this.levels, num_codes)
        hidden = this.read.hidden.unflatten(0, (-1, len(this.heads))).movedim(0, 2)  # (R, W, C, D)
        scale = torch.as_tensor(this.read.scale, device=device).expand(len(this.heads), window)
        images = this.rows[:, None].expand(-1, window)
        # of those above, what is left of the window is what it will be; -1 until the image is finished
        above = upper.to(device)[slots.clamp_max(layout.num_slots - 1)] - this.heads[:, None]
        above = was.gather(1, above.clamp_min(0)).masked_fill(above < 0, -1)
        old = torch.stack([was.roll(1, dims=1), above], dim=-1)
        fields = hidden.half(), scale, old, images, slots
        parts.append(tuple(field[is_open].cpu() for field in fields))

    final = decode(backbone, prompts, seeds, config, layout, keep).slot_ids.cpu()
    hidden, scale, old, images, slots = (torch.cat(part) for part in zip(*parts, strict=True))
    keys = stream(slot_keys(of_rows.cpu()[images], slots), Purpose.GUMBEL)
    beside = torch.stack([slots - 1, upper[slots]], dim=-1)
    new = final[images[:, None], beside].clamp_max(num_codes).masked_fill(beside < 0, num_codes)
    old = torch.where(old < 0, new, old)
    found = Traces(hidden, scale, old, new, final[images, slots], keys)
    order = torch.randperm(len(slots), generator=torch.Generator().manual_seed(seeds[0]))
    return Traces(*(field[order[: most * len(prompts)]] for field in found))


class Learner:
    """A corrector and what its change is measured on.

    Args:
        backbone: the model, which stays as it is.
        temperature: that of the law.
        corrector: what is trained.
    """

    def __init__(self, backbone: Backbone, temperature: float, corrector: DraftCorrector) -> None:
        self.backbone, self.temperature, self.corrector = backbone, temperature, corrector
        with torch.no_grad():
            self.rows = code_rows(backbone.slot_table(), backbone.num_codes)

    def scores(self, slots: Traces) -> tuple[Tensor, Tensor]:
        """(n, K) perturbed log-probabilities of slots as passes left them, and how they are corrected."""
        hidden = slots.hidden.movedim(1, 0).flatten(0, 1)  # (C * n, D), as decoding has it
        scale: float | Tensor = 1 if slots.hidden.shape[1] == 1 else slots.scale
        with torch.no_grad():
            dtype = self.backbone.slot_table().dtype
            # all codes: what top-k cuts off now may be the token later
            logits = guided(self.backbone.image_logits(hidden.to(dtype)), scale) / self.temperature
            before = logits + gumbel(slots.keys, logits.shape[-1])
        return before, self.corrector.change(self.rows, slots.old, slots.new) / self.temperature

    @torch.no_grad()
    def right(self, slots: Traces, batch: int = 1024) -> tuple[float, float]:
        """Shares of slots whose best code is the token: as the pass left them, and corrected."""
        found = torch.zeros(2)
        for start in range(0, len(slots.codes), batch):
            part = self._there(Traces(*(field[start : start + batch] for field in slots)))
            before, change = self.scores(part)
            for which, scores in enumerate((before, before + change)):
                found[which] += (scores.argmax(-1) == part.codes).sum().cpu()
        alone, corrected = (found / max(1, len(slots.codes))).tolist()
        return alone, corrected

    def _there(self, slots: Traces) -> Traces:
        return Traces(*(field.to(self.backbone.device) for field in slots))

    def fit(self, slots: Traces, recipe: CorrectorRecipe, advance: Advance) -> None:
        """Trains by cross-entropy of the perturbed scores against the token.

        Args:
            slots: what to learn from.
            recipe: how.
            advance: called with the number of steps done.
        """

        def loss_of(rows: Traces) -> Tensor:
            part = self._there(rows)
            before, change = self.scores(part)
            return F.cross_entropy(before + change, part.codes)

        fit(self.corrector.parameters(), slots, loss_of, recipe, advance)
