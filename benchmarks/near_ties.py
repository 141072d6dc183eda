"""How often rounding could decide a token in replay mode: gaps between the two best perturbed scores.

    .venv/bin/python benchmarks/near_ties.py --json outputs/near_ties.json

Autoregression is decoded in float32, and the gap of every drawn slot is kept. A slot is a near tie of a
number format if rounding its two best scores to that format could close the gap: by half a unit in the last
place of each, with guidance s times |s| + |s - 1|, since both logits are rounded before they are combined.
That is the most that rounding the logits alone can do, the guided score standing for the size of both logits;
the trunk's own arithmetic in that format comes on top. So `--trunk-dtype bfloat16` also decodes in the format
itself and counts the images in which `sjd2` parts from `ar`: as they come, with passes of one shape
(`window_shape`) and by invariant arithmetic (slow on most CPUs).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from benchmarks.shipped import shipped_pixels, shipped_prompts
from sjd2_lightning.decoding import DecodingConfig, Iteration, Sampling, decode
from sjd2_lightning.metrics.bootstrap import mean_result
from sjd2_lightning.models.backbone import Backbone
from sjd2_lightning.models.registry import load_backbone

FORMATS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
LOOSE = 1e-5  # the tolerance of `NearTies`, in float32


class Gaps:
    """Observer of autoregression: gap of every drawn slot, and the size of the two scores it lies between."""

    def __init__(self) -> None:
        self.gaps: list[Tensor] = []
        self.sizes: list[Tensor] = []
        self.images: list[Tensor] = []

    def __call__(self, iteration: Iteration) -> None:
        """Keeps the head of every row, if a code was drawn there."""
        assert iteration.gumbel is not None
        scores = iteration.scores[:, 0]
        best = (scores + iteration.gumbel[:, 0]).topk(2, dim=-1)
        drawn = iteration.tokens[:, 0] < scores.shape[-1]
        drawn &= iteration.num_committed > 0
        self.gaps.append((best.values[:, 0] - best.values[:, 1])[drawn].cpu())
        self.sizes.append(scores.gather(-1, best.indices).abs().amax(-1)[drawn].cpu())
        self.images.append(iteration.rows[drawn].cpu())


def reach(sizes: Tensor, kind: torch.dtype, sampling: Sampling) -> Tensor:
    """What rounding logits to a format can move the gap by; sizes (N,) are those of the scores."""
    info = torch.finfo(kind)
    exponent = sizes.clamp_min(info.tiny).log2().floor()
    unit = torch.exp2(exponent) * info.eps
    weight = 1.0
    if sampling.guidance_scale != 1:
        weight = abs(sampling.guidance_scale) + abs(sampling.guidance_scale - 1)
    return unit * weight  # two scores, half a unit each


@torch.inference_mode()
def measure(backbone: Backbone, sampling: Sampling, options: argparse.Namespace) -> dict[str, Any]:
    """Near ties of autoregression in float32."""
    layout = backbone.layout(options.pixels, options.pixels)
    prompts = shipped_prompts(options.num_prompts)
    gaps, sizes, images = [], [], []
    for start in range(0, len(prompts), options.batch):
        part = prompts[start : start + options.batch]
        seen = Gaps()
        config = DecodingConfig("ar", window=1, sampling=sampling)
        decode(backbone, [p.prompt for p in part], [p.seed for p in part], config, layout, seen)
        gaps += seen.gaps
        sizes += seen.sizes
        images += [rows + start for rows in seen.images]
    gap, size, image = torch.cat(gaps), torch.cat(sizes), torch.cat(images)
    found: dict[str, Any] = {
        "num_slots": len(gap),
        "num_images": len(prompts),
        "median_gap": float(gap.median()),
    }
    limits = {name: reach(size, kind, sampling) for name, kind in FORMATS.items()}
    for name, limit in {**limits, f"{LOOSE:g}": torch.tensor(LOOSE)}.items():
        close = gap <= limit
        share = [float(close[image == number].float().mean()) for number in range(len(prompts))]
        result = mean_result("near ties", share, "share of drawn slots, by image")
        found[name] = {
            "near_ties": int(close.sum()),
            "share": float(close.float().mean()),
            "share_interval": result.interval,
            "images_with_one": len(image[close].unique()),
            "median_reach": float(limit.median()),
        }
    return found


@torch.inference_mode()
def differing(
    backbone: Backbone, sampling: Sampling, options: argparse.Namespace, way: dict[str, Any]
) -> dict[str, Any]:
    """Images that `sjd2` in replay mode draws otherwise than `ar`, both in the trunk's own format.

    Args:
        backbone: the model.
        sampling: the law.
        options: of the command line.
        way: fields of `DecodingConfig` that both share.
    """
    layout = backbone.layout(options.pixels, options.pixels)
    first = []
    for item in shipped_prompts(options.num_prompts):
        job = backbone, [item.prompt], [item.seed]
        ar = decode(*job, DecodingConfig("ar", window=1, sampling=sampling, **way), layout).slot_ids[0]
        config = DecodingConfig("sjd2", options.window, 2, sampling=sampling, **way)
        other = (decode(*job, config, layout).slot_ids[0] != ar).nonzero()
        first.append(int(other[0]) if len(other) else layout.num_slots)
    whole = sum(slot == layout.num_slots for slot in first)
    seen = sum(first) + len(first) - whole  # slots decided before, and at, the first difference
    return {"num_images": len(first), "equal_to_ar": whole / len(first), "share": (len(first) - whole) / seen}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--weights", default="weights/tiny")
    parser.add_argument("--num-prompts", type=int, default=16)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--pixels", type=int, default=shipped_pixels())
    parser.add_argument("--window", type=int, default=32)
    parser.add_argument("--guidance-scales", type=float, nargs="+", default=[1.0, 3.0])
    parser.add_argument("--trunk-dtype", choices=[*FORMATS, "none"], default="none")
    options = parser.parse_args()
    backbone = load_backbone("chameleon", options.weights, "trunk").eval()
    found: dict[str, Any] = {}
    for scale in options.guidance_scales:
        found[f"guidance {scale:g}"] = measure(backbone, Sampling(guidance_scale=scale), options)
    if options.trunk_dtype != "none":
        other = load_backbone("chameleon", options.weights, "trunk", FORMATS[options.trunk_dtype]).eval()
        for scale in options.guidance_scales:
            ways = {
                "": {},
                "one shape, ": {"window_shape": options.window},
                "invariant, ": {"invariant": True},
            }
            for name, way in ways.items():
                key = f"{options.trunk_dtype} trunk, {name}guidance {scale:g}"
                found[key] = differing(other, Sampling(guidance_scale=scale), options, way)
    Console().print_json(data=found)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
