"""The emoji pictures as a map-style dataset, for the recipes that look at pixels."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from sjd2_lightning.data.emoji import jitter, load_emoji_index, render


class Picture(NamedTuple):
    """One picture: `image` (3, size, size) float in [0, 1]."""

    image: Tensor
    caption: str
    concept: str


class EmojiPictures(Dataset[Picture]):
    """Pictures of one split; the training split is jittered anew in every epoch.

    Args:
        split: "train" or "val".
        size: side in pixels.
        seed: of the jitter; views depend on (seed, epoch, index) alone. `None` gives canonical views.
    """

    def __init__(self, split: str, size: int = 64, seed: int | None = None) -> None:
        self.items = [item for item in load_emoji_index() if item.split == split]
        self.size = size
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Picture:
        item = self.items[index]
        if self.seed is None:
            pixels = render(item.path, self.size)
        else:
            pixels = jitter(item.path, np.random.default_rng([self.seed, self.epoch, index]), self.size)
        image = torch.from_numpy(np.array(pixels)).permute(2, 0, 1).float() / 255
        return Picture(image, item.caption, item.concept)
