"""Images on the way, as pictures: drafts are faint, and nothing stands where no pass has looked."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from sjd2_lightning.models.backbone import Backbone, ImageLayout
from sjd2_lightning.models.image_tokenizer import to_uint8
from sjd2_lightning.playground.race import Race, Runner
from sjd2_lightning.report.observe import OUTSIDE, Moment

SMALL_PX = 128  # images up to this side are shown pixel by pixel
_LIVE_PX = 512  # greatest side of a picture on the way; finished ones are whole
BLANK = "data:image/gif;base64,R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7"  # nothing
_DRAFT, _NOISY = 0.45, 0.25  # opacity of drafts that were fed clean, and noisy


@dataclass(frozen=True)
class Side:
    """One method at one moment.

    Attributes:
        name: its name.
        passes, seconds: passes so far and what they took.
        committed: share of the codes that are committed.
        done: whether the image is finished.
        picture: the picture as a data URL.
        size: (height, width) of the image in pixels.
    """

    name: str
    passes: int
    seconds: float
    committed: float
    done: bool
    picture: str
    size: tuple[int, int]


@torch.inference_mode()
def draw(backbone: Backbone, moments: Sequence[Moment | None], layout: ImageLayout) -> list[np.ndarray]:
    """A picture (h, w, 4) uint8 of each moment; None is one before the first pass.

    Args:
        backbone: model whose image decoder draws them.
        moments: moments of images of one layout.
        layout: the layout.
    """
    height, width = layout.pixels
    known = [moment for moment in moments if moment is not None]
    if not known:
        return [np.zeros((height, width, 4), np.uint8) for _ in moments]
    codes = [_filled(moment.guesses) for moment in known]
    grids = torch.from_numpy(np.stack(codes)).view(-1, layout.height, layout.width)
    images = iter(to_uint8(backbone.decode_images(grids.to(backbone.device), layout)).numpy())
    found = []
    for moment in moments:
        if moment is None:
            found.append(np.zeros((height, width, 4), np.uint8))
            continue
        image = next(images)
        rows, columns = layout.grid
        alpha = _opacity(moment)[-rows * columns :].reshape(rows, columns)
        scale = image.shape[0] // rows, image.shape[1] // columns
        alpha = alpha.repeat(scale[0], 0).repeat(scale[1], 1)
        found.append(np.concatenate([image, alpha[..., None]], 2))
    return found


def data_url(picture: np.ndarray, whole: bool) -> str:
    """A picture as a data URL: a PNG if it is whole or small, else made smaller, as WebP."""
    image, buffer = Image.fromarray(picture), io.BytesIO()
    kind = "png"
    if whole or max(image.size) <= SMALL_PX:
        image.save(buffer, "PNG", compress_level=1)
    else:
        kind = "webp"
        image.thumbnail((_LIVE_PX, _LIVE_PX))
        image.save(buffer, "WEBP", quality=85, method=0)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def sides(race: Race, place: int | None = None, *, whole: bool = True) -> list[Side]:
    """All methods of a race at one moment.

    Args:
        race: the race.
        place: number of passes after which it is looked at; None is now.
        whole: whether finished pictures keep their size.
    """
    passes = [
        runner.seen.num_passes if place is None else min(place, runner.seen.num_passes)
        for runner in race.runners
    ]
    moments = [
        runner.seen.moment(num - 1) if num else None for runner, num in zip(race.runners, passes, strict=True)
    ]
    pictures = draw(race.backbone, moments, race.layout)
    return [
        _side(runner, num, moment, picture, whole)
        for runner, num, moment, picture in zip(race.runners, passes, moments, pictures, strict=True)
    ]


def _side(runner: Runner, passes: int, moment: Moment | None, picture: np.ndarray, whole: bool) -> Side:
    done = moment is not None and moment.num_committed == len(moment.guesses)
    committed = 0.0 if moment is None else moment.num_committed / len(moment.guesses)
    seconds = runner.clock[min(passes, len(runner.clock) - 1)]
    return Side(
        runner.name, passes, seconds, committed, done, data_url(picture, done and whole), runner.layout.pixels
    )


def _filled(guesses: np.ndarray) -> np.ndarray:
    """Codes with the commonest one where no pass has looked."""
    return np.where(guesses == OUTSIDE, np.bincount(guesses[guesses != OUTSIDE]).argmax(), guesses)


def _opacity(moment: Moment) -> np.ndarray:
    share = np.where(moment.levels > 0, _NOISY, _DRAFT)
    share[: moment.num_committed] = 1
    share[moment.guesses == OUTSIDE] = 0
    return (255 * share).round().astype(np.uint8)
