"""What rules that are not exact buy and cost: tokens a pass, pictures judged right, and nats a code.

    python benchmarks/study/lossy.py --weights outputs/study/recipe-0/model --json outputs/lossy.json

Captions are of combinations that training never showed, equally many of each category; every setting draws
all of them with the same seeds. The judge of scenes says which pictures are right. Nats are those of plain
decoding's law: an exact rule's pictures have as many as plain decoding's, on average. Differences from `ar`
are paired by caption. Exact rules stand beside the others as controls.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.likelihood import nats_per_code
from benchmarks.scenes import decoded, drawn, held_out
from sjd2_lightning.data.sources.scene_pixels import UNITS
from sjd2_lightning.data.sources.scenes import Scene, Variety
from sjd2_lightning.decoding import DecodingConfig, Sampling
from sjd2_lightning.evaluation.scene_judge import scene_judge
from sjd2_lightning.metrics.bootstrap import mean_result, paired_difference
from sjd2_lightning.metrics.judge import Asked, Verdict, difference, summary
from sjd2_lightning.models.backbone import Backbone
from sjd2_lightning.models.registry import load_backbone
from sjd2_lightning.run.files import write_whole

_BATCH = 34


def settings(sampling: Sampling) -> dict[str, DecodingConfig]:
    """The settings by name, `ar` first; `paper_96_25` is the setting that the paper gives for Lumina-mGPT."""
    paper = {"sampling": sampling, "acceptance": "paper", "refiner": "keep"}
    return {
        "ar": DecodingConfig("ar", window=1, sampling=sampling),
        "replay_32_1": DecodingConfig("sjd2", 32, 1, sampling=sampling),
        "exact_32_1": DecodingConfig("sjd2", 32, 1, sampling=sampling, acceptance="exact", refiner="couple"),
        "paper_32_1": DecodingConfig("sjd2", 32, 1, **paper),
        "paper_32_8": DecodingConfig("sjd2", 32, 8, **paper),
        "paper_96_25": DecodingConfig("sjd2", 96, 25, **paper),
        "pure_32_8": DecodingConfig("sjd2_pure", 32, 8, sampling=sampling, acceptance="pure"),
    }


@torch.inference_mode()
def nats(backbone: Backbone, scenes: Sequence[Scene], codes: torch.Tensor, sampling: Sampling) -> list[float]:
    """Nats a code of the pictures (N, H, W) of captions under plain decoding's law."""
    layout, found = backbone.layout(UNITS, UNITS), []
    for start in range(0, len(scenes), _BATCH):
        captions = [scene.caption for scene in scenes[start : start + _BATCH]]
        part = codes[start : start + _BATCH]
        found += nats_per_code(backbone, captions, part, layout, sampling).tolist()
    return found


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The figures of each setting, by its name."""
    backbone = load_backbone("chameleon", options.weights).eval()
    scenes = held_out(options.per_category, options.seed, Variety(32, True))
    asked = [Asked.of(scene.facts()) for scene in scenes]
    judge = scene_judge(UNITS)
    sampling = Sampling(options.temperature, guidance_scale=options.guidance)
    plain: tuple[list[Verdict], list[float], torch.Tensor] | None = None
    found: dict[str, Any] = {}
    chosen = {
        name: one
        for name, one in settings(sampling).items()
        if name in ("ar", *(options.only or settings(sampling)))
    }
    for name, config in track(chosen.items(), "settings"):
        codes, compression = drawn(backbone, scenes, config, _BATCH)
        verdicts, own = judge(decoded(backbone, codes), asked), nats(backbone, scenes, codes, sampling)
        if plain is None:
            plain = verdicts, own, codes
        rows = {
            "tokens_a_pass": mean_result("tokens_a_pass", compression, "mean over images"),
            "right": summary(verdicts)["overall"],
            "right_minus_ar": difference(verdicts, plain[0])["overall"],
            "nats": mean_result("nats", own, "nats a code under the law of ar"),
            "nats_minus_ar": paired_difference("nats_minus_ar", own, plain[1], "paired by caption"),
        }
        found[name] = {key: [value.value, value.interval] for key, value in rows.items()}
        found[name]["categories"] = {key: value.value for key, value in summary(verdicts).items()}
        found[name]["equal_to_ar"] = float((codes == plain[2]).flatten(1).all(1).float().mean())
    asked_for = {name: str(value) for name, value in vars(options).items() if name != "json"}
    return {"settings": found, "num_captions": len(scenes), "options": asked_for}


def shown(value: tuple[float, tuple[float, float] | None]) -> str:
    """A number, and its interval on the next line."""
    number, interval = value
    return f"{number:.2f}" + ("" if interval is None else "\n[{:.2f}, {:.2f}]".format(*interval))


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write all numbers here")
    parser.add_argument("--weights", default="weights/tiny", help="folder of the model")
    parser.add_argument("--per-category", type=int, default=34, help="captions of each category")
    parser.add_argument("--seed", type=int, default=1, help="seed of the scenes")
    parser.add_argument(
        "--only", nargs="+", choices=list(settings(Sampling())), help="settings beside ar; all by default"
    )
    parser.add_argument("--temperature", type=float, default=0.9, help="temperature of sampling")
    parser.add_argument("--guidance", type=float, default=1.5, help="scale of classifier-free guidance")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found = measure(options)
    columns = ("tokens_a_pass", "right", "right_minus_ar", "nats_minus_ar")
    table = Table("setting", *columns, "equal to ar")
    table.columns[0].no_wrap = True
    for name, row in found["settings"].items():
        table.add_row(name, *(shown(row[column]) for column in columns), f"{row['equal_to_ar']:.0%}")
    Console().print(table)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        write_whole(options.json, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
