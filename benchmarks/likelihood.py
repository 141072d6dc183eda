"""How likely images are under autoregression: what a method that is not lossless costs, in nats.

Source: ours. A lossless method's images have autoregression's own mean, the entropy of its law; rules that
accept too much move it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from sjd2_lightning.decoding.law import Sampling, guided, log_law
from sjd2_lightning.models.backbone import Backbone, ImageLayout
from sjd2_lightning.training.batch import code_logits, trunk_input


@torch.inference_mode()
def nats_per_code(
    backbone: Backbone, prompts: Sequence[str], image_ids: Tensor, layout: ImageLayout, sampling: Sampling
) -> Tensor:
    """(B,) mean negative log-probability of an image's codes under autoregression, in one full forward.

    The law has the guidance and temperature of `sampling`, without top-k and top-p: under those a code that
    another rule took may have no probability at all.

    Args:
        backbone: the model, in eval mode.
        prompts: B texts.
        image_ids: (B, height, width) codes.
        layout: layout of the images.
        sampling: what turns logits into the law.

    Raises:
        ValueError: for greedy decoding, whose law has no density to speak of.
    """
    if sampling.temperature == 0:
        raise ValueError("greedy decoding has no likelihood: give a temperature above 0")
    scores = log_laws(backbone, prompts, image_ids, layout, replace(sampling, top_k=0, top_p=1.0))
    return -scores.gather(-1, image_ids.flatten(1)[..., None]).squeeze(-1).mean(1)


@torch.inference_mode()
def log_laws(
    backbone: Backbone, prompts: Sequence[str], image_ids: Tensor, layout: ImageLayout, sampling: Sampling
) -> Tensor:
    """(B, height * width, K) log-probabilities of every code given those before it, in one full forward.

    Source: ours. Arguments as in `nats_per_code`; codes that `sampling` cuts off have -inf.
    """
    rows = [backbone.prompt_ids(prompt, layout) for prompt in prompts]
    scale: float | Tensor = sampling.guidance_scale
    if scale != 1:
        rows += [backbone.unconditional_ids(layout, ids) for ids in rows]
        image_ids = image_ids.repeat(2, 1, 1)
        if sampling.guidance_schedule != "constant":
            scale = sampling.scales(layout.num_slots)[layout.code_slots].to(backbone.device)
            scale = scale.expand(len(prompts), -1)
    logits = code_logits(backbone, trunk_input(backbone, rows, image_ids, layout, None), layout)
    return log_law(guided(logits, scale), sampling).log_softmax(-1)
