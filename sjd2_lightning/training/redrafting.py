"""A corrector of drafts, trained beside the objective on what decoding would have made of real images (ours).

An image is cut into clean runs and runs that decoding has not settled yet. A slot of level l of such a run
entered the window P - l passes ago, of P passes. With the posterior Gumbel vectors of its codes the image is
what decoding draws, so that its passes can be made again: what each was fed, which drafts they left, and what
the slots become in the end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sjd2_lightning.models.backbone import Backbone
from sjd2_lightning.models.draft_corrector import code_rows
from sjd2_lightning.run.values import Within, wrong_values
from sjd2_lightning.training.batch import NoisyCodes
from sjd2_lightning.training.noise import RampLaw, draw_levels
from sjd2_lightning.training.states import TeacherForced, hidden_of, posterior_gumbel

# clean runs, slots that enter the window together (decoding commits two to ten a pass), and the window's end
_RUNS = RampLaw(clean_run=(1, 24), segment=(2, 10), top_run=(0, 24), clean_share=0.0)
_ROUNDS = 2  # corrections of drafts between passes
# scores of an image that are held at once: of large codebooks a part of the image is open
_MOST_NUMBERS = 2**26


@dataclass(frozen=True)
class CorrectorTraining:
    """How a corrector of drafts is trained beside the objective; the group `corrector` of the configuration.

    Attributes:
        width: number of its units; 0 trains none.
        images: most images of a batch that it learns from.
        every: it learns in every n-th step.
        passes: passes of decoding that are made again, beside the one that finds the laws.
        lr: its learning rate at the peak; the schedule is that of the optimizer.
    """

    width: Annotated[int, Within(0, 2**16)] = 0
    images: Annotated[int, Within(1, 2**20)] = 2
    every: Annotated[int, Within(1, 10**9)] = 1
    passes: Annotated[int, Within(1, 1000)] = 4
    lr: Annotated[float, Within(0, 1, without="least")] = 2e-3

    def problems(self) -> list[str]:
        """What is wrong with the values, a line each, starting with the key."""
        return wrong_values(self)


class Corrections(NamedTuple):
    """What a batch says of a corrector.

    Attributes:
        loss: cross-entropy of corrected and perturbed scores against the codes, mean over passes.
        right: share of drafts that are right beside their true neighbours.
    """

    loss: Tensor
    right: Tensor


def corrections_of(
    backbone: Backbone,
    sample: TeacherForced,
    training: CorrectorTraining,
    noisy: bool,
    rng: torch.Generator,
) -> Corrections:
    """Makes passes of decoding again and measures how the backbone's corrector corrects what they leave.

    Args:
        backbone: the model, with its corrector.
        sample: images and prompts.
        training: how it is trained.
        noisy: whether slots enter the window as noise; otherwise as random codes.
        rng: on the CPU.
    """
    network, num_codes = backbone.corrector, backbone.num_codes
    assert network is not None
    ids = sample.image_ids.flatten(1)
    device = ids.device
    batch, num = ids.shape
    top = draw_levels(batch, num, training.passes, _RUNS, rng)
    if (most := max(1, _MOST_NUMBERS // num_codes)) < num:
        first = int(torch.randint(num - most + 1, (), generator=rng))
        top[:, :first] = top[:, first + most :] = 0
    start = torch.randint(num_codes, (batch, num), generator=rng).to(device)
    eps = torch.randn(batch, num, backbone.hidden_size, generator=rng).to(device) if noisy else None
    slots = sample.layout.code_slots
    # codes behind a row's end, or the prompt, and not behind a code
    begins = F.pad(slots.diff() != 1, (1, 0), value=True)

    def beside(of: Tensor) -> Tensor:
        """(m, 2) what is left of the slots that are read, and above, of codes (B, n); K = not known."""
        left = F.pad(of, (1, 0), value=num_codes)[:, :-1].masked_fill(begins.to(device), num_codes)
        above = F.pad(of, (sample.layout.width, 0), value=num_codes)[:, :num]
        return torch.stack([left[read], above[read]], dim=-1)

    # slots that are open, or have a neighbour that was
    read = ((top > 0) | ((F.pad(top, (1, 0))[:, :-1] > 0) & ~begins)).to(device)
    codes, true = ids[read], beside(ids)
    with torch.no_grad():
        rows = code_rows(backbone.slot_table(), num_codes).to(network.out.weight)
        # 1. Gumbel vectors under which decoding draws these very images
        law = backbone.image_logits(hidden_of(backbone, sample, None)[read]).float().log_softmax(-1)
        race = torch.empty(law.shape).exponential_(generator=rng).to(law)
        gumbel = posterior_gumbel(law, codes, race)
    losses, right, drafts = list[Tensor](), law.new_zeros(()), start
    for ago in range(training.passes - 1, -1, -1):
        # 2. the pass of so many iterations ago: clean codes, drafts that it left, and what had just entered
        levels = torch.where(top > 0, (top + ago).clamp_max(training.passes), 0)
        is_open, entered = (levels > 0).to(device), (levels == training.passes).to(device)
        fed = torch.where(is_open, drafts, ids)
        noise = None
        if eps is not None:
            steps = (levels == training.passes).long()
            noise = NoisyCodes(steps, torch.tensor([0.0, 1.0]), eps)
        else:
            fed = torch.where(entered, start, fed)
        its = sample._replace(image_ids=fed.view_as(sample.image_ids))
        with torch.no_grad():
            scores = backbone.image_logits(hidden_of(backbone, its, noise)[read]).float() + gumbel
        # 3. beside its true neighbours the best code of a slot is the code that it became
        was = fed.masked_fill(entered, num_codes) if noisy else fed
        old = beside(was)
        changed = scores + network.change(rows, old, true)
        losses.append(F.cross_entropy(changed, codes))
        with torch.no_grad():
            right += (changed.argmax(-1) == codes).float().mean() / training.passes
            # 4. the drafts that decoding would have gone on with
            best = scores.argmax(-1)
            for _ in range(_ROUNDS if ago else 0):
                drafts = torch.where(is_open, ids.masked_scatter(read, best), ids)
                best = (scores + network.change(rows, old, beside(drafts))).argmax(-1)
            drafts = torch.where(is_open, ids.masked_scatter(read, best), ids)
    return Corrections(torch.stack(losses).mean(), right)
