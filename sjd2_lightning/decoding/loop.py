"""The decoding loop: one for every method of the Jacobi family, autoregression included.

An iteration: one forward pass over the last committed tokens and the window; a verdict on every slot; the
longest run that stands is committed; the rest is refined and moves on.

Why a slot may be committed: its law is read at the slot to its left and never depends on its own embedding.
So the head can always be settled, and a run goes on as long as each slot before its end was fed as the clean
embedding of the very token that it is committed as.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sjd2_lightning.decoding.config import DecodingConfig
from sjd2_lightning.decoding.context import Context
from sjd2_lightning.decoding.law import log_law
from sjd2_lightning.decoding.output import DecodeOutput, DecodeStats, Iteration
from sjd2_lightning.decoding.rules import (
    REFINERS,
    Laws,
    Refined,
    Verdict,
    num_leading,
    verify_match,
    verify_pure,
    verify_replay,
    verify_speculative,
)
from sjd2_lightning.decoding.variants.grouped import group_of, verify_grouped
from sjd2_lightning.decoding.variants.pairs import Sweeper
from sjd2_lightning.decoding.variants.tree import Pass, Tree
from sjd2_lightning.decoding.window import Slots, SlotSource, Window
from sjd2_lightning.models.backbone import Backbone, ImageLayout

Observer = Callable[[Iteration], None]
_LEAVE_SHARE = 0.25  # finished rows leave the batch once they are this share of it: leaving copies the cache


def judge(slots: Slots, source: SlotSource, scores: Tensor) -> tuple[Verdict, Tensor, Tensor | None]:
    """Verdict on every slot of the window, refined drafts and the law that those were drawn from, if needed.

    Noisy slots are judged like clean ones: x0_hat too is coupled through the levels, by the slot's own Gumbel
    vector or by the maximal coupling.

    Args:
        slots: the window.
        source: of the slots; holds the method.
        scores: (B, W, K) unnormalised log-probabilities.
    """
    refined, law = None, None
    if slots.gumbel is not None:
        verdict = verify_replay(slots.tokens, scores, slots.gumbel)
        if slots.draft_probs is not None or source.config.reads_law:  # siblings are drawn from it
            law = scores.softmax(-1)
    elif slots.draft_probs is not None:
        verdict, (refined, law) = _judge_by_laws(slots, slots.draft_probs, source, scores.softmax(-1))
    else:
        law = scores.softmax(-1)
        verdict = _judge_by_tokens(slots, source.config, law)
    # structural slots have a one-hot law on the token they start with: they always stand
    tokens = verdict.tokens.where(slots.is_code, slots.tokens)
    accept_mask = verdict.accept_mask | ~slots.is_code
    if refined is None or refined is verdict.tokens:
        return Verdict(tokens, accept_mask), tokens, law
    return Verdict(tokens, accept_mask), refined.where(slots.is_code, slots.tokens), law


def _judge_by_laws(
    slots: Slots, draft_probs: Tensor, source: SlotSource, law: Tensor
) -> tuple[Verdict, Refined]:
    """By the ratio of the target law (B, W, K) to the law that drafts were drawn from."""
    assert slots.uniforms is not None
    codes = slots.tokens.clamp_max(source.num_codes - 1)  # structural slots: any code, `judge` ignores it
    noisy = None if slots.levels is None else slots.levels > 0
    if source.config.acceptance == "paper" and slots.noisy is not None and noisy is not None:
        codes = source.space.nearest_ids(slots.noisy).where(noisy, codes)
    accept_u, residual_u, fresh_u = slots.uniforms.unbind(-1)
    if source.config.acceptance == "grouped":
        group = group_of(codes, law, source.space, source.config.groups)
        verdict = verify_grouped(codes, draft_probs, law, accept_u, residual_u, group)
    else:
        verdict = verify_speculative(codes, draft_probs, law, accept_u, residual_u)
    return verdict, REFINERS[source.config.refiner](Laws(codes, draft_probs, law, noisy), verdict, fresh_u)


def _judge_by_tokens(slots: Slots, config: DecodingConfig, law: Tensor) -> Verdict:
    """By the drafts themselves: no law of theirs is recorded."""
    assert slots.uniforms is not None
    fresh_u = slots.uniforms[..., 2]
    if config.acceptance == "match":
        return verify_match(slots.tokens, law, fresh_u)
    clean = torch.ones_like(slots.is_code) if slots.levels is None else slots.levels == 0
    return verify_pure(slots.tokens, law, fresh_u, clean, max(1, config.size // max(1, config.num_levels)))


def runs(verdict: Verdict, levels: Tensor | None, acceptance: str) -> tuple[Tensor, Tensor]:
    """Lengths (B,) of two runs at the left of the window: slots that stand, and entries of the cache that do.

    An entry stands if its slot and all before it were fed as the clean embeddings of what they are now. The
    paper's rule lets drafts of noisy slots stand too; they are fed again.
    """
    stands = verdict.accept_mask[:, :-1]  # the last slot was not fed
    cached = num_leading(stands if levels is None else stands & (levels[:, :-1] == 0))
    return (num_leading(stands) if acceptance == "paper" else cached), cached


def num_refed(config: DecodingConfig) -> tuple[int, int]:
    """Fewest and most accepted tokens that a pass feeds again because the cache does not hold them."""
    if config.acceptance == "paper":
        return 1, config.size
    most = 1 if config.tree.width == 1 else 1 + config.tree.length
    return (most if config.compile else 1), most


@torch.inference_mode()
def decode(
    backbone: Backbone,
    prompts: Sequence[str],
    seeds: Sequence[int],
    config: DecodingConfig,
    layout: ImageLayout | Sequence[ImageLayout],
    observer: Observer | None = None,
) -> DecodeOutput:
    """Draws one image a prompt (paper, section on decoding; replay mode ours).

    Rows advance independently, and a prompt's tokens depend on its seed and size alone, not on its batch.

    Args:
        backbone: the model, in eval mode.
        prompts: B texts.
        seeds: B integers.
        config: the method.
        layout: of the images, from `backbone.layout`: one for all, or one a prompt.
        observer: called after each forward pass.

    Raises:
        ValueError: before the first forward, for bad values, an empty prompt or lists of unequal length.
    """
    config.check()
    if len(prompts) != len(seeds) or not prompts:
        raise ValueError(f"need one seed a prompt and at least one; got {len(prompts)} and {len(seeds)}")
    layouts = [layout] * len(prompts) if isinstance(layout, ImageLayout) else list(layout)
    if len(layouts) != len(prompts):
        raise ValueError(f"need one layout for all prompts or one a prompt; got {len(layouts)}")
    device, num_slots = backbone.device, max(layout.num_slots for layout in layouts)
    source = SlotSource(config, layout, backbone.slot_table(), backbone.num_codes)
    side = source.space.timestep_tokens(source.timesteps[1:])
    tree, sweeper = Tree.of(source), Sweeper.of(source)
    spare = config.size if tree is None else config.size + tree.num_columns
    least_refed, most_refed = num_refed(config)
    context = Context(backbone, prompts, layouts, side, spare, most_refed, config)
    window = Window(source, torch.tensor(list(seeds), device=device))
    slot_ids = torch.empty(len(prompts), num_slots, dtype=torch.long, device=device)
    rows = list(range(len(prompts)))  # which image each row of the batch is; finished ones leave
    log: list[list[int]] = []
    refeed = least_refed
    while True:
        slots = window.slots()
        fed_slots, fed = window.fed(slots, refeed)
        levels = None if slots.levels is None else slots.levels[:, :-1]
        branches = None if tree is None else tree.grow(slots, window)
        scores = log_law(context.logits(fed_slots, fed, levels, config.size, branches), config.sampling)
        scores, behind = scores[:, : config.size], scores[:, config.size :]
        verdict, refined, law = judge(slots, source, scores)

        run, cached = runs(verdict, slots.levels, config.acceptance)
        if tree is not None and branches is not None:
            run = tree.follow(branches, Pass(slots, window, verdict, scores, behind, run), judge)
        committed = (run + 1).minimum(window.end - window.head)  # the slot behind the run was judged rightly
        if observer is not None:
            observer(_seen(len(log), rows, window, slots, committed, verdict, scores))
        settled = window.columns[: config.size] <= run[:, None]
        if sweeper is not None:
            refined = sweeper(slots, verdict.tokens, scores, settled)
        elif refined is not verdict.tokens:
            refined = verdict.tokens.where(settled, refined)
        window.renew(slots, refined, law)

        num_committed, uncached = _to_host(committed, None if least_refed == most_refed else cached)
        refeed = max(least_refed, *uncached)
        log.append([0] * len(prompts))
        for row, num in zip(rows, num_committed, strict=True):
            log[-1][row] = num
        window.advance(num_committed, committed)
        going = window.unfinished()
        if not going:
            break
        if len(rows) - len(going) >= _LEAVE_SHARE * len(rows):
            slot_ids[rows] = window.tokens[:, :num_slots]
            context.keep_rows(torch.tensor(going, device=device), len(rows))
            window.keep_rows(going)
            rows = [rows[place] for place in going]
    slot_ids[rows] = window.tokens[:, :num_slots]
    return DecodeOutput.of(slot_ids, layouts, DecodeStats(torch.tensor(log)))


def _to_host(committed: Tensor, cached: Tensor | None) -> tuple[list[int], list[int]]:
    """Committed slots of each row, and how many of them are not cached: the only wait for the device."""
    if cached is None:  # no more than are fed again anyway
        return committed.tolist(), [1]
    num_committed, num_cached = torch.stack([committed, cached]).tolist()
    return num_committed, [num - old for num, old in zip(num_committed, num_cached, strict=True)]


def _seen(
    index: int,
    rows: list[int],
    window: Window,
    slots: Slots,
    committed: Tensor,
    verdict: Verdict,
    scores: Tensor,
) -> Iteration:
    """What an observer sees; it may keep all of it, so views of buffers are copied."""
    levels = torch.zeros_like(slots.tokens) if slots.levels is None else slots.levels.clone()
    gumbel = None if slots.gumbel is None else slots.gumbel.clone()
    images = torch.tensor(rows, device=scores.device)
    return Iteration(index, images, window.head, committed, verdict.tokens, levels, scores, gumbel)
