"""Partial images of a decoding, bounded in number and size, for the page's replay.

Source: ours. A partial image is a real decode: what is committed, the model's guesses in the window, and the
image's commonest code everywhere else, which the page hides.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from sjd2_lightning.models.backbone import Backbone
from sjd2_lightning.models.image_tokenizer import to_uint8
from sjd2_lightning.report.trajectory import OUTSIDE, Trajectory

MAX_FRAME_PX = 160
_CHUNK = 8  # images decoded together: bounds memory of large image decoders
_QUALITY = 88


@dataclass(frozen=True)
class Replay:
    """A trajectory and its partial images.

    Attributes:
        trajectory: what is replayed.
        passes: (F,) forward passes, from 0, after which the frames were taken; the last pass is among them.
        frames: (F, h, w, 3) uint8, at most `MAX_FRAME_PX` a side.
    """

    trajectory: Trajectory
    passes: tuple[int, ...]
    frames: np.ndarray


def shown_passes(num_passes: int, num_frames: int) -> tuple[int, ...]:
    """At most `num_frames` passes, evenly spread, the first and the last among them."""
    spread = np.linspace(0, num_passes - 1, min(num_frames, num_passes)).round().astype(int)
    return tuple(dict.fromkeys(spread.tolist()))


@torch.inference_mode()
def replay(backbone: Backbone, trajectory: Trajectory, num_frames: int) -> Replay:
    """Partial images of a trajectory.

    Args:
        backbone: whose image decoder draws them.
        trajectory: of `trace`.
        num_frames: at most so many, 2 or more.
    """
    passes = shown_passes(trajectory.num_passes, num_frames)
    codes = trajectory.guesses[list(passes)]
    filler = np.bincount(trajectory.image_ids).argmax()
    grids = torch.from_numpy(np.where(codes == OUTSIDE, filler, codes)).view(-1, *trajectory.size)
    frames = [
        _small(image.numpy())
        for chunk in grids.split(_CHUNK)
        for image in to_uint8(backbone.decode_images(chunk.to(backbone.device)))
    ]
    return Replay(trajectory, passes, np.stack(frames))


def sprite(replay: Replay) -> tuple[bytes, int]:
    """All frames in one WebP image, row by row, and how many stand in a row."""
    num, height, width = replay.frames.shape[:3]
    in_row = int(np.ceil(np.sqrt(num)))
    sheet = Image.new("RGB", (in_row * width, -(-num // in_row) * height))
    for place, frame in enumerate(replay.frames):
        sheet.paste(Image.fromarray(frame), (place % in_row * width, place // in_row * height))
    buffer = io.BytesIO()
    sheet.save(buffer, "WEBP", quality=_QUALITY, method=4)
    return buffer.getvalue(), in_row


def _small(pixels: np.ndarray) -> np.ndarray:
    image = Image.fromarray(pixels)
    image.thumbnail((MAX_FRAME_PX, MAX_FRAME_PX))
    return np.asarray(image)
