"""What images are measured with, from the typed configuration."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from sjd2_lightning.config.groups import MetricsConfig, shipped
from sjd2_lightning.config.runs import SharedConfig
from sjd2_lightning.data.index import PROMPTS_NAME
from sjd2_lightning.data.sources.scene_shards import SOURCE as SCENES
from sjd2_lightning.evaluation.quality import QualityMetrics
from sjd2_lightning.evaluation.references import ReferenceSet
from sjd2_lightning.evaluation.scene_judge import scene_judge
from sjd2_lightning.metrics.alignment import load_clip_scorer
from sjd2_lightning.metrics.features import FeatureExtractor, load_feature_extractor
from sjd2_lightning.metrics.preference import PickScorer, check_pickscore
from sjd2_lightning.metrics.vision import CLIPVision, DINOv2, check_network
from sjd2_lightning.models.hub import HubName, download

# What a folder of each key is checked by before anything is loaded.
_CHECKS = {
    "dinov2": lambda folder: check_network(folder, DINOv2.KINDS),
    "cmmd": lambda folder: check_network(folder, CLIPVision.KINDS),
    "pickscore": check_pickscore,
}


def build_metrics(
    config: SharedConfig, reference: ReferenceSet | None, num_prompts: int, device: str | torch.device = "cpu"
) -> QualityMetrics:
    """What images are measured with: of the metrics that were asked for, those that say something here.

    Args:
        config: what is asked for.
        reference: real images, from `build_reference`.
        num_prompts: number of images that are measured.
        device: where the scorers go.
    """
    metrics = config.metrics
    few = num_of_distances(reference, num_prompts) < metrics.min_images
    clip, pick, embedder = None, None, None
    if metrics.clip is not None:
        clip = load_clip_scorer(
            shipped(metrics.clip) if "/" in metrics.clip else metrics.clip, metrics.clip_pretrained, device
        )
    extractors: list[FeatureExtractor] = [
        load_feature_extractor(name, device, metrics.inception_dir, metrics.allow_download)
        for name in (() if few else metrics.features)
    ]
    if metrics.dinov2 is not None and not few:
        extractors.append(DINOv2(*_weights_of(metrics, "dinov2"), device))
    if metrics.cmmd is not None and not few:
        embedder = CLIPVision(*_weights_of(metrics, "cmmd"), device)
    if metrics.pickscore is not None:
        pick = PickScorer(*_weights_of(metrics, "pickscore"), device)
    height, width = config.model.image_size
    has_judge = metrics.judge and config.data.source == SCENES and height == width
    return QualityMetrics(
        extractors=extractors,
        clip=clip,
        num_resamples=metrics.num_resamples,
        num_distance_resamples=metrics.num_distance_resamples,
        nearest_k=metrics.nearest_k,
        cache_dir=metrics.cache_dir,
        judge=scene_judge(height) if has_judge else None,
        embedder=embedder,
        pick=pick,
    )


def scorer_problems(metrics: MetricsConfig) -> Iterator[str]:
    """Folders and releases of `dinov2`, `cmmd` and `pickscore` that are not there, or of another model.

    A release that may be downloaded is not looked at.
    """
    for key, check in _CHECKS.items():
        value = getattr(metrics, key)
        if value is None or (HubName.of(value) is not None and metrics.allow_download):
            continue
        try:
            check(_weights_of(metrics, key)[0])
        except ValueError as error:
            yield f"metrics.{key}={value}: {str(error).removeprefix(f'metrics.{key}={value}: ')}"


def _weights_of(metrics: MetricsConfig, key: str) -> tuple[Path, str]:
    """The folder of a scorer's weights, and their name in reports, of a release on the hub with its commit.

    A release is downloaded only by `allow_download`.

    Raises:
        ValueError: it is not here; the message names key and remedy.
    """
    value = getattr(metrics, key)
    name = HubName.of(value)
    if name is None:
        return Path(value), value
    try:
        folder = download(name, local_files_only=not metrics.allow_download)
    except OSError as error:
        leave = "" if metrics.allow_download else ", or metrics.allow_download=true"
        raise ValueError(f"metrics.{key}={value}: {error}{leave}, or give a folder that is here") from error
    return folder, f"{name.hub_id}@{folder.name}"  # the hub's cache has a folder a commit


def num_of_distances(reference: ReferenceSet | None, num_prompts: int) -> int:
    """Number of images that a distance between real and drawn ones would be of."""
    return min(0 if reference is None else reference.num_images, num_prompts)


def left_out(config: SharedConfig, reference: ReferenceSet | None, num_prompts: int) -> Iterator[str]:
    """A sentence for each kind of score that says nothing here, with what would change that.

    Silent where nothing was asked for (`metrics=none`). Arguments are those of `build_metrics`.
    """
    metrics, data = config.metrics, config.data
    if not metrics.has_distances:
        return
    if metrics.clip is None:
        yield (
            "no CLIP score: the shipped scorer has seen scenes alone; metrics.clip=hf-hub:OWNER/MODEL, or "
            "the folder of one, scores other pictures"
        )
    num = num_of_distances(reference, num_prompts)
    if reference is None:
        yield "no distances: no real pictures are known for these data; give a folder, data.reference_dir"
    elif num < metrics.min_images:
        yield (
            f"no distances: {num} pictures are too few, and metrics.min_images={metrics.min_images} are "
            f"asked for ({num_prompts} drawn, {reference.num_images} real)"
        )
    has_own = data.prompt_file is not None or (Path(data.data_dir) / PROMPTS_NAME).is_file()
    if not data.prepare and metrics.protocol is None and not has_own:
        yield "the prompts are names of emoji, which these data need not know; give yours, data.prompt_file"
