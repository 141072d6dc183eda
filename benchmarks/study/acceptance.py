"""What limits acceptance in replay mode, and how far better drafts or other windows could push it.

    python benchmarks/study/acceptance.py --weights outputs/study/plain-0/model --json outputs/acceptance.json

Tokens a pass (slots, row ends included) without noise, for each window, of

- draft_init: `decode` with first drafts that are random, the maximum of the slot's noise, or a neighbour's;
- oracle: what drafts would give that saw some true tokens; `replay_map` defines each view;
- independent: drafts that share no noise with the image, drawn anew in each pass as if everything to their
  left were known: from the very law of their slot (a slot stands with the probability of its token, on
  average the sum of p squared), or its likeliest code, the best that a draft without the noise can be;
- parts: a window cut into runs that start a row apart, less some slots of lag, for as many slots fed.

And for one window, which drafts were rejected: by entropy of their law, distance to the head, row, column,
and what was wrong around them when they were drawn. Finished parts are files under `--out` and are not
computed again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.shipped import shipped_pixels, shipped_prompts
from benchmarks.study.acceptance_statistics import Statistics, summary
from benchmarks.study.replay_map import VIEWS, ReplayMap, Shape, expected_passes
from benchmarks.study.study import as_text, held, weights_digest
from benchmarks.study.study_table import rounded, shown
from sjd2_lightning.decoding import DecodingConfig, Sampling, decode
from sjd2_lightning.evaluation.prompts import PromptItem
from sjd2_lightning.metrics.bootstrap import ratio_of_totals
from sjd2_lightning.models.backbone import Backbone
from sjd2_lightning.models.registry import load_backbone
from sjd2_lightning.run.files import sha256_of_json, write_whole

DRAFTS = ("random", "gumbel", "repeat_left", "repeat_above")
INDEPENDENT = ("law", "likeliest")
Group = tuple[ReplayMap, list[PromptItem]]
Passes = Callable[[Group], list[float]]  # of each image of a group


def by_decoding(window: int, draft_init: str, group: Group) -> list[float]:
    """Passes of `decode`, exact by replay."""
    replay, items = group
    config = DecodingConfig("sjd", window=window, draft_init=draft_init, sampling=replay.sampling)
    texts, seeds = [item.prompt for item in items], [item.seed for item in items]
    return decode(replay.backbone, texts, seeds, config, replay.layout).stats.nfe.tolist()


def by_map(shape: Shape, view: str, group: Group) -> list[float]:
    """Passes of the map of `replay_map`."""
    return [float(num) for num in group[0].passes(shape, view)]


@torch.inference_mode()
def by_independent_drafts(window: int, kind: str, group: Group) -> list[float]:
    """Expected passes with drafts of their own randomness, from true laws; see the module."""
    replay, _ = group
    laws = replay.log_laws("drafts", replay.truth)
    codes = replay.truth.clamp_max(laws.shape[-1] - 1)
    if kind == "law":
        stands = laws.gather(-1, codes[..., None]).squeeze(-1).exp()
    else:
        stands = (laws.argmax(-1) == codes).float()
    return expected_passes(stands.where(replay.is_code, torch.ones(())), window)


def pieces(options: argparse.Namespace, stride: int) -> Iterator[tuple[str, int, Passes]]:
    """Name, window and measurement of everything in the table; `stride` slots lie between two rows."""
    for window in options.windows:
        for kind in DRAFTS:
            yield f"draft_init {kind}", window, partial(by_decoding, window, kind)
        for view in VIEWS[1:]:
            yield f"oracle {view}", window, partial(by_map, Shape(window), view)
        for kind in INDEPENDENT:
            yield f"independent {kind}", window, partial(by_independent_drafts, window, kind)
        for parts in options.parts:
            for lag in options.lags:
                shape = Shape(window, parts, stride - lag)
                if 2 <= shape.run <= shape.step:  # runs may not overlap
                    yield f"parts {parts}, lag {lag}", window, partial(by_map, shape, "drafts")


@torch.inference_mode()
def statistics(groups: list[Group], window: int) -> dict[str, Any]:
    """Statistics of all rejections, and of the laws of the images."""
    watchers = []
    for replay, _ in track(groups, "statistics"):
        watchers.append(Statistics(replay))
        replay.passes(Shape(window), watch=watchers[-1])
    laws = torch.cat([one.true_laws[:, one.replay.is_code].flatten(0, 1) for one in watchers]).exp()
    facts = {
        "entropy": torch.special.entr(laws).sum(-1),
        "sum_of_squares": laws.square().sum(-1),
        "largest": laws.amax(-1),
    }
    found = {name: round(float(values.mean()), 4) for name, values in facts.items()}
    return {"window": window, **summary(watchers), "laws": found}


def measure(backbone: Backbone, options: argparse.Namespace) -> dict[str, Any]:
    """Everything that `--json` gets."""
    layout = backbone.layout(options.pixels, options.pixels)
    sampling = Sampling(options.temperature, guidance_scale=options.guidance_scale)
    items = shipped_prompts(options.num_prompts)
    batches = [items[start : start + options.batch] for start in range(0, len(items), options.batch)]
    groups = [(ReplayMap(backbone, batch, layout, sampling), batch) for batch in track(batches, "images")]
    codes = layout.code_slots
    stride = int(codes[layout.width] - codes[0])
    keys = [[item.key, item.seed] for item in items]
    wanted = sha256_of_json([weights_digest(options.weights / options.trunk), keys, options.pixels])
    out = options.out / wanted[:12] / f"t{options.temperature:g}-g{options.guidance_scale:g}"

    def kept(name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        path = out / f"{name.replace(', ', '-').replace(' ', '-')}.json"
        found = held(path, wanted)
        if found is None:
            found = {"identity": wanted, **make()}
            write_whole(path, json.dumps(found))
        return {key: value for key, value in found.items() if key != "identity"}

    def passes(one: Passes) -> dict[str, Any]:
        return {"nfe": [num for group in groups for num in one(group)]}

    window = options.statistics_window
    seen = kept(f"statistics-w{window}", partial(statistics, groups, window))
    nfe: dict[str, dict[int, list[float]]] = {}
    for name, size, one in track(list(pieces(options, stride)), "tokens a pass"):
        nfe.setdefault(name, {})[size] = kept(f"{name}-w{size}", partial(passes, one))["nfe"]
    table = {
        name: {
            str(size): row(layout.num_slots, found, nfe["draft_init random"][size])
            for size, found in by.items()
        }
        for name, by in nfe.items()
    }
    facts = {
        name: getattr(options, name) for name in ("num_prompts", "temperature", "guidance_scale", "pixels")
    }
    return {**facts, "statistics": seen, "tokens_a_pass": table}


def row(num_slots: int, nfe: list[float], random: list[float]) -> dict[str, Any]:
    """Tokens a pass, and over those of random first drafts in the same window."""
    tokens = ratio_of_totals("tokens a pass", [num_slots] * len(nfe), nfe, "slots / passes")
    return {
        "tokens_a_pass": rounded(tokens),
        "over_random": rounded(ratio_of_totals("ratio", random, nfe, "paired")),
    }


def main() -> None:
    """Command line."""
    options = command_line().parse_args()
    found = measure(load_backbone("chameleon", options.weights, options.trunk).eval(), options)
    print_tables(found)
    if options.json is not None:
        write_whole(options.json, as_text(found))


def print_tables(found: dict[str, Any]) -> None:
    """Prints the tables."""
    console, seen = Console(), found["statistics"]
    windows = list(next(iter(found["tokens_a_pass"].values())))
    table = Table("tokens a pass", *(f"window {window}" for window in windows))
    for name, rows in found["tokens_a_pass"].items():
        table.add_row(name, *(shown(rows[w]["tokens_a_pass"]) if w in rows else "" for w in windows))
    console.print(table)
    title = f"window {seen['window']}: {seen['passes_of_one']:.0%} of passes commit one token"
    table = Table("wrong when drawn", "compared", "rejected", "share of rejected", title=title)
    for name, one in seen["by_cause"].items():
        table.add_row(name, str(one["compared"]), f"{one['rejected']:.3f}", f"{one['share_of_rejected']:.3f}")
    console.print(table)
    for kind in ("entropy", "distance", "column", "row"):
        rates = (f"{title}: {one['rejected']:.2f}" for title, one in seen[f"by_{kind}"].items())
        console.print(f"rejected by {kind}:", ", ".join(rates), highlight=False)
    console.print("same token from the true law:", seen["coupling"], "laws of the images:", seen["laws"])


def command_line() -> argparse.ArgumentParser:
    """The command line's options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument(
        "--out", type=Path, default=Path("outputs/acceptance"), help="where what is done is kept"
    )
    parser.add_argument("--weights", type=Path, default=Path("weights/tiny"))
    parser.add_argument("--trunk", default="trunk")
    parser.add_argument("--num-prompts", type=int, default=16)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--pixels", type=int, default=shipped_pixels())
    parser.add_argument("--windows", type=int, nargs="+", default=[16, 32, 64, 128])
    parser.add_argument("--statistics-window", type=int, default=32)
    parser.add_argument("--parts", type=int, nargs="*", default=[2, 4, 8])
    parser.add_argument("--lags", type=int, nargs="*", default=[0, 4])
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--guidance-scale", type=float, default=3.0)
    return parser


if __name__ == "__main__":
    main()
