"""The order in which a report shows prompts: those that the model draws best come first.

The numbers of a report are of all prompts, whatever is shown first.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from sjd2_lightning.decoding.config import BASELINE
from sjd2_lightning.evaluation.results import EvaluationResult, MethodResult

_SIDE = 64  # pixels; likeness of larger pictures is looked at in this size


def best_known(result: EvaluationResult) -> list[int]:
    """Places of the prompts, by falling likeness of the baseline's image to the real picture.

    Likeness is the correlation of pixels in each colour, which an empty image does not get by its colour.
    Without the baseline the first method's images count. Prompts without a real picture come last, as given.
    """
    method = result.methods.get(BASELINE) or next(iter(result.methods.values()))
    places = range(len(result.prompts))
    likeness = [_likeness(result, method, place) for place in places]
    return sorted(places, key=lambda place: -likeness[place])


def has_real_pictures(result: EvaluationResult) -> bool:
    """Whether some prompt has a real picture."""
    keys = set() if result.reference is None else set(result.reference.keys)
    return any(item.key in keys for item in result.prompts)


def _likeness(result: EvaluationResult, method: MethodResult, place: int) -> float:
    real = result.real_image(result.prompts[place].key)
    if real is None:
        return -np.inf
    (drawn,) = result.store.images(method.records[place : place + 1])
    return float((_without_mean(drawn) * _without_mean(real)).sum())


def _without_mean(image: Tensor) -> Tensor:
    """(3, side * side) of an image (h, w, 3) uint8: each colour less its mean, all together of length 1."""
    pixels = F.resize(image.permute(2, 0, 1).to(torch.float32), [_SIDE, _SIDE], antialias=True).flatten(1)
    pixels = pixels - pixels.mean(1, keepdim=True)
    return pixels / pixels.norm().clamp(min=1e-6)
