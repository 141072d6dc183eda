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

from sjd2_lightning.decoding.context import Context
from sjd2_lightning.decoding.methods import DecodingConfig
from sjd2_lightning.decoding.probs import log_law
from sjd2_lightning.decoding.randomness import Purpose, stream, uniform
from sjd2_lightning.decoding.refine import REFINERS, Laws
from sjd2_lightning.decoding.stats import DecodeOutput, DecodeStats, Iteration
from sjd2_lightning.decoding.verify import Verdict, num_leading, verify_replay, verify_speculative
from sjd2_lightning.decoding.window import Slots, SlotSource, advance
from sjd2_lightning.models.backbone import Backbone, ImageLayout

Observer = Callable[[Iteration], None]
_LEAVE_SHARE = 0.25  # finished rows leave the batch once they are this share of it: leaving copies the cache


def judge(
    slots: Slots, source: SlotSource, forced: Tensor, scores: Tensor, draw: int
) -> tuple[Verdict, Tensor, Tensor | None]:
    """Verdict on every slot of the window, refined drafts and the law that those were drawn from.

    Args:
        slots: the window.
        source: of the slots; holds the method.
        forced: (B, W) structural slot ids, -1 where a code is drawn.
        scores: (B, W, K) unnormalised log-probabilities.
        draw: number of the iteration.
    """
    config = source.config
    codes = slots.tokens.where(forced < 0, 0)
    if slots.gumbel is not None:
        verdict = verify_replay(codes, scores, slots.gumbel)
        refined, law = verdict.tokens, None
    else:
        assert slots.draft_probs is not None
        noisy = slots.levels > 0
        if config.acceptance == "paper" and slots.noisy is not None:
            codes = source.space.nearest_ids(slots.noisy).where(noisy, codes)
        law = scores.softmax(-1)
        accept_u, residual_u, fresh_u = uniform(stream(slots.keys, Purpose.VERDICT, draw), 3).unbind(-1)
        verdict = verify_speculative(codes, slots.draft_probs, law, accept_u, residual_u)
        refined = REFINERS[config.refiner](Laws(codes, slots.draft_probs, law, noisy), verdict, fresh_u)
    # structural slots have a one-hot law on the token they start with: they always stand
    tokens = verdict.tokens.where(forced < 0, forced)
    return Verdict(tokens, verdict.accept_mask | (forced >= 0)), refined.where(forced < 0, forced), law


def runs(verdict: Verdict, levels: Tensor, acceptance: str) -> tuple[Tensor, Tensor]:
    """Lengths (B,) of two runs at the left of the window: slots that stand, and entries of the cache that do.

    An entry stands if its slot and all before it were fed as the clean embeddings of what they are now. The
    paper's rule lets drafts of noisy slots stand too; they are fed again.
    """
    clean = verdict.accept_mask & (levels == 0)
    cached = num_leading(clean[:, :-1])  # the last slot was not fed
    return (num_leading(verdict.accept_mask[:, :-1]) if acceptance == "paper" else cached), cached


@torch.inference_mode()
def decode(
    backbone: Backbone,
    prompts: Sequence[str],
    seeds: Sequence[int],
    config: DecodingConfig,
    layout: ImageLayout,
    observer: Observer | None = None,
) -> DecodeOutput:
    """Draws one image a prompt (paper, section on decoding; replay mode ours).

    Rows advance independently, and the tokens of a prompt depend on its seed alone, not on its batch.

    Args:
        backbone: the model, in eval mode.
        prompts: B texts.
        seeds: B integers.
        config: the method.
        layout: of the images, from `backbone.layout`.
        observer: called after each forward pass.

    Raises:
        ValueError: before the first forward, for bad values, an empty prompt or lists of unequal length.
    """
    config.check()
    if len(prompts) != len(seeds) or not prompts:
        raise ValueError(f"need one seed a prompt and at least one; got {len(prompts)} and {len(seeds)}")
    device, window, num_slots = backbone.device, config.window, layout.num_slots
    source = SlotSource(config, layout, backbone.slot_table(), backbone.num_codes)
    side = source.space.timestep_tokens(source.timesteps[1:])
    refeed = window if config.acceptance == "paper" else 1
    context = Context(backbone, prompts, layout, side, window, refeed, config.sampling.guidance_scale)

    rows = torch.arange(len(prompts), device=device)  # which image each row is; finished ones leave
    seed = torch.tensor(list(seeds), device=device)
    heads = torch.zeros_like(rows)
    span = torch.arange(window, device=device)
    slots = source.new(seed, span.expand(len(prompts), -1))
    ids = torch.zeros(len(prompts), num_slots + window, dtype=torch.long, device=device)
    settled_at = torch.zeros_like(ids)
    committed_log: list[Tensor] = []
    first_head, last_head, refeed, index = 0, 0, 1, 0
    while first_head < num_slots:
        recent = ids[rows].gather(1, (heads[:, None] + span[:refeed] - refeed).clamp_min(0))
        fed = source.embeddings(slots)[:, :-1]
        logits = context.logits(heads, source.table[recent], fed, slots.levels[:, :-1], last_head)
        scores = log_law(logits, config.sampling)
        positions = heads[:, None] + span
        verdict, refined, law = judge(slots, source, source.forced[positions], scores, index)

        run, cached = runs(verdict, slots.levels, config.acceptance)
        committed = (run + 1).minimum(num_slots - heads)  # the slot behind the run was judged rightly too
        ids[rows[:, None], positions] = verdict.tokens  # slots past the run are overwritten when they settle
        settled_at[rows[:, None], positions] = index
        committed_log.append(rows.new_zeros(len(prompts)).index_copy(0, rows, committed))
        if observer is not None:
            seen = (heads, committed, verdict.tokens, slots.levels, scores, slots.gumbel)
            observer(Iteration(index, rows, *seen))

        heads = heads + committed
        index += 1
        done = heads >= num_slots
        uncached = (committed - cached).max()
        summary = torch.stack([heads.min(), heads.max(), committed.max(), uncached, done.sum()])
        first_head, last_head, most, refeed, num_done = summary.tolist()  # the only wait for the device
        if first_head >= num_slots:
            break
        refeed = max(1, refeed)
        slots = source.renew(slots, refined, law)
        entering = source.new(seed, (heads[:, None] + span[window - most :]).clamp_max(num_slots))
        slots = advance(slots, committed, entering)
        if num_done >= _LEAVE_SHARE * len(rows):
            left = (~done).nonzero().squeeze(1)
            context.keep_rows(left, len(rows))
            rows, seed, heads = rows[left], seed[left], heads[left]
            slots = slots.keep_rows(left)

    slot_ids = ids[:, :num_slots]
    stats = DecodeStats(torch.stack(committed_log).cpu(), settled_at[:, :num_slots].cpu())
    return DecodeOutput(slot_ids, layout.image_ids(slot_ids), stats)
