"""The decoding loop once more: one image, Python lists, no cache, no batch. The fast one is held to it.

Written from the description of the algorithm, with the package's random numbers and nothing else of its
decoder: laws come from `enumeration.code_law`, masks from a loop over pairs of columns.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from sjd2_lightning.decoding import DecodingConfig
from sjd2_lightning.decoding.randomness import Purpose, gumbel, integers, normal, slot_keys, stream, uniform
from sjd2_lightning.decoding.variants.pairs import PairTable
from sjd2_lightning.models.backbone import Backbone, ImageLayout
from tests.tools.enumeration import code_law, slot_scale


@dataclass
class Slot:
    """One slot of the window."""

    token: int
    level: int
    noisy: Tensor
    draft_law: np.ndarray


def draw_by_inversion(weights: np.ndarray, number: float) -> int:
    """The first code at which the running sum exceeds `number` times the whole sum."""
    sums = np.cumsum(weights)
    return int(np.nonzero(sums > number * sums[-1])[0][0])


class SlowDecoder:
    """Decodes one image; `settled` holds the iteration that settled each slot."""

    def __init__(
        self, backbone: Backbone, prompt: str, seed: int, config: DecodingConfig, layout: ImageLayout
    ):
        self.backbone, self.config, self.layout, self.seed = backbone, config, layout, torch.tensor(seed)
        prompt_ids = backbone.prompt_ids(prompt, layout)
        self.contexts = [prompt_ids, backbone.unconditional_ids(layout, prompt_ids)]
        table = backbone.slot_table().detach()
        self.table = table
        codes = table[: backbone.num_codes]
        self.mean, self.std = codes.mean(0), codes.std(0, correction=0).clamp_min(1e-6)
        self.rows = (table - self.mean) / self.std
        self.grid = config.noise.grid(config.num_levels).tolist()
        self.tokens: list[int] = []
        self.settled: list[int] = []

    def key(self, slot: int, purpose: Purpose, draw: int = 0) -> Tensor:
        return stream(slot_keys(self.seed, torch.tensor(slot)), purpose, draw)

    def new_slot(self, slot: int) -> Slot:
        num_codes, config = self.backbone.num_codes, self.config
        flat = np.full(num_codes, 1 / num_codes)
        noisy = self.new_noise(slot)
        if self.layout.forced[slot] >= 0:
            return Slot(self.layout.forced[slot], 0, noisy, flat)
        token = int(integers(self.key(slot, Purpose.INITIAL), num_codes))
        if config.draft_init == "gumbel":
            token = int(gumbel(self.key(slot, Purpose.GUMBEL), num_codes).argmax())
        return Slot(token, config.num_levels, noisy, flat)

    def new_noise(self, slot: int) -> Tensor:
        """What a slot starts from."""
        if self.config.noise.source == "gaussian":
            return normal(self.key(slot, Purpose.NOISE), self.table.shape[1])
        if self.config.noise.source in ("mean", "above"):
            return torch.zeros(self.table.shape[1])
        num_codes = self.backbone.num_codes
        vector = gumbel(self.key(slot, Purpose.GUMBEL), num_codes).double().numpy()
        rows = self.rows[:num_codes].double().numpy() / num_codes**0.5
        if self.config.noise.source == "tied_white":  # the nearest matrix with orthonormal columns
            left, sizes, right = np.linalg.svd(rows, full_matrices=False)
            rows = left[:, sizes > 3e-3 * sizes[0]] @ right[sizes > 3e-3 * sizes[0]]
        return torch.tensor((vector - np.euler_gamma) / (np.pi / 6**0.5) @ rows).float()

    def renew(self, slot: Slot, token: int, law: np.ndarray) -> None:
        """One iteration later: the slot's next draft, and what it holds one level cleaner."""
        config, level = self.config, max(0, slot.level - 1)
        if slot.level > 0:
            mean = sum(float(p) * row for p, row in zip(law, self.rows, strict=False))
            x0_hat = mean if config.noise.estimate == "expected" else self.rows[token]
            if config.noise.state == "draft":
                slot.noisy = x0_hat
            elif config.noise.source == "mean":
                slot.noisy = self.grid[level] * mean + (1 - self.grid[level]) * x0_hat
            else:
                ratio = self.grid[level] / self.grid[slot.level]
                slot.noisy = ratio * slot.noisy + (1 - ratio) * x0_hat
        if config.level_rule == "stable" and token == slot.token and slot.level < config.num_levels:
            level = 0
        if config.level_rule == "confident" and slot.level > 0 and law[token] >= config.confidence:
            level = 0
        slot.draft_law = self.next_law(slot, law)
        slot.token, slot.level = token, level

    def side_tokens(self) -> Tensor:
        """Sinusoids of 1000 t, standardised over the width, on the scale of the embeddings."""
        width = len(self.mean)
        half = (width + 1) // 2
        rows = []
        for t in self.grid[1:]:
            angles = 1000 * t * torch.exp(-np.log(10_000) * torch.arange(half) / half)
            row = torch.cat([angles.sin(), angles.cos()])[:width]
            rows.append((row - row.mean()) / torch.sqrt(row.var(correction=0) + 1e-5) * self.std + self.mean)
        return torch.stack(rows) if rows else torch.zeros(0, width)

    def logits(self, context: list[int], window: list[Slot]) -> np.ndarray:
        """Logits (W, K) of one full forward: side tokens, context, settled slots, window."""
        fed = [slot.noisy * self.std + self.mean if slot.level else self.table[slot.token] for slot in window]
        settled = self.table[torch.tensor(self.tokens, dtype=torch.long)]
        side = self.side_tokens()
        prompt = self.backbone.embed_tokens(torch.tensor(context))
        embeddings = torch.cat([side, prompt, settled, torch.stack(fed)])
        levels = [0] * (len(embeddings) - len(window)) + [slot.level for slot in window]
        size = len(embeddings)
        sees = [
            [
                column <= query and (column >= len(side) or column == query or levels[query] == column + 1)
                for column in range(size)
            ]
            for query in range(size)
        ]
        mask = torch.tensor(sees)
        positions = [max(0, column - len(side)) for column in range(size)]
        hidden = self.backbone(embeddings[None], torch.tensor([positions]), mask[None, None])
        logits = self.backbone.image_logits(hidden)[0].double().numpy()
        return logits[size - len(window) - 1 : size - 1]

    def laws(self, window: list[Slot]) -> np.ndarray:
        first, num_slots = len(self.tokens), self.layout.num_slots
        sampling = self.config.sampling
        scales = [[slot_scale(sampling, first + place, num_slots)] for place in range(len(window))]
        sides = (self.logits(context, window) for context in self.contexts)
        return code_law(*sides, sampling, np.array(scales))

    def repeat_neighbour(self, window: list[Slot], slot: Slot, ends: int) -> None:
        """Gives a slot that enters behind `window` the token of a neighbour left of slot `ends`."""
        number = len(self.tokens) + len(window)
        forced, width = self.layout.forced, self.layout.width
        so_far = [*self.tokens, *(old.token for old in window)]
        if forced[number] >= 0:
            return
        codes = [place for place in range(number) if forced[place] < 0]
        if self.config.draft_init == "repeat_above":
            sources = [codes[-width]] if len(codes) >= width and codes[-width] < ends else []
        else:
            sources = [place for place in codes if place < ends][-1:]
        for source in sources:
            slot.token = so_far[source]
            slot.draft_law = np.eye(self.backbone.num_codes)[slot.token]

    def start_from_above(self, window: list[Slot], slot: Slot, ends: int) -> None:
        """Gives a slot that enters behind `window` the embedding of the token one row up, if there is one."""
        number = len(self.tokens) + len(window)
        codes = [place for place in range(number) if self.layout.forced[place] < 0][-self.layout.width :]
        if len(codes) == self.layout.width and codes[0] < ends and self.layout.forced[number] < 0:
            slot.noisy = self.rows[[*self.tokens, *(old.token for old in window)][codes[0]]]

    def nearest_code(self, noisy: Tensor) -> int:
        rows = self.rows[: self.backbone.num_codes]
        return int(torch.cosine_similarity(rows, noisy[None], dim=-1).argmax())

    def judge(self, number: int, slot: Slot, law: np.ndarray, iteration: int) -> tuple[int, bool, int]:
        """What the slot holds if reached, whether its draft stands, and its next draft if not reached."""
        config = self.config
        if self.layout.forced[number] >= 0:
            return slot.token, True, slot.token
        if config.acceptance == "replay":
            with np.errstate(divide="ignore"):
                noise = gumbel(self.key(number, Purpose.GUMBEL), len(law)).double().numpy()
                token = int((np.log(law) + noise).argmax())
            return token, token == slot.token, token
        u = uniform(self.key(number, Purpose.VERDICT, iteration), 3).tolist()
        fresh = draw_by_inversion(law, u[2])
        if config.acceptance == "match":
            return fresh, fresh == slot.token, fresh
        if config.acceptance == "pure":
            token = fresh if slot.level > 0 else slot.token
            near = number - len(self.tokens) < max(1, config.window // config.num_levels)
            return token, slot.level == 0 and near, token
        draft = slot.token
        rest = np.maximum(law - slot.draft_law, 0)
        if config.acceptance == "paper" and slot.level > 0:
            draft = self.nearest_code(slot.noisy)
        members = self.group(draft, law) if config.acceptance == "grouped" else [draft]
        possible = slot.draft_law[draft] > 0 and law[draft] > 0
        accepted = possible and u[0] < law[members].sum() / slot.draft_law[members].sum()
        token = draft if accepted else draw_by_inversion(rest if rest.sum() > 0 else law, u[1])
        if config.refiner == "couple":
            return token, accepted, token
        if config.refiner == "keep" and slot.level == 0 and law[draft] >= 0.5 * slot.draft_law[draft]:
            return token, accepted, draft
        if config.refiner == "reuse" and law[draft] >= 0.5 * slot.draft_law[draft]:
            return token, accepted, draft
        return token, accepted, fresh

    def next_law(self, slot: Slot, law: np.ndarray) -> np.ndarray:
        """The law of the slot's next draft."""
        if self.config.refiner != "reuse":
            return law
        kept = np.where(law >= 0.5 * slot.draft_law, slot.draft_law, 0)
        return kept + (1 - kept.sum()) * law

    def group(self, draft: int, law: np.ndarray) -> list[int]:
        """The codes that are about as likely as the draft and look like it."""
        groups, order = self.config.groups, np.argsort(-law, kind="stable").tolist()
        first = order.index(draft) - (groups.size - 1) // 2
        members = order[max(0, first) : first + groups.size]
        rows = self.rows.numpy()
        return [
            code
            for code in members
            if abs(law[code] - law[draft]) <= groups.gap
            and np.mean((rows[code] - rows[draft]) ** 2) <= groups.distance
        ]

    def siblings(self, number: int, slot: Slot, iteration: int) -> list[int]:
        """Other candidates of a slot: the next best codes under the noise that the draft is the best of."""
        key = self.key(number, Purpose.GUMBEL)
        if self.config.acceptance == "exact":
            key = self.key(number, Purpose.SIBLINGS, iteration)
        with np.errstate(divide="ignore"):
            noise = gumbel(key, len(slot.draft_law)).double().numpy()
            scores = np.log(slot.draft_law) + noise
        scores[slot.token] = -np.inf
        order = np.argsort(-scores, kind="stable")[: min(self.config.tree.width, len(scores)) - 1]
        return [int(code) for code in order if scores[code] > -np.inf]

    def replaced(
        self, number: int, slot: Slot, law: np.ndarray, token: int, iteration: int
    ) -> tuple[int, bool]:
        """Token of a slot whose draft was rejected, and whether it is one of the draft's siblings."""
        siblings = self.siblings(number, slot, iteration)
        if self.config.acceptance == "replay":
            return token, token in siblings
        numbers = uniform(self.key(number, Purpose.SIBLING_VERDICT, iteration), self.config.tree.width)
        left, rest, before = slot.draft_law.copy(), np.maximum(law - slot.draft_law, 0), slot.token
        for sibling, u in zip(siblings, numbers.tolist(), strict=False):
            left[before], before = 0, sibling
            left, rest = left / left.sum(), rest / rest.sum()
            if u * left[sibling] < rest[sibling]:
                return sibling, True
            rest = np.maximum(rest - left, 0)
        residual_u = float(uniform(self.key(number, Purpose.VERDICT, iteration), 3)[1])
        return draw_by_inversion(rest, residual_u), False

    def swept(self, window: list[Slot], drafts: list[int], laws: np.ndarray, num_settled: int) -> list[int]:
        """Drafts, each drawn again by what the table says of its left neighbour now and when it was fed."""
        table, num_codes = PairTable.load(self.config.pairs.table, laws.shape[-1]), laws.shape[-1]
        says = (table.left.double() @ table.right.double().T).numpy()
        for _ in range(self.config.pairs.sweeps):
            before = list(drafts)
            for place in range(max(1, num_settled), len(window)):
                number, left = len(self.tokens) - num_settled + place, window[place - 1]
                if self.layout.forced[number] >= 0 or self.layout.forced[number - 1] >= 0:
                    continue
                shift = says[before[place - 1]] - (0 if left.level else says[left.token])
                noise = gumbel(self.key(number, Purpose.GUMBEL), num_codes).double().numpy()
                with np.errstate(divide="ignore"):
                    scores = np.log(laws[place]) + noise + self.config.pairs.strength * shift
                drafts[place] = int(scores.argmax())
        return drafts

    def behind(self, window: list[Slot], at: int, token: int, iteration: int) -> list[int]:
        """What a sibling in slot `at` of the window adds: tokens judged by laws behind it and drafts."""
        head, length = len(self.tokens), min(self.config.tree.length, self.config.window - 1)
        after = window[at + 1 : at + 1 + length]
        clean = [replace(slot, level=0) for slot in after]
        laws = self.laws([*window[:at], replace(window[at], token=token, level=0), *clean])[at + 1 :]
        found = []
        for place, slot in enumerate(after):
            token, stands, _ = self.judge(head + at + 1 + place, slot, laws[place], iteration)
            found.append(token)
            if not stands:
                break
        return found

    @torch.no_grad()
    def decode(self) -> list[int]:
        config, num_slots = self.config, self.layout.num_slots
        window: list[Slot] = []
        iteration = 0
        while len(self.tokens) < num_slots:
            head = len(self.tokens)
            ends = head + len(window)
            while len(window) < min(config.window, num_slots - head):
                slot = self.new_slot(head + len(window))
                if config.draft_init.startswith("repeat") and iteration > 0:
                    self.repeat_neighbour(window, slot, ends)
                if config.noise.source == "above" and iteration > 0:
                    self.start_from_above(window, slot, ends)
                window.append(slot)
            laws = self.laws(window)
            verdicts = [self.judge(head + i, slot, laws[i], iteration) for i, slot in enumerate(window)]
            num = 1
            while num < len(window):
                stands = verdicts[num - 1][1]
                if config.acceptance != "paper":
                    stands = stands and window[num - 1].level == 0
                if not stands:
                    break
                num += 1
            settled = [verdict[0] for verdict in verdicts[:num]]
            tree, at = config.tree, num - 1
            depth = min(tree.depth, config.window - min(tree.length, config.window - 1))
            if tree.width > 1 < config.window and at < depth and not verdicts[at][1]:
                settled[at], known = self.replaced(head + at, window[at], laws[at], settled[at], iteration)
                settled += self.behind(window, at, settled[at], iteration) if known else []
            self.tokens += settled
            self.settled += [iteration] * len(settled)
            drafts = [verdict[2] for verdict in verdicts]
            if config.pairs.table is not None:
                drafts = self.swept(window, [*settled, *drafts[len(settled) :]], laws, len(settled))
            for slot, draft, law in zip(window, drafts, laws, strict=True):
                self.renew(slot, draft, law)
            window = window[len(settled) :]
            iteration += 1
        return self.tokens
