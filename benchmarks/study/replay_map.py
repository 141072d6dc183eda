"""The map that replay decoding iterates, on whole images: without a cache, any view of drafts can be tried.

The image x* of a prompt and seed is the fixed point of x_i <- argmax(log p(. | what slot i sees of x) + g_i).
A pass of a decoder, here as in `decode`, commits the drafts at the head that equal x* and the slot behind
them, and then draws every slot of its window anew. What a slot sees is a view:

- drafts: the drafts. This is the decoder itself, pass by pass.
- left: the true token of the slot to its left, else the drafts.
- row: the true tokens of its own row, else the drafts.
- above: the true tokens of all rows above its own, and the drafts of its own row.
- row_above: the true tokens of its own row and of the row above, else the drafts.

All but the first are oracles: no decoder knows those tokens. A view is exact, not a sum of corrections: true
tokens are fed beside the drafts as columns of their own, computed from just what the view shows. A row here
starts with the row end in front of it, at which its first code is read. Source: ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from sjd2_lightning.decoding import DecodingConfig, Sampling, decode
from sjd2_lightning.decoding.law import guided, log_law
from sjd2_lightning.decoding.method import Method
from sjd2_lightning.decoding.randomness import Purpose, gumbel, slot_keys, stream
from sjd2_lightning.evaluation.prompts import PromptItem
from sjd2_lightning.masks import attention_mask
from sjd2_lightning.models.backbone import Backbone, ImageLayout, right_aligned

VIEWS = ("drafts", "left", "row", "above", "row_above")


@dataclass(frozen=True)
class Shape:
    """Which slots a pass draws: `parts` runs of window / parts slots, each starting `step` behind the last.

    With one part it is the window of `decode`. Slots between the runs are not fed, so nothing sees them, and
    a pass commits at most the first run: of as many fed slots as a window has, some begin further rows.
    """

    window: int
    parts: int = 1
    step: int = 0

    @property
    def run(self) -> int:
        """Slots of one part."""
        return self.window // self.parts

    def drawn(self, head: Tensor, num_slots: int) -> Tensor:
        """(B, N) which slots a pass draws, for heads (B,); the slot left of each of them is fed."""
        ahead = torch.arange(num_slots, device=head.device) - head[:, None]
        starts = [part * self.step for part in range(self.parts)]
        return torch.stack([(ahead >= start) & (ahead < start + self.run) for start in starts]).any(0)


@dataclass(frozen=True)
class Pass:
    """What a watcher sees of a pass; (B, ...) each, finished images included.

    Attributes:
        head: first slot of the window; the number of slots where the image is finished.
        committed: slots that this pass commits.
        compared: (B, N) drafts that were held against the image: the committed ones but the last, and the
            first wrong one.
        drafts: (B, N) before the pass.
        drawn: (B, N) slots that it draws.
        log_laws: (B, N, K) that it draws them from.
    """

    head: Tensor
    committed: Tensor
    compared: Tensor
    drafts: Tensor
    drawn: Tensor
    log_laws: Tensor


class ReplayMap:
    """The map of some prompts, and its fixed point.

    Args:
        backbone: the model, in eval mode.
        items: B prompts with seeds.
        layout: layout of the images.
        sampling: what turns logits into the law; its guidance must be constant.

    Attributes:
        truth: (B, N) slot ids of the images.
        first: (B, N) first drafts, random codes.
        gumbel: (B, N, K).
        is_code: (N,).
        row, column: (N,) of each slot; a row end is in front of the row behind it.
    """

    def __init__(
        self, backbone: Backbone, items: Sequence[PromptItem], layout: ImageLayout, sampling: Sampling
    ) -> None:
        self.backbone, self.layout, self.sampling = backbone, layout, sampling
        texts, seeds = [item.prompt for item in items], [item.seed for item in items]
        config = DecodingConfig("sjd", sampling=sampling)
        self.truth = decode(backbone, texts, seeds, config, layout).slot_ids
        slots, keys = torch.arange(layout.num_slots), torch.tensor(seeds)
        method = Method(config, backbone.slot_table(), backbone.num_codes)
        self.first = method.begin(keys, [layout] * len(items), layout.num_slots).tokens
        self.gumbel = gumbel(stream(slot_keys(keys[:, None], slots), Purpose.GUMBEL), backbone.num_codes)
        self.is_code = torch.tensor(layout.forced) < 0
        before = self.is_code.long().cumsum(0) - self.is_code.long()
        self.row, self.column = before // layout.width, before % layout.width
        rows = [backbone.prompt_ids(text, layout) for text in texts]
        if sampling.guidance_scale != 1:
            rows += [backbone.unconditional_ids(layout, ids) for ids in rows]
        ids, self.starts = right_aligned(rows)
        self.prompt = backbone.embed_tokens(ids)
        self.masks = {view: self._mask(view) for view in VIEWS}

    def _mask(self, view: str) -> Tensor:
        """(S, M, S, M): which of the M = N - 1 fed slots of each of S streams see which, for `streams`."""
        slot, row = torch.arange(self.layout.num_slots - 1), self.row[:-1]
        causal = slot[:, None] >= slot
        same_row = causal & (row[:, None] == row)
        none, rows_above = torch.zeros_like(causal), row[:, None] > row
        inner = {
            "drafts": [[causal]],
            "left": [[causal, none], [slot[:, None] > slot, slot[:, None] == slot]],
            "row": [[causal, none], [rows_above, same_row]],
            "above": [[causal, none], [rows_above, same_row]],
            "row_above": [
                [causal, none, none],
                [rows_above, same_row, none],
                [row[:, None] - 1 > row, row[:, None] - 1 == row, same_row],
            ],
        }[view]
        return torch.stack([torch.stack(blocks, dim=1) for blocks in inner])

    def streams(self, view: str, drafts: Tensor) -> Tensor:
        """(B, S, N) what the streams of a view hold; laws are read at the last one."""
        if view == "above":
            return torch.stack([self.truth, drafts], dim=1)
        return torch.stack([drafts] + [self.truth] * (len(self.masks[view]) - 1), dim=1)

    def log_laws(
        self, view: str, drafts: Tensor, hidden: Tensor | None = None, first: int = 0, end: int | None = None
    ) -> Tensor:
        """(B, N, K) log-probabilities of the slots from `first` to `end`, given what they see of the drafts.

        Args:
            view: one of `VIEWS`.
            drafts: (B, N), the tokens of the images left of `first`: there one stream serves for all.
            hidden: (B, N) slots that no other slot sees; none by default.
            first, end: bounds of the slots; laws of the others are left at 0. All by default.
        """
        num_streams, most = self.masks[view].shape[:2]
        end = most + 1 if end is None else min(end, most + 1)
        start = max(first - 1, 0)  # the slot that the first law is read at
        fed = torch.arange(start, end - 1)
        further = torch.arange(1, num_streams).repeat_interleave(len(fed))
        stream = torch.cat([torch.zeros(end - 1, dtype=torch.long), further])
        slot = torch.cat([torch.arange(end - 1), fed.repeat(num_streams - 1)])
        sees = self.masks[view][stream[:, None], slot[:, None], stream, slot]
        sees[:, :start] = self.masks[view].any(2)[stream[:, None], slot[:, None], slot[:start]]
        sees = sees.expand(len(drafts), -1, -1)
        if hidden is not None:
            itself = torch.eye(len(slot), dtype=torch.bool)
            sees = sees & ~hidden[:, None, slot] | itself
        states = self._states(self.streams(view, drafts)[:, stream, slot], slot, sees)
        read = [*([0] if first == 0 else []), *range(states.shape[1] - len(fed), states.shape[1])]
        states = states[:, read]
        logits = guided(self.backbone.image_logits(states), self.sampling.guidance_scale)
        found = logits.new_zeros(*drafts.shape, logits.shape[-1])
        found[:, first:end] = log_law(logits, self.sampling).log_softmax(-1)
        return found

    def _states(self, tokens: Tensor, slot: Tensor, sees: Tensor) -> Tensor:
        """(rows, 1 + n, D) hidden states of each prompt's last token and of the slots that are fed.

        Args:
            tokens: (B, n) slot ids.
            slot: (n,) where they stand.
            sees: (B, n, n) which of them see which; all see the prompt.
        """
        embeddings = F.embedding(tokens, self.backbone.slot_table())
        copies, num_prompt = len(self.prompt) // len(tokens), self.prompt.shape[1]
        embeddings = torch.cat([self.prompt, embeddings.repeat(copies, 1, 1)], dim=1)
        columns = torch.arange(embeddings.shape[1]).expand(len(embeddings), -1)
        mask = attention_mask(columns, torch.zeros_like(columns), self.starts, columns.shape[1]).clone()
        mask[:, 0, num_prompt:, num_prompt:] = sees.repeat(copies, 1, 1)
        place = torch.cat([torch.arange(num_prompt), num_prompt + slot])
        positions = (place - self.starts[:, None]).clamp_min(0)
        return self.backbone(embeddings, positions, mask)[:, num_prompt - 1 :]

    def draw(self, log_laws: Tensor) -> Tensor:
        """(B, N) the tokens of laws (B, N, K) with the slots' own noise; structural slots as they are."""
        return (log_laws + self.gumbel).argmax(-1).where(self.is_code, self.truth)

    @torch.inference_mode()
    def passes(
        self, shape: Shape, view: str = "drafts", watch: Callable[[Pass], None] | None = None
    ) -> list[int]:
        """Passes that each image takes.

        Args:
            shape: which slots a pass draws.
            view: what they see.
            watch: called in each pass.
        """
        num_slots = self.layout.num_slots
        slots = torch.arange(num_slots)
        drafts, head = self.first.clone(), torch.zeros(len(self.first), dtype=torch.long)
        count = torch.zeros_like(head)
        reach = shape.step * (shape.parts - 1) + shape.run
        while bool((head < num_slots).any()):
            drawn = shape.drawn(head, num_slots)
            ahead = slots - head[:, None]
            may_stand = (ahead < 0) | ((drafts == self.truth) & (ahead < shape.run - 1))
            committed = may_stand.long().cumprod(1).sum(1).add(1).clamp_max(num_slots) - head
            hidden = None
            if shape.parts > 1:
                fed = F.pad(drawn[:, 1:], (0, 1))  # the slots left of those that are drawn
                hidden = ~fed & (ahead >= 0)
            going = head[head < num_slots]
            laws = self.log_laws(view, drafts, hidden, int(going.min()), int(going.max()) + reach)
            if watch is not None:
                compared = (ahead >= 0) & (ahead < committed[:, None]) & (ahead < shape.run - 1)
                watch(Pass(head, committed, compared, drafts, drawn, laws))
            count += head < num_slots
            drafts = self.draw(laws).where(drawn, drafts)
            head = head + committed
            drafts = self.truth.where(slots < head[:, None], drafts)
        return count.tolist()


def expected_passes(stands: Tensor, window: int) -> list[float]:
    """Expected passes of each image if the draft of slot i equals its token with probability stands[:, i].

    Args:
        stands: (B, N), independent between slots and passes; 1 at structural slots.
        window: slots drafted ahead, the head included.
    """
    batch, num_slots = stands.shape
    left = torch.zeros(batch, num_slots + 1, dtype=torch.float64)  # expected passes from each head on
    for head in range(num_slots - 1, -1, -1):
        most = min(window, num_slots - head)
        reached = F.pad(stands[:, head : head + most - 1].double().cumprod(1), (1, 0), value=1.0)
        commits = reached - F.pad(reached[:, 1:], (0, 1))  # just 1, 2, ... slots
        left[:, head] = 1 + (commits * left[:, head + 1 : head + 1 + most]).sum(1)
    return left[:, 0].tolist()
