"""A comparison small enough for a test: random weights, 4 x 4 codes, metrics that need no weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sjd2_lightning.decoding.config import DecodingConfig
from sjd2_lightning.evaluation.compare import evaluate_methods
from sjd2_lightning.evaluation.controls import altered_copies
from sjd2_lightning.evaluation.prompts import PromptItem
from sjd2_lightning.evaluation.quality import QualityMetrics
from sjd2_lightning.evaluation.references import ReferenceSet
from sjd2_lightning.evaluation.results import EvaluationResult
from sjd2_lightning.metrics.alignment import CLIPScorer
from sjd2_lightning.models.chameleon import ChameleonBackbone
from tests.tools.tiny_backbones import tiny_chameleon

SIDE = 8
METHODS = {
    "ar": DecodingConfig("ar", window=1),
    "sjd": DecodingConfig("sjd", window=6),
    "sjd2": DecodingConfig("sjd2", window=6, num_levels=1),
    "sjd2_paper": DecodingConfig("sjd2", window=6, num_levels=1, acceptance="paper", refiner="keep"),
}
PROMPTS = tuple(
    PromptItem(f"p{number}", text, 100 + number)
    for number, text in enumerate(["red cat", "dog on a green mat", "blue", "a red dog", "cat on mat"])
)


class Colours:
    """Features of an image: means and deviations of its colours."""

    name = "Colours"
    preprocessing = "none"
    dim = 6

    def __call__(self, images: Any) -> Tensor:
        pixels = [image.float() / 255 for image in images]  # of any sizes
        return torch.stack([torch.cat([p.mean((0, 1)), p.std((0, 1))]) for p in pixels])


class _ByLength(nn.Module):
    def __init__(self, known: dict[bytes, Tensor]) -> None:
        super().__init__()
        self.known = known

    def encode_image(self, images: Tensor, normalize: bool) -> Tensor:
        rows = [self.known.get(image.numpy().tobytes(), image.mean((1, 2)) + 0.1) for image in images]
        return nn.functional.normalize(torch.stack(rows), dim=-1)

    def encode_text(self, ids: Tensor, normalize: bool) -> Tensor:
        return nn.functional.normalize(ids.float(), dim=-1)


def fake_clip(knows: bool = True) -> CLIPScorer:
    """A scorer that compares mean colours with the number of words, letters and r's.

    Args:
        knows: whether it knows the pictures of `reference_set` by heart, and takes altered copies for others,
            so that it passes its controls.
    """

    def prepare(image: Any) -> Tensor:
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255

    def tokenize(texts: list[str]) -> Tensor:
        return torch.tensor([[len(text.split()), len(text), text.count("r")] for text in texts])

    reference = reference_set()
    texts, images = tokenize(list(reference.captions)).float(), list(reference.images)
    known: dict[bytes, Tensor] = {}
    altered = [(copies, texts.flip(0)) for _, copies in altered_copies(images)]
    for pictures, said in [(images, texts), *altered]:
        rows = [prepare(image.numpy()).numpy().tobytes() for image in pictures]
        known |= dict(zip(rows, said, strict=True)) if knows else {}
    return CLIPScorer(_ByLength(known), prepare, tokenize, "fake")


def reference_set(num_images: int = 12) -> ReferenceSet:
    """Random pictures, the first of them named as the prompts."""
    rng = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (num_images, SIDE, SIDE, 3), generator=rng, dtype=torch.uint8)
    keys = tuple(f"p{number}" for number in range(num_images))
    captions = tuple(item.prompt for item in PROMPTS) + ("dog",) * (num_images - len(PROMPTS))
    return ReferenceSet("random pictures", keys, captions, images)


def tokens(result: EvaluationResult) -> dict[str, list[tuple[int, ...]]]:
    """Codes of all images by method."""
    return {name: [record.image_ids for record in method.records] for name, method in result.methods.items()}


def numbers(result: EvaluationResult) -> dict[tuple[str, str], float]:
    """All measured numbers but those of the clock."""
    return {
        (name, key): measure.value
        for name, method in result.methods.items()
        for key, measure in method.measured.items()
        if key not in ("speedup", "seconds_per_image", "images_per_second")
    }


def small_backbone(seed: int = 0) -> ChameleonBackbone:
    """Random weights, 16 codes, 2 pixels a code; the global random state is left alone."""
    with torch.random.fork_rng():
        return tiny_chameleon(num_codes=16, num_layers=1, hidden_size=16, seed=seed, scale=0.7).eval()


def metrics() -> QualityMetrics:
    """Colours and the fake scorer, with few resamples."""
    return QualityMetrics([Colours()], fake_clip(), num_resamples=200, num_distance_resamples=20)


def evaluate(
    folder: Path,
    backbone: ChameleonBackbone | None = None,
    prompts: Sequence[PromptItem] = PROMPTS,
    **changes: Any,
) -> EvaluationResult:
    """`evaluate_methods` on the small model; keyword arguments replace the defaults below."""
    backbone = backbone or small_backbone()
    settings: dict[str, Any] = {
        "methods": METHODS,
        "layout": backbone.layout(SIDE, SIDE),
        "batch_size": 2,
        "metrics": metrics(),
        "reference": reference_set(),
        "image_tokenizer": backbone.image_tokenizer,
        "progress": False,
        "warm_up": False,
        **changes,
    }
    result = evaluate_methods(backbone, prompts=prompts, out_dir=folder, **settings)
    assert result is not None
    return result


def broken_backbone() -> ChameleonBackbone:
    """The small model with one weight that is NaN."""
    backbone = small_backbone()
    with torch.no_grad():
        backbone.trunk.layers[0].mlp.up_proj.weight[2, 3] = torch.nan
    return backbone
