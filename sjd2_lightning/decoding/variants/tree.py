"""Branches beside the window: what a rejected draft would be replaced by is fed in the same pass (SJD-PAC).

Without them a pass ends with the token that replaces the first rejected draft: nothing is known of what
follows it, since the slots to its right were fed behind the draft. A *branch* is a sibling of a draft, that
is another candidate for its slot, and copies of the drafts behind that slot. The forward is fed branches of
the first `depth` slots too, `width - 1` each. If the first reject falls on one of these slots and a sibling
takes the draft's place, the law behind it is at hand: the branch is judged by the rule of the window, and the
pass commits at least one token more.

Where they lie: in the columns right of the window. No query of the window looks there, and a later pass
writes them anew before any does, so they are scratch: nothing is marked, moved or cleared. A branch's token
has the position of its slot, and sees what its row committed, the window left of its slot, and its branch up
to itself. What is committed of a branch is fed again in the next pass, in its own columns ("accepted" and
"cached" are two counts a row, as in the paper's mode).

Why it is exact. Exact mode: siblings are drawn with fresh numbers from the law that the draft was drawn from,
without replacement, so draft, siblings and residual in turn (`verify_siblings`) give the target's law.
Whether a branch is followed depends on slots up to its sibling alone. Given those, the draft behind it
follows the law recorded for it, and the law behind the sibling is that of the true prefix: ordinary
speculative sampling, with numbers of that slot that nothing kept was made of. Replay: siblings are the next
best of the last pass's law under the slot's own Gumbel vector; the token is the maximum under the true law
whatever they are, and a branch is followed if its sibling is that token.

Source: Kang et al. 2026 (arXiv 2603.18599; code at github.com/KangJialiang/SJD-PAC, read in November 2026):
maximal coupling in every slot ("adaptive continuation", our refiner `couple`) and a shallow wide tree from
the first reject on ("proactive drafting": K = 4, depth 3 with its root, fully branched). Theirs is rooted at
the token that replaced the reject, the left neighbour of our head, so both try K candidates for the head of
the next pass. Ours differs behind it: branches do not fork again, and each carries drafts of the window.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sjd2_lightning.decoding.randomness import Purpose, gumbel, slot_keys, stream, uniform
from sjd2_lightning.decoding.rules import Verdict, num_leading, verify_siblings
from sjd2_lightning.decoding.window import Slots, SlotSource, Window

Judge = Callable[[Slots, SlotSource, Tensor], tuple[Verdict, Tensor, Tensor | None]]


class Branches(NamedTuple):
    """What a forward is fed right of the window: E = depth * (width - 1) * length tokens.

    Columns are counted from the first one right of what is fed of the window.

    Attributes:
        tokens: (B, depth, width - 1, length) slot ids; a sibling, then copies of drafts.
        embeddings: (B, E, D) theirs.
        roots: (E,) column of the slot that each token's branch has a candidate for; below 0.
        firsts: (E,) column of its branch's first token.
    """

    tokens: Tensor
    embeddings: Tensor
    roots: Tensor
    firsts: Tensor

    @property
    def columns(self) -> Tensor:
        """(E,) column of each token."""
        return torch.arange(len(self.roots), device=self.roots.device)

    @property
    def places(self) -> Tensor:
        """(E,) column of the slot that each token is for."""
        return self.roots + self.columns - self.firsts

    def mask(self, edge: Tensor, visible: Tensor) -> Tensor:
        """(copies * B, 1, E, S) bool: what each token sees.

        Args:
            edge: (B, 1) first column of the branches.
            visible: (copies, B, 1, S) which columns hold a prompt or a slot of each row.
        """
        keys = torch.arange(visible.shape[-1], device=edge.device) - edge  # (B, S)
        left = (keys[:, None] < self.roots[:, None]) & visible
        own = (keys[:, None] >= self.firsts[:, None]) & (keys[:, None] <= self.columns[:, None])
        return (left | own).view(-1, 1, *own.shape[1:])


class Pass(NamedTuple):
    """One pass, as the window alone settles it.

    Attributes:
        slots, window: as the pass found them.
        verdict: on every slot of the window.
        scores: (B, W, K) unnormalised log-probabilities of the window's slots.
        behind: (B, E, K) those of what follows each token of the branches.
        run: (B,) slots that stand.
    """

    slots: Slots
    window: Window
    verdict: Verdict
    scores: Tensor
    behind: Tensor
    run: Tensor


class Tree:
    """Grows branches before a forward, and follows them after it.

    Args:
        source: of the slots; holds the method.
    """

    def __init__(self, source: SlotSource) -> None:
        self.source = source
        shape, window = source.config.tree, source.config.size
        self.width = min(shape.width, source.num_codes)
        # what is judged behind a sibling has a draft in the window
        self.length = min(shape.length, window - 1)
        self.depth = min(shape.depth, window - self.length)
        device = source.table.device
        branch = torch.arange(self.depth * (self.width - 1), device=device).repeat_interleave(self.length)
        self.firsts = branch * self.length
        self.roots = branch // max(1, self.width - 1) - (window - 1)
        steps = torch.arange(self.length, device=device)
        self.behind = torch.arange(self.depth, device=device)[:, None] + 1 + steps  # (depth, length) slots

    @classmethod
    def of(cls, source: SlotSource) -> Tree | None:
        """The tree of a method; None where no slot has a sibling or no law behind one is of the window."""
        if source.config.tree.width == 1 or source.config.size == 1:
            return None
        tree = cls(source)
        return tree if tree.num_columns else None

    @property
    def num_columns(self) -> int:
        """E, tokens that a forward is fed beside the window."""
        return len(self.roots)

    def _keys(self, window: Window, purpose: Purpose) -> Tensor:
        slots = window.span.index[:, : self.depth]
        return stream(slot_keys(window.seeds[:, None], slots), purpose, window.iteration)

    def grow(self, slots: Slots, window: Window) -> Branches:
        """The branches of the coming pass."""
        assert slots.draft_probs is not None
        if slots.gumbel is None:
            noise = gumbel(self._keys(window, Purpose.SIBLINGS), self.source.num_codes)
        else:
            noise = slots.gumbel[:, : self.depth]
        # the k best perturbed scores are k draws without replacement; the draft is the first of all draws
        scores = slots.draft_probs[:, : self.depth].log() + noise
        drafts = slots.tokens[:, : self.depth, None].clamp_max(self.source.num_codes - 1)
        siblings = scores.scatter(-1, drafts, -torch.inf).topk(self.width - 1).indices[..., None]
        copies = slots.tokens[:, self.behind[:, :-1]][:, :, None].expand(-1, -1, self.width - 1, -1)
        tokens = torch.cat([siblings, copies], dim=-1)
        embeddings = F.embedding(tokens.flatten(1), self.source.table)
        return Branches(tokens, embeddings, self.roots, self.firsts)

    def follow(self, branches: Branches, this: Pass, judge: Judge) -> Tensor:
        """Length (B,) of the run with what branches add to it; tokens and laws are written in place.

        Args:
            branches: that the forward was fed.
            this: the pass, as the window alone settles it.
            judge: the rule of the window.
        """
        verdict, slots = this.verdict, this.slots
        rows = torch.arange(len(this.run), device=this.run.device)
        at = this.run.clamp_max(self.depth - 1)
        rejected = (this.run < self.depth) & ~verdict.accept_mask[rows, at]
        tokens, which = self._choose(branches, this, rows, at)
        verdict.tokens[rows, at] = tokens.where(rejected, verdict.tokens[rows, at])

        behind = self.behind[at]  # (B, length) slots that the branch has a law for
        laws = this.behind.view(*branches.tokens.shape, -1)[rows, at, which.clamp_min(0)]
        fields = (None if field is None else field[rows[:, None], behind] for field in slots)
        judged, _, _ = judge(Slots._make(fields), self.source, laws)
        gained = (num_leading(judged.accept_mask[:, :-1]) + 1).where(rejected & (which >= 0), 0)
        theirs = behind <= (at + gained)[:, None]
        place = (rows[:, None], behind)
        verdict.tokens[place] = judged.tokens.where(theirs, verdict.tokens[place])
        this.scores[place] = laws.where(theirs[..., None], this.scores[place])  # for observers
        return this.run + gained

    def _choose(self, branches: Branches, this: Pass, rows: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        """Token (B,) of slot `at` (B,) if its draft is rejected, and which sibling it is; -1 = none."""
        slots = this.slots
        assert slots.draft_probs is not None
        siblings, draft_probs = branches.tokens[rows, at, :, 0], slots.draft_probs[rows, at]
        if slots.uniforms is None:  # replay: the token is known
            tokens = this.verdict.tokens[rows, at]
            same = (siblings == tokens[:, None]) & (draft_probs.gather(1, siblings) > 0)
            return tokens, torch.where(same.any(1), same.long().argmax(1), -1)
        accept_u = uniform(self._keys(this.window, Purpose.SIBLING_VERDICT)[rows, at], self.width - 1)
        drafts = slots.tokens[rows, at].clamp_max(self.source.num_codes - 1)
        candidates = torch.cat([drafts[:, None], siblings], dim=1)
        law = this.scores[rows, at].softmax(-1)
        return verify_siblings(candidates, draft_probs, law, accept_u, slots.uniforms[rows, at, 1])
