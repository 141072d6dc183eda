"""What limits acceptance in replay mode: which drafts are wrong, why, and what other windows could do.

    .venv/bin/python benchmarks/acceptance.py outputs/study/levels_1-0/model --json docs/study/acceptance.json

Every image is known before it is decoded (plain autoregression gives the same), so each draft that a pass
feeds or draws can be called right or wrong, and its law compared with the law that settles the slot.
Slots are those right of the head that hold codes. Definitions of the figures stand in the functions below.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.nn import functional as F

from sjd2_lightning.decoding import DecodingConfig, Sampling, decode
from sjd2_lightning.decoding.probs import guided, log_law
from sjd2_lightning.decoding.stats import Iteration
from sjd2_lightning.decoding.window import SlotSource
from sjd2_lightning.masks import attention_mask
from sjd2_lightning.models.backbone import Backbone, ImageLayout, right_aligned
from sjd2_lightning.models.registry import load_backbone
from sjd2_lightning.prompts import PromptItem, held_out_prompts
from sjd2_lightning.records import write_atomic

Active = Callable[[int], list[int]]  # head -> the slots that a pass feeds or settles, the head first


class Truth:
    """Observer of plain autoregression: log-probabilities (B, N, K) of every slot."""

    def __init__(self, batch: int, layout: ImageLayout, num_codes: int) -> None:
        self.log_probs = torch.zeros(batch, layout.num_slots, num_codes)

    def __call__(self, iteration: Iteration) -> None:
        """Keeps the law that settled each row's head."""
        law = iteration.scores[:, 0].log_softmax(-1)
        self.log_probs[iteration.rows, iteration.heads] = law


class Drafts:
    """Observer of SJD2 in replay mode: facts about each draft, one array entry each.

    Facts: `drawn_right` the token that this pass drew is the final one; `left_right`, `above_right` whether
    the tokens *fed* to the left and one row above were final (committed ones are); `distance` to the head;
    `column` of the row; `entropy` of the final law; `overlap` 1 - TV(law of this pass, final law), what the
    best coupling of the two laws could keep.
    """

    def __init__(self, tokens: Tensor, truth: Truth, layout: ImageLayout) -> None:
        self.tokens, self.truth, self.layout = tokens, truth, layout
        self.is_code = torch.tensor(layout.forced) < 0
        self.fed = torch.full_like(tokens, -1)  # what the coming pass is fed; -1 is noise or a random draft
        self.facts: dict[str, list[Tensor]] = {}

    def __call__(self, iteration: Iteration) -> None:
        """Notes the drafts of one pass."""
        size, num_slots = iteration.tokens.shape[1], self.layout.num_slots
        slots = iteration.heads[:, None] + torch.arange(size)
        rows = iteration.rows[:, None].expand_as(slots)
        beyond = slots >= num_slots
        places = slots.clamp_max(num_slots - 1)
        right = self.fed == self.tokens
        right |= torch.arange(num_slots) < torch.zeros(len(self.tokens), 1, dtype=torch.long).index_put(
            (iteration.rows, torch.zeros_like(iteration.rows)), iteration.heads
        )
        right |= ~self.is_code
        width = self.layout.width + 1  # slots of a row with its end
        final = self.truth.log_probs[rows, places].exp()
        law = iteration.scores.softmax(-1)
        entropy = -(final * self.truth.log_probs[rows, places].clamp_min(-1e4)).sum(-1)
        chosen = self.is_code[places] & ~beyond & (slots > iteration.heads[:, None])
        found = {
            "drawn_right": iteration.tokens == self.tokens[rows, places],
            "left_right": right[rows, (places - 1).clamp_min(0)],
            "above_right": right[rows, (places - width).clamp_min(0)] | (places < width),
            "distance": slots - iteration.heads[:, None],
            "column": places % width,
            "entropy": entropy,
            "overlap": torch.minimum(law, final).sum(-1),
        }
        for name, value in found.items():
            self.facts.setdefault(name, []).append(value[chosen].float())
        self.fed[rows[~beyond], slots[~beyond]] = iteration.tokens[~beyond]

    def table(self) -> dict[str, np.ndarray]:
        """(M,) each."""
        return {name: torch.cat(values).numpy() for name, values in self.facts.items()}


def shares(facts: dict[str, np.ndarray], by: np.ndarray, edges: Sequence[float]) -> dict[str, Any]:
    """Share of drafts drawn right, and mean overlap of laws, in bins of one fact."""
    found = {}
    for low, high in pairwise(edges):
        chosen = (by >= low) & (by < high)
        if chosen.any():
            found[f"{low:g} to {high:g}"] = {
                "drafts": int(chosen.sum()),
                "right": round(float(facts["drawn_right"][chosen].mean()), 3),
                "overlap": round(float(facts["overlap"][chosen].mean()), 3),
            }
    return found


def limits(facts: dict[str, np.ndarray]) -> dict[str, Any]:
    """Drafts drawn right by entropy, distance, column, and by which of the fed neighbours were right."""
    neighbours = {}
    for name, left, above in (("both", 1, 1), ("left only", 1, 0), ("above only", 0, 1), ("neither", 0, 0)):
        chosen = (facts["left_right"] == left) & (facts["above_right"] == above)
        if chosen.any():
            neighbours[name] = {
                "share of drafts": round(float(chosen.mean()), 3),
                "right": round(float(facts["drawn_right"][chosen].mean()), 3),
                "overlap": round(float(facts["overlap"][chosen].mean()), 3),
            }
    return {
        "right": round(float(facts["drawn_right"].mean()), 3),
        "neighbours fed right": neighbours,
        "entropy, nats": shares(facts, facts["entropy"], [0, 0.1, 0.5, 1, 2, 3, 10]),
        "distance to the head": shares(facts, facts["distance"], [1, 2, 3, 5, 9, 17, 33, 65, 129]),
        "column": shares(facts, facts["column"], [0, 1, 2, 4, 8, 16]),
    }


def independent(truth: Truth, layout: ImageLayout) -> dict[str, float]:
    """What drafts with randomness of their own could do at best: a draft drawn from the final law itself.

    It is the token that is drawn again with probability sum p^2. A pass begins behind every slot whose draft
    is not, so an image takes 1 + sum(1 - sum p^2) passes (forced slots always agree).
    """
    log_probs = truth.log_probs
    agree = log_probs.double().exp().square().sum(-1)
    agree[:, torch.tensor(layout.forced) >= 0] = 1.0
    passes = 1 + (1 - agree[:, :-1]).sum(1)
    codes = torch.tensor(layout.forced) < 0
    return {
        "sum p^2": round(float(agree[:, codes].mean()), 3),
        "tokens a pass": round(float(agree.numel() / passes.sum()), 3),
    }


class Simulator:
    """The replay map on whole sequences, without a cache: any set of slots may be active in a pass.

    Slots that are neither committed nor active are seen by nobody. A slot's noise and Gumbel vector are
    those of `decode`, and so are its passes if the active slots are its window (a test compares them).
    """

    def __init__(
        self, backbone: Backbone, prompt: str, seed: int, config: DecodingConfig, layout: ImageLayout
    ) -> None:
        self.backbone, self.config, self.layout = backbone, config, layout
        self.source = SlotSource(config, layout, backbone.slot_table(), backbone.num_codes)
        contexts = [backbone.prompt_ids(prompt, layout)]
        if config.sampling.guidance_scale != 1:
            contexts.append(backbone.unconditional_ids(layout, contexts[0]))
        ids, self.starts = right_aligned(contexts)
        self.side = self.source.space.timestep_tokens(self.source.timesteps[1:])
        prompts = backbone.embed_tokens(ids)
        self.prefix = torch.cat([self.side.expand(len(ids), -1, -1), prompts], dim=1)
        slots = torch.arange(layout.num_slots)
        self.tokens, self.levels = (
            value[0] for value in self.source.first_drafts(torch.tensor([seed]), slots)
        )
        fresh = self.source.fresh(torch.tensor([seed]), slots[None])
        self.gumbel = fresh["gumbel"][0]
        self.noisy = fresh["noisy"][0] if config.num_levels else None
        self.is_code = torch.tensor(layout.forced) < 0

    def drawn(self, seen: Tensor) -> Tensor:
        """(N,) what a pass draws for every slot if the slots `seen` (N,) bool can be seen."""
        embeddings = F.embedding(self.tokens, self.source.table)
        if self.noisy is not None:
            noisy = self.source.space.denormalise(self.noisy)
            embeddings = noisy.where(self.levels[:, None] > 0, embeddings)
        rows = len(self.prefix)
        fed = torch.cat([self.prefix, embeddings.expand(rows, -1, -1)], dim=1)
        columns = torch.arange(fed.shape[1]).expand(rows, -1)
        first = self.starts + len(self.side)
        levels = F.pad(self.levels, (self.prefix.shape[1], 0)).expand(rows, -1)
        mask = attention_mask(columns, levels, first, fed.shape[1])
        visible = F.pad(seen, (self.prefix.shape[1], 0), value=True)
        mask &= visible | torch.eye(fed.shape[1], dtype=torch.bool)
        hidden = self.backbone(fed, (columns - first[:, None]).clamp_min(0), mask)
        before = hidden[:, self.prefix.shape[1] - 1 : -1]
        scale = self.config.sampling.guidance_scale
        scores = log_law(guided(self.backbone.image_logits(before), scale)[0], self.config.sampling)
        return (scores + self.gumbel).argmax(-1).where(self.is_code, self.tokens)

    @torch.inference_mode()
    def passes(self, active: Active) -> int:
        """Forward passes until the image is done."""
        head, count, num = 0, 0, self.layout.num_slots
        while head < num:
            chosen = torch.zeros(num, dtype=torch.bool)
            chosen[[slot for slot in active(head) if slot < num]] = True
            drawn = self.drawn(chosen | (torch.arange(num) < head))
            settled = head
            # the head is settled; a slot behind it if all before it were fed clean, as what they are
            while True:
                right = self.levels[settled] == 0 and self.tokens[settled] == drawn[settled]
                settled += 1
                if settled >= num or not chosen[settled] or not right:
                    break
            self._renew(chosen, drawn)
            self.levels[:settled] = 0
            head, count = settled, count + 1
        return count

    def _renew(self, chosen: Tensor, drawn: Tensor) -> None:
        """Active slots get what was drawn, one level cleaner."""
        if self.noisy is not None:
            kept = self.source.kept[self.levels]
            x0_hat = F.embedding(drawn, self.source.normalised)
            self.noisy = (kept * self.noisy + (1 - kept) * x0_hat).where(chosen[:, None], self.noisy)
        self.tokens = drawn.where(chosen, self.tokens)
        self.levels = (self.levels - 1).clamp_min(0).where(chosen, self.levels)


def contiguous(size: int) -> Active:
    """The ordinary window."""
    return lambda head: list(range(head, head + size))


def two_rows(size: int, layout: ImageLayout) -> Active:
    """Half of the slots from the head on, half from the start of the next row, behind this row's end token.

    Where the first half reaches into the next row, the second continues it: the window is contiguous then.
    """
    width = layout.width + 1

    def active(head: int) -> list[int]:
        first = list(range(head, head + size // 2))
        start = max((head // width + 1) * width - 1, first[-1] + 1)
        return first + list(range(start, start + size - len(first)))

    return active


def windows(
    backbone: Backbone, prompts: Sequence[PromptItem], config: DecodingConfig, sizes: Sequence[int],
    layout: ImageLayout,
) -> dict[str, float]:  # fmt: skip
    """Tokens a pass of windows of the same number of slots, by their shape."""
    found = {}
    for size in sizes:
        for name, active in {"contiguous": contiguous(size), "two rows": two_rows(size, layout)}.items():
            passes = [
                Simulator(backbone, item.prompt, item.seed, config, layout).passes(active)
                for item in track(prompts, f"{name}, {size}")
            ]
            found[f"{name} {size}"] = round(layout.num_slots * len(passes) / sum(passes), 3)
    return found


@torch.inference_mode()
def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All figures of one set of weights."""
    backbone = load_backbone("chameleon", options.weights).eval()
    layout = backbone.layout(64, 64)
    sampling = Sampling(options.temperature, guidance_scale=options.guidance_scale)
    prompts = held_out_prompts(options.num_prompts)
    texts, seeds = [item.prompt for item in prompts], [item.seed for item in prompts]
    truth = Truth(len(prompts), layout, backbone.num_codes)
    ar = decode(backbone, texts, seeds, DecodingConfig("ar", window=1, sampling=sampling), layout, truth)
    found: dict[str, Any] = {"independent drafts": independent(truth, layout)}
    for num_levels in options.levels:
        for window in options.windows:
            config = DecodingConfig("sjd2", window, num_levels, sampling=sampling)
            drafts = Drafts(ar.slot_ids, truth, layout)
            output = decode(backbone, texts, seeds, config, layout, drafts)
            runs = [num for passes in output.stats.accepted for num in passes]
            found[f"levels {num_levels}, window {window}"] = {
                "tokens a pass": round(sum(runs) / len(runs), 3),
                "passes that commit one": round(float(np.mean([num == 1 for num in runs])), 3),
                **limits(drafts.table()),
            }
    some = prompts[: options.num_simulated]
    for num_levels in options.levels if some else ():
        config = DecodingConfig("sjd2", 1, num_levels, sampling=sampling)
        found[f"levels {num_levels}, shape of the window"] = windows(
            backbone, some, config, options.simulated_windows, layout
        )
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("weights", type=Path, help="folder of the backbone")
    parser.add_argument("--json", type=Path, help="where the figures go")
    parser.add_argument("--num-prompts", type=int, default=16)
    parser.add_argument("--windows", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--levels", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--num-simulated", type=int, default=4, help="prompts with windows of other shapes")
    parser.add_argument("--simulated-windows", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--guidance-scale", type=float, default=3.0)
    options = parser.parse_args(arguments)
    found = measure(options)
    Console().print_json(data=found)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        facts = {"num_prompts": options.num_prompts, "num_simulated": options.num_simulated,
                 "temperature": options.temperature, "guidance_scale": options.guidance_scale}  # fmt: skip
        write_atomic(options.json, json.dumps({**facts, **found}, indent=1))


if __name__ == "__main__":
    main()
