"""How far the judge of scenes can be trusted: real scenes, wrong captions, and altered images.

    .venv/bin/python benchmarks/judge.py --json outputs/judge.json

Held-out scenes are judged by their own captions, by those of other scenes, and by their own with one thing
changed (another object, number, relation, size or ground). Then images are made unrecognisable (one colour,
shuffled blocks, objects that are blobs of their mean colour), blurred, made noisy, compressed, and drawn
again from a codebook of patches and by the shipped image tokenizer, which never saw scenes. Last, two ways to
name a cut-out are compared on the same cut-outs: matching with the known pictures, and nearest features of
EfficientNet-Lite0.
"""

from __future__ import annotations

import argparse
import io
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from rich.console import Console
from rich.table import Table
from scipy import ndimage
from torch.nn import functional as F

from sjd2_lightning.data.sources.scene_pixels import GROUND_COLOURS, UNITS, cut_outs, ground_pixels
from sjd2_lightning.data.sources.scenes import Scene, held_out_scenes, training_scene
from sjd2_lightning.evaluation.scene_judge import scene_judge
from sjd2_lightning.metrics.features import EffNetLite0
from sjd2_lightning.metrics.judge import Asked, Judge, Verdict, summary
from sjd2_lightning.metrics.segmentation import distance, fitted_ground
from sjd2_lightning.models.image_tokenizer import load_image_tokenizer, to_uint8

Images = NDArray[np.uint8]
CATEGORIES = ("single", "two", "counting", "position", "ground", "size", "names", "overall")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
PATCH, CODES = 8, 1024


def changed(asked: Asked, scene: Scene, other: Scene) -> Asked:
    """What was asked for with one thing changed: what the category is about."""
    first = next(iter(asked.objects))
    if asked.category == "counting":
        count = asked.objects[first]
        return replace(asked, objects={**asked.objects, first: count - 1 if count > 2 else count + 1})
    if asked.relation:
        one, relation, two = asked.relation
        return replace(asked, relation=(one, OPPOSITE[relation], two))
    if asked.sizes:
        return replace(
            asked, sizes={n: {"large": "small", "small": "large"}[s] for n, s in asked.sizes.items()}
        )
    if asked.ground:
        names = sorted(set(GROUND_COLOURS) - {scene.ground.name})
        return replace(asked, ground=names[len(scene.caption) % len(names)])
    stranger = next(item.noun for item in other.objects if item.noun not in asked.objects)
    return replace(asked, objects={**{n: c for n, c in asked.objects.items() if n != first}, stranger: 1})


def stranger_of(scenes: list[Scene], number: int) -> int:
    """The next scene of the same category that shows other objects."""
    own = {item.noun for item in scenes[number].objects}
    following = [*range(number + 1, len(scenes)), *range(number)]
    return next(
        i
        for i in following
        if scenes[i].category == scenes[number].category and not own & {x.noun for x in scenes[i].objects}
    )


def shuffled(images: Images, side: int) -> Images:
    """Blocks of `side` pixels in random order."""
    rng, across = np.random.default_rng(0), UNITS // side
    blocks = images.reshape(-1, across, side, across, side, 3).swapaxes(2, 3)
    blocks = blocks.reshape(len(images), across * across, side, side, 3)
    mixed = np.stack([each[rng.permutation(len(each))] for each in blocks])
    return mixed.reshape(-1, across, across, side, side, 3).swapaxes(2, 3).reshape(images.shape)


def blobs(images: Images, scenes: list[Scene]) -> Images:
    """Each object as an ellipse of its mean colour."""
    found = []
    for image, scene in zip(images, scenes, strict=True):
        canvas, empty = Image.fromarray(image), Image.fromarray(ground_pixels(scene.ground, UNITS))
        for item in scene.objects:
            box = (item.left, item.top, item.left + item.width, item.top + item.height)
            mean = np.asarray(cut_outs()[item.noun], np.float32)
            colour = (mean[..., :3] * mean[..., 3:]).sum((0, 1)) / mean[..., 3].sum()
            canvas.paste(empty.crop(box), box)
            ImageDraw.Draw(canvas).ellipse(box, fill=tuple(int(v) for v in colour))
        found.append(np.asarray(canvas))
    return np.stack(found)


def blurred(images: Images, sigma: float) -> Images:
    """Gaussian blur."""
    return ndimage.gaussian_filter(images.astype(np.float32), (0, sigma, sigma, 0)).round().astype(np.uint8)


def noisy(images: Images, deviation: float) -> Images:
    """White noise."""
    noise = np.random.default_rng(0).normal(0, deviation, images.shape)
    return (images + noise).clip(0, 255).round().astype(np.uint8)


def compressed(images: Images, quality: int) -> Images:
    """JPEG."""
    found = []
    for image in images:
        stream = io.BytesIO()
        Image.fromarray(image).save(stream, "JPEG", quality=quality)
        found.append(np.asarray(Image.open(stream)))
    return np.stack(found)


def by_tokenizer(images: Images, folder: str) -> Images:
    """Encoded and decoded by an image tokenizer."""
    tokenizer = load_image_tokenizer(folder)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        parts = [tokenizer.decode(tokenizer.encode(part)).clamp(0, 1) for part in pixels.split(32)]
    return to_uint8(torch.cat(parts)).numpy()


def by_codebook(images: Images, num_scenes: int) -> Images:
    """Each patch by the nearest of a codebook of training scenes' patches (k-means)."""
    training = np.stack([training_scene(0, index).image() for index in range(num_scenes)])
    patches = torch.unique(_patches(training), dim=0)
    order = torch.randperm(len(patches), generator=torch.Generator().manual_seed(0))
    patches, codes = patches[order[:60_000]], patches[order[:CODES]].clone()
    for _ in range(6):
        nearest = _nearest(patches, codes)
        counts = torch.bincount(nearest, minlength=len(codes))[:, None]
        sums = torch.zeros_like(codes).index_add_(0, nearest, patches)
        codes = torch.where(counts > 0, sums / counts.clamp(min=1), codes)
    columns = codes[_nearest(_patches(images), codes)].view(len(images), -1, codes.shape[1]).mT
    folded = F.fold(columns, (UNITS, UNITS), PATCH, stride=PATCH)
    return folded.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()


def _patches(images: Images) -> torch.Tensor:
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    return F.unfold(pixels, PATCH, stride=PATCH).mT.flatten(0, 1)


def _nearest(patches: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.cdist(part, codes).argmin(1) for part in patches.split(4096)])


def psnr(images: Images, altered: Images) -> float:
    """Mean over images, in dB; at most 99."""
    squares = ((images.astype(np.float64) - altered) ** 2).mean((1, 2, 3))
    return float((10 * np.log10(255**2 / np.maximum(squares, 1e-5))).clip(max=99).mean())


def alterations(
    images: Images, scenes: list[Scene], tokenizer: str | None, num_scenes: int
) -> Iterator[tuple[str, Images]]:
    """Names and altered images."""
    yield "one colour", np.broadcast_to(images.mean((1, 2), keepdims=True).astype(np.uint8), images.shape)
    for side in (32, 16, 8):
        yield f"blocks of {side} px shuffled", shuffled(images, side)
    yield "blobs of the objects' colours", blobs(images, scenes)
    for sigma in (0.5, 1, 1.5, 2, 3, 4):
        yield f"blur, sigma {sigma:g} px", blurred(images, sigma)
    for deviation in (5, 10, 20, 30, 40):
        yield f"noise, deviation {deviation}", noisy(images, deviation)
    for quality in (50, 20):
        yield f"JPEG, quality {quality}", compressed(images, quality)
    yield f"{CODES} codes of {PATCH} x {PATCH} patches", by_codebook(images, num_scenes)
    if tokenizer:
        yield "shipped tokenizer", by_tokenizer(images, tokenizer)


def naming(judge: Judge, scenes: list[Scene], images: Images) -> dict[str, dict[str, float]]:
    """Share of cut-outs named rightly, and cut-outs a second, by matching and by features."""
    extractor = EffNetLite0()
    canvases = {}
    for noun, picture in cut_outs().items():
        canvas = Image.new("RGBA", picture.size, "white")
        canvas.alpha_composite(picture)
        canvases[noun] = torch.from_numpy(np.array(canvas.convert("RGB")))
    known = torch.cat([extractor([canvas]) for canvas in canvases.values()])
    known = F.normalize(known - known.mean(0), dim=-1)
    centre = torch.cat([extractor([canvas]) for canvas in canvases.values()]).mean(0)
    cuts: list[tuple[str, Images, Any, tuple[int, int, int, int], torch.Tensor]] = []
    for scene, image in zip(scenes, images, strict=True):
        ground, _ = fitted_ground(image)
        on_white = np.where((distance(image, ground) > 22)[..., None], image, 255).astype(np.uint8)
        for item in scene.objects:
            box = (item.left, item.top, item.left + item.width, item.top + item.height)
            crop = torch.from_numpy(on_white[box[1] : box[3], box[0] : box[2]].copy())
            cuts.append((item.noun, image, ground, box, crop))

    def matched() -> list[str | None]:
        return [judge.match(image, ground, box).name for _, image, ground, box, _ in cuts]

    def by_features() -> list[str | None]:
        names = list(canvases)
        features = torch.cat([extractor([crop]) for *_, crop in cuts])
        return [names[i] for i in (F.normalize(features - centre, dim=-1) @ known.T).argmax(1).tolist()]

    results = {}
    ways: dict[str, Callable[[], list[str | None]]] = {"matching": matched, "features": by_features}
    for name, way in ways.items():
        start = time.perf_counter()
        found = way()
        seconds = time.perf_counter() - start
        right = np.mean([one == cut[0] for one, cut in zip(found, cuts, strict=True)])
        results[name] = {"right": float(right), "per_second": len(cuts) / seconds}
    return results


def row_of(verdicts: list[Verdict]) -> dict[str, Any]:
    """Share of right images by category, with intervals."""
    return {name: [found.value, found.interval] for name, found in summary(verdicts).items()}


def mistakes(images: Images, scenes: list[Scene], verdicts: list[Verdict], path: Path) -> None:
    """A page of images that the judge finds wrong; each was drawn from a scene that is right."""
    from matplotlib import pyplot as plt

    wrong = [number for number, verdict in enumerate(verdicts) if not verdict.right][:48]
    figure, axes = plt.subplots(6, 8, figsize=(20, 17))
    for axis in axes.flat:
        axis.axis("off")
    for axis, number in zip(axes.flat, wrong, strict=False):
        axis.imshow(images[number])
        axis.set_title("\n".join([scenes[number].caption, *verdicts[number].wrong])[:120], fontsize=6)
    figure.tight_layout()
    figure.savefig(path, dpi=70)
    plt.close(figure)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All rows."""
    scenes = held_out_scenes(options.per_category, options.seed)
    images = np.stack([scene.image() for scene in scenes])
    asked = [Asked.of(scene.facts()) for scene in scenes]
    judge = scene_judge(UNITS)
    start = time.perf_counter()
    real = judge(images, asked)
    result: dict[str, Any] = {"images_per_second": len(images) / (time.perf_counter() - start)}
    others = [stranger_of(scenes, number) for number in range(len(scenes))]
    foreign = [asked[i] for i in others]
    near = [changed(*each) for each in zip(asked, scenes, [scenes[i] for i in others], strict=True)]
    rows = {"real": row_of(real), "captions of other scenes": row_of(judge(images, foreign))}
    rows["captions with one thing changed"] = row_of(judge(images, near))
    quality = {}
    for name, altered in alterations(images, scenes, options.tokenizer, options.codebook_scenes):
        verdicts = judge(altered, asked)
        rows[name], quality[name] = row_of(verdicts), psnr(images, altered)
        if options.mistakes and name.endswith("patches"):
            mistakes(altered, scenes, verdicts, options.mistakes)
    few = slice(0, None, max(1, len(scenes) // options.named_scenes))
    result["naming"] = {
        name: naming(judge, scenes[few], altered[few])
        for name, altered in (
            ("real", images),
            ("blur 2", blurred(images, 2)),
            ("noise 20", noisy(images, 20)),
        )
    }
    return {
        **result,
        "rows": rows,
        "psnr": quality,
        "per_category": options.per_category,
        "seed": options.seed,
    }


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write all numbers here")
    parser.add_argument("--per-category", type=int, default=100, help="scenes of each category")
    parser.add_argument("--seed", type=int, default=1, help="of the scenes")
    parser.add_argument("--tokenizer", default="weights/tiny/tokenizer", help="folder; empty leaves it out")
    parser.add_argument("--codebook-scenes", type=int, default=1500, help="training scenes of the codebook")
    parser.add_argument("--named-scenes", type=int, default=175, help="scenes on which naming is compared")
    parser.add_argument("--mistakes", type=Path, help="write a page of wrong images here")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    result = measure(options)
    table = Table("images and captions", "PSNR", *CATEGORIES)
    for name, row in result["rows"].items():
        shares = [f"{row[category][0]:.3f}" for category in CATEGORIES]
        table.add_row(name, f"{result['psnr'][name]:.1f}" if name in result["psnr"] else "", *shares)
    console = Console(width=150)
    console.print(table)
    console.print(f"{result['images_per_second']:.0f} images/s on one thread")
    for name, ways in result["naming"].items():
        for way, found in ways.items():
            console.print(
                f"naming, {name}, {way}: {found['right']:.3f} right, {found['per_second']:.0f} cut-outs/s"
            )
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
