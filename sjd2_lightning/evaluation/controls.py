"""What a metric must show on real images before it is believed: controls of judge, CLIP score and PickScore.

A judge must find real scenes right by their own captions, and wrong by those of other scenes. A scorer of
images against captions must rank real images above copies that show the same colours and no objects.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sjd2_lightning.evaluation.references import ReferenceSet, patch_shuffled
from sjd2_lightning.metrics.alignment import scores_of_others
from sjd2_lightning.metrics.bootstrap import MetricResult, mean_result, paired_difference
from sjd2_lightning.metrics.judge import NAMES, Asked, Judge
from sjd2_lightning.run.files import write_whole
from sjd2_lightning.run.harmless import harmless

MOST_IMAGES = 256  # real images that controls look at, taken evenly from all
RIGHT, WRONG = 0.97, 0.03  # shares of real scenes that are right: by own captions at least, by others at most
MARGIN = 0.1  # share of the real images' gain by which it must lie above that of every altered copy
_BLOCKS_PX = (8, 16, 32)  # of the shuffled copies
_FLAT = "the mean colour alone"


@dataclass(frozen=True)
class Control:
    """What the controls of one metric showed.

    Attributes:
        metric: name of the metric in reports.
        passed: whether it is shown.
        sentence: what was seen; where it did not pass, why the metric is not shown.
        measured: numbers behind the sentence by name.
    """

    metric: str
    passed: bool
    sentence: str
    measured: dict[str, MetricResult]


def judge_control(judge: Judge, reference: ReferenceSet, num_resamples: int = 2000) -> Control:
    """Real scenes by their own captions, and by those of other scenes, which show other objects.

    Args:
        judge: a judge of images of this size.
        reference: real scenes with what their captions ask for.
        num_resamples: bootstrap resamples.
    """
    part = reference.part(_evenly([i for i, a in enumerate(reference.asked) if a.category != NAMES]))
    images = torch.stack(list(part.images))
    others = [_another(part.asked, place) for place in range(len(part.asked))]
    found = {
        name: mean_result(
            f"judge_{name}", [verdict.right for verdict in verdicts], "real scenes", num_resamples
        )
        for name, verdicts in (("own", judge(images, part.asked)), ("others", judge(images, others)))
    }
    own, other = found["own"].value, found["others"].value
    passed = own >= RIGHT and other <= WRONG
    sentence = (
        f"{len(part.asked)} real scenes are {100 * own:.1f} % right by their own captions and "
        f"{100 * other:.1f} % by those of other scenes"
    )
    if not passed:
        sentence += f", where at least {100 * RIGHT:.0f} % and at most {100 * WRONG:.0f} % make it believed"
    return Control("judge", passed, _said("judge", passed, sentence), found)


class CaptionScorer(Protocol):
    """Scores images by captions, by the cosines of their embeddings."""

    @property
    def name(self) -> str: ...

    @property
    def metric_name(self) -> str: ...

    def embed_images(self, images: Sequence[Tensor]) -> Tensor: ...

    def embed_captions(self, captions: Sequence[str]) -> Tensor: ...

    def scored(self, cosines: Tensor) -> Tensor: ...


def scorer_control(
    scorer: CaptionScorer,
    weights: str,
    reference: ReferenceSet,
    num_resamples: int = 2000,
    folder: str | Path | None = None,
) -> Control:
    """Gain of real images by their captions, less that of copies with shuffled blocks or of one colour.

    Args:
        scorer: the scorer.
        weights: hash of its weights.
        reference: real images; those without captions are passed over.
        num_resamples: bootstrap resamples.
        folder: keeps gains between runs; None computes them anew.
    """
    part = reference.part(_evenly([i for i, caption in enumerate(reference.captions) if caption]))
    if len(set(part.captions)) < 2:
        sentence = "there are no real images with captions that it could be held against"
        return Control(scorer.metric_name, False, _said(scorer.metric_name, False, sentence), {})
    gains = _kept_gains(scorer, weights, part, folder)
    real = mean_result(f"{scorer.metric_name}_real", gains["real"], "gain of real images", num_resamples)
    found = {"real": real}
    wrong, most = [], max(MARGIN * real.value, 0.0)
    for name, values in gains.items():
        if name == "real":
            continue
        less = paired_difference(
            f"{scorer.metric_name}_real_less",
            gains["real"],
            values,
            f"real images less {name}",
            num_resamples,
        )
        found[name] = less
        low = less.interval[0] if less.interval else less.value
        if low <= most:
            wrong.append(f"{values.mean():.1f} of {name}")
    sentence = f"its gain is {real.value:.1f} of {len(part.captions)} real images"
    if wrong:
        sentence += f" and {', '.join(wrong)}: not {100 * MARGIN:.0f} % less, so it sees no objects"
    else:
        sentence += f", and less of copies with shuffled blocks or {_FLAT}"
    return Control(scorer.metric_name, not wrong, _said(scorer.metric_name, not wrong, sentence), found)


def altered_copies(images: Sequence[Tensor]) -> Iterator[tuple[str, list[Tensor]]]:
    """Copies of images (h, w, 3) uint8 that show no objects any more, with what was done to them."""
    for side in _BLOCKS_PX:
        copies = [
            patch_shuffled(image[None], max(2, min(image.shape[:2]) // side), seed)[0]
            for seed, image in enumerate(images)
        ]
        yield f"shuffled blocks of {side} px", copies
    yield _FLAT, [image.float().mean((0, 1)).round().to(torch.uint8).expand_as(image) for image in images]


def _gains(scorer: CaptionScorer, part: ReferenceSet) -> dict[str, NDArray[np.float64]]:
    texts, images = scorer.embed_captions(part.captions), list(part.images)
    found = {}
    for name, copies in (("real", images), *altered_copies(images)):
        rows = scorer.embed_images(copies)
        own = scorer.scored((rows * texts).sum(-1))
        gain = own - scores_of_others(rows, texts, part.captions, scorer.scored)
        found[name] = gain.double().numpy()
    return found


def _kept_gains(
    scorer: CaptionScorer, weights: str, part: ReferenceSet, folder: str | Path | None
) -> dict[str, NDArray[np.float64]]:
    """`_gains`, from the folder where an earlier run left those of the same scorer, images and captions."""
    asked = "\n".join([scorer.name, weights, part.identity, *part.captions])
    path = Path(folder or ".") / f"clip-control-{hashlib.sha256(asked.encode()).hexdigest()[:32]}.json"
    if folder is not None and weights and path.is_file():
        try:
            return {name: np.array(values) for name, values in json.loads(path.read_text()).items()}
        except (ValueError, OSError):
            pass  # it is written anew
    found = _gains(scorer, part)
    if folder is not None and weights:
        with harmless(f"keeping controls in metrics.cache_dir={folder}"):
            write_whole(path, json.dumps({name: values.tolist() for name, values in found.items()}))
    return found


def _evenly(places: Sequence[int]) -> list[int]:
    """At most `MOST_IMAGES` of some places, evenly."""
    spread = np.linspace(0, len(places) - 1, min(MOST_IMAGES, len(places))).round().astype(int)
    return [places[place] for place in spread]


def _another(asked: Sequence[Asked], place: int) -> Asked:
    """What the next scene asks for that shows other objects; of the same category if there is one."""
    following = [*asked[place + 1 :], *asked[:place]]
    strangers = [other for other in following if not other.objects.keys() & asked[place].objects.keys()]
    alike = [other for other in strangers if other.category == asked[place].category]
    return next(iter([*alike, *strangers, *following]))


def _said(metric: str, passed: bool, sentence: str) -> str:
    return f"{metric}: {sentence}" if passed else f"{metric} is not shown: {sentence}"
