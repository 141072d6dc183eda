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
without replacement, so draft, siblings and residual in turn (`first_sibling`) give the target's law.
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

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from sjd2_lightning.decoding.config import DecodingConfig
from sjd2_lightning.decoding.context import Branches, Context, Shape
from sjd2_lightning.decoding.law import draw, log_law, residual
from sjd2_lightning.decoding.passes import Judged, Pass
from sjd2_lightning.decoding.randomness import Purpose, gumbel, uniform
from sjd2_lightning.decoding.rules import Rule, Scores, Slots, judged, num_leading
from sjd2_lightning.decoding.window import Window


class Tree:
    """The shape of the branches.

    Args:
        config: the method.
        table: (K + structural, D) embeddings by slot id.
        num_codes: K.
    """

    def __init__(self, config: DecodingConfig, table: Tensor, num_codes: int) -> None:
        self.table, self.num_codes = table, num_codes
        shape, size = config.tree, config.size
        self.width = min(shape.width, num_codes)
        # what is judged behind a sibling has a draft in the window
        self.length = min(shape.length, size - 1)
        self.depth = min(shape.depth, size - self.length)
        branch = torch.arange(self.depth * (self.width - 1), device=table.device)
        branch = branch.repeat_interleave(self.length)
        self.firsts = branch * self.length
        self.roots = branch // max(1, self.width - 1) - (size - 1)
        candidates = torch.arange(self.depth, device=table.device)
        steps = torch.arange(self.length, device=table.device)
        self.columns = torch.arange(len(self.roots), device=table.device)
        self.behind = candidates[:, None] + 1 + steps  # (depth, length) slots

    @classmethod
    def of(cls, config: DecodingConfig, table: Tensor, num_codes: int) -> Tree | None:
        """The tree of a method; None where no slot has a sibling or no law behind one is of the window."""
        if config.tree.width == 1 or config.size == 1:
            return None
        tree = cls(config, table, num_codes)
        return tree if tree.num_columns else None

    @property
    def num_columns(self) -> int:
        """E, tokens that a forward is fed beside the window."""
        return len(self.roots)

    def grow(self, slots: Slots, noise: Tensor) -> tuple[Tensor, Branches]:
        """Tokens (B, depth, width - 1, length) of the coming pass's branches, and how they are fed.

        Args:
            slots: the window.
            noise: (B, depth, K) Gumbel noise that ranks the candidates of a slot.
        """
        assert slots.draft_probs is not None
        # the k best perturbed scores are k draws without replacement; the draft is the first of all draws
        scores = slots.draft_probs[:, : self.depth].log() + noise
        drafts = slots.tokens[:, : self.depth, None].clamp_max(self.num_codes - 1)
        siblings = scores.scatter(-1, drafts, -torch.inf).topk(self.width - 1).indices[..., None]
        copies = slots.tokens[:, self.behind[:, :-1]][:, :, None].expand(-1, -1, self.width - 1, -1)
        tokens = torch.cat([siblings, copies], dim=-1)
        return tokens, Branches(
            F.embedding(tokens.flatten(1), self.table), self.roots, self.firsts, self.columns
        )


class TreePass(Pass):
    """A pass over the window and branches beside it; siblings are draws of their own (exact).

    Args:
        config: the method's values.
        rule: which drafts stand.
        tree: the shape of the branches.
    """

    keeps = frozenset({"draft_probs"})  # siblings are drawn from it

    def __init__(self, config: DecodingConfig, rule: Rule, tree: Tree) -> None:
        super().__init__(config, rule)
        self.tree = tree
        self.most_again = 1 + tree.length
        self.num_columns = config.size + tree.num_columns

    def __call__(self, context: Context, window: Window, slots: Slots, shape: Shape) -> Judged:
        """One forward pass, see `Pass`; what branches add to the run is written into verdict and scores."""
        index, fed = window.fed(slots, shape.again)
        tokens, branches = self.tree.grow(slots, self.noise(window, slots))
        logits, read = context.logits(index, fed, self.levels(slots), window.size, shape, branches)
        log, behind = log_law(logits, self.config.sampling).tensor_split([window.size], dim=1)
        this = self.judge(slots, Scores(log, read.first(window.size)))
        return this._replace(run=self.follow(window, slots, this, tokens, behind))

    def follow(self, window: Window, slots: Slots, this: Judged, branches: Tensor, behind: Tensor) -> Tensor:
        """Length (B,) of the run with what branches add to it; tokens and scores are written in place.

        Args:
            window: the window.
            slots: its slots, as the pass found them.
            this: the pass, as the window alone settles it.
            branches: (B, depth, width - 1, length) tokens of the branches.
            behind: (B, E, K) unnormalised log-probabilities of what follows each of them.
        """
        verdict, scores = this.verdict, this.scores
        scores.probs  # noqa: B018  the laws that drafts follow are those of the window: made before scores change
        rows = torch.arange(len(this.run), device=this.run.device)
        at = this.run.clamp_max(self.tree.depth - 1)
        rejected = (this.run < self.tree.depth) & ~verdict.accept_mask[rows, at]
        tokens, which = self.choose(window, slots, this, branches[rows, at, :, 0], at)
        verdict.tokens[rows, at] = tokens.where(rejected, verdict.tokens[rows, at])

        places = self.tree.behind[at]  # (B, length) slots that the branch has a law for
        laws = behind.view(*branches.shape, -1)[rows, at, which.clamp_min(0)]
        fields = (None if field is None else field[rows[:, None], places] for field in slots)
        further = judged(self.rule, Slots._make(fields), Scores(laws))
        gained = (num_leading(further.accept_mask[:, :-1]) + 1).where(rejected & (which >= 0), 0)
        theirs = places <= (at + gained)[:, None]
        place = (rows[:, None], places)
        verdict.tokens[place] = further.tokens.where(theirs, verdict.tokens[place])
        scores.log[place] = laws.where(theirs[..., None], scores.log[place])  # for observers
        return this.run + gained

    def noise(self, window: Window, slots: Slots) -> Tensor:
        """(B, depth, K) Gumbel noise that ranks the candidates of a slot: fresh in every pass."""
        return gumbel(window.keys(Purpose.SIBLINGS, self.tree.depth), self.tree.num_codes)

    def choose(
        self, window: Window, slots: Slots, this: Judged, siblings: Tensor, at: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Token (B,) of slot `at` (B,) if its draft is rejected, and which sibling it is; -1 = none."""
        assert slots.draft_probs is not None
        assert slots.uniforms is not None
        rows = torch.arange(len(at), device=at.device)
        accept_u = uniform(
            window.keys(Purpose.SIBLING_VERDICT, self.tree.depth)[rows, at], self.tree.width - 1
        )
        drafts = slots.tokens[rows, at].clamp_max(self.tree.num_codes - 1)
        candidates = torch.cat([drafts[:, None], siblings], dim=1)
        law = this.scores.log[rows, at].softmax(-1)
        residual_u = slots.uniforms[rows, at, 1]
        return first_sibling(candidates, slots.draft_probs[rows, at], law, accept_u, residual_u)


class ReplayTreePass(TreePass):
    """The same where the token is known (replay): siblings are the next best under the slot's own noise."""

    def noise(self, window: Window, slots: Slots) -> Tensor:
        """(B, depth, K) the Gumbel vectors of the slots."""
        assert slots.gumbel is not None
        return slots.gumbel[:, : self.tree.depth]

    def choose(
        self, window: Window, slots: Slots, this: Judged, siblings: Tensor, at: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The verdict's token (B,), and which sibling (B,) it is; -1 = none."""
        assert slots.draft_probs is not None
        rows = torch.arange(len(at), device=at.device)
        tokens = this.verdict.tokens[rows, at]
        possible = slots.draft_probs[rows, at].gather(1, siblings) > 0
        same = (siblings == tokens[:, None]) & possible
        return tokens, torch.where(same.any(1), same.long().argmax(1), -1)


def first_sibling(
    candidates: Int[Tensor, "B n"],
    draft_probs: Float[Tensor, "B K"],
    target_probs: Float[Tensor, "B K"],
    accept_u: Float[Tensor, "B m"],
    residual_u: Float[Tensor, " B"],
) -> tuple[Int[Tensor, " B"], Int[Tensor, " B"]]:
    """A slot whose draft was rejected: its siblings in turn, then the residual of them all.

    Source: recursive rejection sampling without replacement (Yang et al. 2024, Jeon et al. 2024). After each
    rejection the target is the residual, and the law of the next candidate is the draft law without those
    that went before; both are made to sum to one again. With the draft's own test in front the token follows
    the target exactly.

    Args:
        candidates: (B, n) the rejected draft, then its n - 1 siblings, drawn from the draft law one after
            the other without replacement.
        draft_probs, target_probs: (B, K) laws of the slot.
        accept_u: (B, n - 1) and residual_u: (B,) independent uniform numbers, not those of the draft's test.

    Returns:
        tokens (B,), and which sibling (B,) each is, from 0; -1 = none.
    """
    rest = residual(target_probs, draft_probs)
    which = torch.full_like(candidates[:, 0], -1)
    for number in range(candidates.shape[1] - 1):
        draft_probs = draft_probs.scatter(-1, candidates[:, number : number + 1], 0.0)
        draft_probs = draft_probs / draft_probs.sum(-1, keepdim=True).clamp_min(1e-30)
        rest = rest / rest.sum(-1, keepdim=True)
        chosen = candidates[:, number + 1 : number + 2]
        target, draft = (p.gather(-1, chosen).squeeze(-1) for p in (rest, draft_probs))
        stands = (accept_u[:, number] * draft < target) & (draft > 0)
        which = torch.where(stands & (which < 0), number, which)
        rest = residual(rest, draft_probs)
    tokens = candidates.gather(1, which[:, None] + 1).squeeze(1)
    return tokens.where(which >= 0, draw(rest, residual_u)), which
