"""What the parts of a draft corrector are worth: tokens a pass without each, by size and rounds.

    .venv/bin/python -m benchmarks.correction data/scenes_small/codes/train --json outputs/correction.json

The model draws images once, without a corrector, so that all variants learn from the same slots of passes.
Each then decodes the same held-out captions under each scale of guidance; all of them must draw the same
images. Passes of two variants are compared image by image.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice, product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sjd2_lightning.data.reading import read_all
from sjd2_lightning.data.sources.scenes import Variety, held_out_scenes
from sjd2_lightning.decoding import DecodingConfig, Sampling, decode
from sjd2_lightning.decoding.config import Correction
from sjd2_lightning.evaluation.prompts import seed_of
from sjd2_lightning.metrics.bootstrap import paired_difference, ratio_of_totals
from sjd2_lightning.models.backbone import Backbone
from sjd2_lightning.models.draft_corrector import DraftCorrector
from sjd2_lightning.models.registry import load_backbone
from sjd2_lightning.run.stages import counted, speak
from sjd2_lightning.training.recipes.corrections import CorrectorRecipe, Learner, Traces, traces_of

PIXELS, BATCH = 128, 8


def unread(part: str) -> Callable[[DraftCorrector], None]:
    """Takes a part of what the network reads away, for good."""

    def change(network: DraftCorrector) -> None:
        weight = network.get_submodule(part).weight
        nn.init.zeros_(weight)
        weight.requires_grad_(False)

    return change


@dataclass(frozen=True)
class Variant:
    """A corrector that is trained, or used, in another way.

    Attributes:
        name: for the table.
        width: number of units.
        seed: of training.
        change: what is done to the network before it is trained.
        rounds: numbers of rounds that decode.
    """

    name: str
    width: int = CorrectorRecipe.width
    seed: int = 0
    change: Callable[[DraftCorrector], None] | None = None
    rounds: tuple[int, ...] = (Correction.rounds,)


VARIANTS = (
    Variant("left and above", rounds=(8, 1, 2, 4, 16, 31)),
    Variant("another seed", seed=1),
    Variant("left alone", change=unread("above")),
    Variant("above alone", change=unread("left")),
    Variant("16 units", width=16),
    Variant("32 units", width=32),
    Variant("128 units", width=128),
    Variant("256 units", width=256),
)


def collected(
    backbone: Backbone, captions: list[str], methods: Sequence[DecodingConfig], most: int
) -> Traces:
    """Open slots of decodings of captions, a batch by each method in turn."""
    parts, layout = [], backbone.layout(PIXELS, PIXELS)
    with counted("drawing", len(captions), "images") as advance:
        for method, start in zip(cycle(methods), range(0, len(captions), BATCH), strict=False):
            part = captions[start : start + BATCH]
            seeds = [seed_of(f"{number} {caption}") for number, caption in enumerate(part, start)]
            parts.append(traces_of(backbone, part, seeds, method, layout, most))
            advance(len(part))
    return Traces(*map(torch.cat, zip(*parts, strict=True)))


@torch.inference_mode()
def passes_of(backbone: Backbone, captions: list[str], config: DecodingConfig) -> tuple[Tensor, Tensor]:
    """Passes (N,) and slot ids (N, S) of held-out captions."""
    layout, nfe, ids = backbone.layout(PIXELS, PIXELS), [], []
    for start in range(0, len(captions), BATCH):
        part = captions[start : start + BATCH]
        output = decode(backbone, part, [seed_of(caption) for caption in part], config, layout)
        nfe.append(output.stats.nfe)
        ids.append(output.slot_ids)
    return torch.cat(nfe), torch.cat(ids)


def row(name: str, nfe: Tensor, num_slots: int, best: Tensor | None, **more: Any) -> dict[str, Any]:
    """A line of the result: tokens a pass, and what it gains over `best` image by image."""
    slots = np.full(len(nfe), num_slots)
    found = ratio_of_totals("tokens a pass", slots, nfe.numpy(), "")
    line = {"variant": name, **more, "tokens_a_pass": found.value, "interval": found.interval}
    if best is not None:
        own, other = num_slots / nfe.numpy(), num_slots / best.numpy()
        gap = paired_difference("gap", own, other, "")
        line |= {"gap": gap.value, "gap_interval": gap.interval}
    return line


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shards", type=Path)
    parser.add_argument("--weights", type=Path, default=Path("weights/tiny"))
    parser.add_argument("--temperature", type=float, default=0.9)
    parser.add_argument("--guidance-scale", type=float, nargs="+", default=[1.5, 3.0])
    parser.add_argument("--num-images", type=int, default=640)
    parser.add_argument("--num-prompts", type=int, default=64)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--only", nargs="+", default=[variant.name for variant in VARIANTS])
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args(arguments)
    speak()
    backbone = load_backbone("chameleon", asked.weights).eval()
    backbone.requires_grad_(False)
    scales = asked.guidance_scale
    methods = {
        scale: DecodingConfig("sjd2", 32, 1, sampling=Sampling(asked.temperature, guidance_scale=scale))
        for scale in scales
    }
    captions = [sample.caption for sample in islice(read_all(asked.shards), asked.num_images)]
    slots = collected(backbone, captions, list(methods.values()), CorrectorRecipe().per_image)
    variety = Variety(num_nouns=32, aligned=True)
    scenes = held_out_scenes(-(-asked.num_prompts // 6), 0, variety)
    prompts = [scene.caption for scene in scenes][: asked.num_prompts]
    num_slots = backbone.layout(PIXELS, PIXELS).num_slots
    rows, images, best = [], {}, dict[float, Tensor]()
    for scale, method in methods.items():
        nfe, images[scale] = passes_of(backbone, prompts, method)
        rows.append(row("no corrector", nfe, num_slots, None, guidance=scale))
    with TemporaryDirectory() as folder:
        for variant in VARIANTS:
            if variant.name not in asked.only:
                continue
            torch.manual_seed(variant.seed)
            network = DraftCorrector(backbone.hidden_size, variant.width)
            if variant.change is not None:
                variant.change(network)
            learner = Learner(backbone, asked.temperature, network)
            recipe = CorrectorRecipe(variant.width, asked.steps, seed=variant.seed)
            with counted(variant.name, asked.steps, "steps") as advance:
                learner.fit(slots, recipe, advance)
            path = Path(folder) / f"{len(rows)}.safetensors"
            network.save(path)
            numbers = sum(p.numel() for p in network.parameters())
            for rounds, (scale, method) in product(variant.rounds, methods.items()):
                correction = Correction(str(path), rounds)
                nfe, same = passes_of(backbone, prompts, replace(method, corrector=correction))
                assert torch.equal(same, images[scale]), "a corrector changed an image"
                best.setdefault(scale, nfe)
                more = {"guidance": scale, "rounds": rounds, "numbers": numbers}
                rows.append(row(variant.name, nfe, num_slots, best[scale], **more))
                print(json.dumps(rows[-1]), flush=True)
    if asked.json is not None:
        asked.json.parent.mkdir(parents=True, exist_ok=True)
        asked.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
