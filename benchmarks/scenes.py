"""What a model of scenes draws, by the judge: of its image tokenizer alone, and of held-out captions.

    .venv/bin/python benchmarks/scenes.py --json outputs/scenes.json --page outputs/scenes.png

The captions are of combinations that training never showed, equally many of each category, or of those that
it shows (`--combinations trained`): the difference is what the model does not compose. Reconstructions bound
what the model can reach. Tokens a pass are those of `sjd2` in replay mode, which draws what `ar` draws.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from benchmarks.judge import psnr
from sjd2_lightning.data.sources.scene_pixels import UNITS
from sjd2_lightning.data.sources.scenes import CATEGORY_SHARES, Scene, Variety, held_out_scene, training_scene
from sjd2_lightning.decoding import DecodingConfig, Sampling, decode
from sjd2_lightning.evaluation.prompts import seed_of
from sjd2_lightning.evaluation.scene_judge import scene_judge
from sjd2_lightning.metrics.judge import Asked, summary
from sjd2_lightning.models.backbone import Backbone
from sjd2_lightning.models.image_tokenizer import to_uint8
from sjd2_lightning.models.registry import load_backbone

CATEGORIES = tuple(name for name in CATEGORY_SHARES if name != "three")
_BATCH = 20
_UNSEEN = 1_000_000  # a scene of the training split from which on no set of shards is so large
_ACROSS, _LINE = 8, 24


def held_out(per_category: int, seed: int, variety: Variety) -> list[Scene]:
    """Scenes in turn by category, so that any first part has all of them."""
    return [
        held_out_scene(name, seed, index, variety) for index in range(per_category) for name in CATEGORIES
    ]


def trained(per_category: int, seed: int, variety: Variety) -> list[Scene]:
    """Scenes whose combinations training shows, but which no training had; in turn by category."""
    found: dict[str, list[Scene]] = {name: [] for name in CATEGORIES}
    for index in count(_UNSEEN):
        scene = training_scene(seed, index, variety)
        if len(scenes := found.get(scene.category, [])) < per_category:
            scenes.append(scene)
        if all(len(scenes) == per_category for scenes in found.values()):
            return [scene for scenes in zip(*found.values(), strict=True) for scene in scenes]
    raise AssertionError("categories come up for ever")


@torch.inference_mode()
def drawn(
    backbone: Backbone, scenes: Sequence[Scene], method: DecodingConfig, batch: int
) -> tuple[torch.Tensor, list[float]]:
    """Codes (N, H, W) of the captions' pictures, and the tokens a pass of each."""
    layout, codes, compression = backbone.layout(UNITS, UNITS), [], []
    for start in range(0, len(scenes), batch):
        part = scenes[start : start + batch]
        seeds = [seed_of(scene.key) for scene in part]
        output = decode(backbone, [scene.caption for scene in part], seeds, method, layout)
        codes.append(output.image_ids)
        compression += output.stats.step_compression.tolist()
    return torch.cat(codes), compression


@torch.inference_mode()
def decoded(backbone: Any, codes: torch.Tensor) -> np.ndarray:
    """Pictures (N, side, side, 3) uint8 of codes."""
    parts = [backbone.image_tokenizer.decode(part) for part in codes.split(_BATCH)]
    return to_uint8(torch.cat(parts)).numpy()


def reconstructed(backbone: Any, images: np.ndarray) -> np.ndarray:
    """Pictures through the image tokenizer."""
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return decoded(
        backbone, torch.cat([backbone.image_tokenizer.encode(part) for part in pixels.split(_BATCH)])
    )


def page(images: np.ndarray, scenes: Sequence[Scene], path: Path) -> None:
    """The first 48 pictures with their captions, unpicked."""
    shown = min(48, len(images))
    height = UNITS + _LINE
    canvas = Image.new("RGB", (_ACROSS * UNITS, -(-shown // _ACROSS) * height), "white")
    draw = ImageDraw.Draw(canvas)
    for place in range(shown):
        left, top = place % _ACROSS * UNITS, place // _ACROSS * height
        canvas.paste(Image.fromarray(images[place]), (left, top))
        words, lines = scenes[place].caption.split(), [""]
        for word in words:
            if len(lines[-1]) + len(word) > 24:
                lines.append("")
            lines[-1] = f"{lines[-1]} {word}".strip()
        draw.text((left + 2, top + UNITS + 1), "\n".join(lines[:2]), fill="black", font_size=9, spacing=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.quantize(128).save(path, optimize=True)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Shares of pictures judged right, by category, and tokens a pass."""
    backbone = load_backbone("chameleon", options.weights).eval()
    chosen = {"held_out": held_out, "trained": trained}[options.combinations]
    scenes = chosen(options.per_category, options.seed, Variety(options.num_nouns, True))
    images, asked = (
        np.stack([scene.image() for scene in scenes]),
        [Asked.of(scene.facts()) for scene in scenes],
    )
    judge = scene_judge(UNITS)

    def row(pictures: np.ndarray) -> dict[str, Any]:
        return {name: [x.value, x.interval] for name, x in summary(judge(pictures, asked)).items()}

    again = reconstructed(backbone, images)
    found: dict[str, Any] = {"reconstructed": row(again), "psnr": psnr(images, again)}
    sampling = Sampling(temperature=options.temperature, top_k=options.top_k, guidance_scale=options.guidance)
    codes, _ = drawn(backbone, scenes, DecodingConfig("ar", window=1, sampling=sampling), _BATCH)
    pictures = decoded(backbone, codes)
    found["drawn"] = row(pictures)
    if options.page:
        page(pictures, scenes, options.page)
    few = scenes[: options.replayed]
    if few:
        sjd2 = DecodingConfig("sjd2", window=32, num_levels=options.num_levels, sampling=sampling)
        same, compression = drawn(backbone, few, sjd2, 1)
        found["tokens_a_pass"] = float(np.mean(compression))
        found["equal_to_ar"] = float((same == codes[: len(few)]).flatten(1).all(1).float().mean())
    asked = {name: str(value) for name, value in vars(options).items() if name not in ("json", "page")}
    return {**found, "options": asked}


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write all numbers here")
    parser.add_argument("--page", type=Path, help="write the first 48 pictures here")
    parser.add_argument("--weights", default="weights/tiny_plain", help="folder of the model")
    parser.add_argument("--per-category", type=int, default=20, help="captions of each category")
    parser.add_argument("--seed", type=int, default=1, help="seed of the scenes")
    parser.add_argument(
        "--combinations",
        choices=("held_out", "trained"),
        default="held_out",
        help="such as training never shows, or new scenes of those that it does",
    )
    parser.add_argument("--num-nouns", type=int, default=32, help="nouns of the captions, as in training")
    parser.add_argument("--temperature", type=float, default=0.7, help="temperature of sampling")
    parser.add_argument("--top-k", type=int, default=0, help="codes to draw from; 0 is all")
    parser.add_argument("--guidance", type=float, default=2.0, help="scale of classifier-free guidance")
    parser.add_argument("--replayed", type=int, default=12, help="captions of sjd2; 0: none")
    parser.add_argument("--num-levels", type=int, default=0, help="noise levels of sjd2")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found = measure(options)
    for name in ("reconstructed", "drawn"):
        print(name, *(f"{category} {value:.3f}" for category, (value, _) in found[name].items()))
    print(*(f"{name} {value:.3f}" for name, value in found.items() if isinstance(value, float)))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
