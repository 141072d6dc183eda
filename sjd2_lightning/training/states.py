"""What noisy codes of a training batch hold: the paper's x_t, tied noise, or what decoding would have made.

Everything is computed without gradients before the training pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from sjd2_lightning.embedding import EmbeddingSpace
from sjd2_lightning.models.backbone import Backbone, ImageLayout
from sjd2_lightning.noise import TIED, NoiseProcess, tied_noise, tied_rows
from sjd2_lightning.training.batch import NoisyCodes, TrunkInput, code_hidden, code_logits, trunk_input
from sjd2_lightning.training.noise import TrainingNoise


class TeacherForced(NamedTuple):
    """Images under teacher forcing: B prompts as token ids, clean codes (B, height, width), their layout.

    Lengths are made multiples of `bucket`.
    """

    prompts: Sequence[Sequence[int]]
    image_ids: Tensor
    layout: ImageLayout
    bucket: int = 1


def noisy_codes(
    backbone: Backbone,
    sample: TeacherForced,
    levels: Tensor,
    grid: Tensor,
    noise: TrainingNoise,
    rng: torch.Generator,
    dry: bool = False,
) -> NoisyCodes:
    """Noise of one batch.

    Gaussian x_t and codes from above cost no pass, other sources and the model's own law as a target one; a
    trajectory costs one and one more for each level below the top.

    Args:
        levels: (B, n) of the codes, on the CPU.
        grid: (L + 1,) amounts of noise.
        noise: its source, whether codes walk a trajectory, and what they hold on it.
        rng: on the CPU.
        dry: whether passes of a trajectory that move no code are taken all the same, so that their number
            depends on the grid alone: ranks that gather weights from each other must take as many.
    """
    with torch.no_grad():
        law = logits_of(backbone, sample, None).log_softmax(-1) if noise.reads_law else None
        gumbel = None
        if law is not None and noise.reads_gumbel:
            race = torch.empty(law.shape).exponential_(generator=rng).to(law)
            gumbel = posterior_gumbel(law, sample.image_ids.flatten(1), race)
        eps = _start(backbone, sample, noise.process.source, gumbel, rng)
        if law is not None and noise.process.source == "mean" and not noise.trajectory:
            below = (levels < len(grid) - 1)[..., None].to(eps)  # at the top nothing is known of the law
            eps = below * (law.exp() @ _normalised_rows(backbone))
        kept = law if noise.consistency else None
        found = NoisyCodes(levels, grid, eps, marked=noise.mark_drafts, clean_law=kept)
        if gumbel is not None and noise.trajectory:
            found = found._replace(states=walk(backbone, sample, found, gumbel, noise.process, dry))
    # autocast of some versions keeps weights that it cast without gradients for the pass that needs them
    torch.clear_autocast_cache()
    return found


def _normalised_rows(backbone: Backbone) -> Tensor:
    table = backbone.slot_table()[: backbone.num_codes]
    return EmbeddingSpace(table).normalise(table).float()


def _above(rows: Tensor, image_ids: Tensor) -> Tensor:
    """(B, n, D) embeddings of the codes one row up, by normalised rows (K, D); of the first row, the mean."""
    found = F.embedding(image_ids.roll(1, dims=1), rows)
    found[:, 0] = 0
    return found.flatten(1, 2)


def _start(
    backbone: Backbone, sample: TeacherForced, source: str, gumbel: Tensor | None, rng: torch.Generator
) -> Tensor:
    """What codes hold at the top level (B, n, D); `gumbel` (B, n, K) decides them, for tied noise."""
    shape = (*sample.image_ids.flatten(1).shape, backbone.hidden_size)
    if source == "gaussian":
        return torch.randn(shape, generator=rng).to(sample.image_ids.device)
    rows = _normalised_rows(backbone)
    if gumbel is not None and source in TIED:
        return tied_noise(gumbel, tied_rows(rows, source == "tied_white")).to(rows)
    return _above(rows, sample.image_ids) if source == "above" else rows.new_zeros(shape)


def walk(
    backbone: Backbone,
    sample: TeacherForced,
    start: NoisyCodes,
    gumbel: Tensor,
    process: NoiseProcess,
    dry: bool = False,
) -> Tensor:
    """States (B, n, D) float32 in which decoding would find the noisy codes, normalised.

    A code of level l entered the window L - l iterations ago, those left of it earlier. So k iterations ago
    its level was min(L, l + k), and each iteration moved it by the draft argmax(log p + g) that the model
    drew there. With the posterior g of the true tokens the image is the fixed point of that map. Codes of
    level 0 count as committed all the time.

    Args:
        start: levels, grid, and what codes start from (B, n, D).
        gumbel: (B, n, K) of each code.
        process: how noise goes.
        dry: whether passes that move nothing are taken too.
    """
    top, levels = len(start.timesteps) - 1, start.levels
    rows, states = _normalised_rows(backbone), start.eps
    grid = start.timesteps
    for ago in range(top - 1, 0, -1):
        moves = (levels > 0) & (levels + ago <= top)
        if not dry and not moves.any():  # levels are on the CPU: no wait for the device
            continue
        before = torch.where(levels > 0, (levels + ago).clamp_max(top), 0)
        logits = logits_of(backbone, sample, start._replace(levels=before, states=states))
        drawn = F.embedding((logits + gumbel).argmax(-1), rows)
        mean = logits.softmax(-1) @ rows if process.reads_mean else None
        t, s = (grid[level][..., None].to(states) for level in (before, (before - 1).clamp_min(0)))
        moved = process.step(states, drawn, mean, t, s)
        states = moved.where(moves[..., None].to(states.device), states)
    return states


def logits_of(backbone: Backbone, sample: TeacherForced, noise: NoisyCodes | None) -> Tensor:
    """Logits (B, n, K) float32 of every code; `None` is clean input."""
    return code_logits(backbone, fed_of(backbone, sample, noise), sample.layout).float()


def hidden_of(backbone: Backbone, sample: TeacherForced, noise: NoisyCodes | None) -> Tensor:
    """Hidden states (B, n, D) that the head reads each code from; `None` is clean input."""
    return code_hidden(backbone, fed_of(backbone, sample, noise), sample.layout)


def fed_of(backbone: Backbone, sample: TeacherForced, noise: NoisyCodes | None) -> TrunkInput:
    """What the trunk is fed of images under teacher forcing."""
    return trunk_input(backbone, sample.prompts, sample.image_ids, sample.layout, noise, sample.bucket)


def posterior_gumbel(
    log_probs: Float[Tensor, "*slots K"], tokens: Int[Tensor, "*slots"], race: Float[Tensor, "*slots K"]
) -> Float[Tensor, "*slots K"]:
    """Gumbel vectors g (..., K) given that `tokens` are argmax(log_probs + g).

    Over tokens drawn from the law, g is standard Gumbel. Source: top-down sampling of Gumbel maxima (Maddison
    et al. 2014), as a race: exp(-g_k) / p_k is the time at which code k arrives. The first arrival takes a
    standard exponential time whatever the law; the others, being memoryless, start from there.

    Args:
        log_probs: (..., K) normalised.
        tokens: (...,) the codes of the maximum.
        race: (..., K) independent standard exponential numbers.
    """
    chosen = tokens[..., None]
    first = race.gather(-1, chosen)
    gumbel = -torch.log(log_probs.exp() * first + race)
    return gumbel.scatter(-1, chosen, -first.log() - log_probs.gather(-1, chosen))
