"""Every decoding method against plain autoregression: passes, wall clock, and where the wall clock goes.

    .venv/bin/python benchmarks/decoding.py --json outputs/decoding.json

One interleaved run: each group of prompts is decoded by every setting in turn, so that drift of the machine
hits all alike. All share the backbone wrapper, the cache and the batched guidance of the baseline. Methods
and their values are those of conf/decoding; `--overrides decoding.window=auto` chooses windows. The
share of the wall clock inside the backbone (trunk and head) and, on the CPU, the peak of the bytes that
decoding makes come from decodings of their own, since watching would slow the timed ones.

`nll` is what the images cost under autoregression's law, in nats a code: the price of a rule that is not
lossless. Distances of images and CLIP scores come from evaluate.py.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.likelihood import nats_per_code
from benchmarks.memory import LiveBytes
from benchmarks.shipped import shipped_pixels, shipped_prompts
from benchmarks.timing import time_inside
from sjd2_lightning.config.groups import AutoWindowConfig
from sjd2_lightning.config.reading import conf_dir, evaluate_config
from sjd2_lightning.decoding import DecodingConfig, decode
from sjd2_lightning.decoding.config import BASELINE
from sjd2_lightning.decoding.loop import decoder_of
from sjd2_lightning.evaluation.auto_window import resolve_windows
from sjd2_lightning.evaluation.prompts import PromptItem
from sjd2_lightning.metrics.bootstrap import mean_result, paired_difference, ratio_of_totals
from sjd2_lightning.metrics.efficiency import peak_memory, timed
from sjd2_lightning.models.backbone import Backbone
from sjd2_lightning.models.registry import load_backbone


@dataclass
class Cell:
    """Measurements of one method at one batch size, an entry a group of prompts."""

    config: DecodingConfig
    seconds: list[float] = field(default_factory=list)
    nfe: list[int] = field(default_factory=list)
    accepted: Counter[int] = field(default_factory=Counter)
    equal_to_ar: list[bool] = field(default_factory=list)
    nll: list[float] = field(default_factory=list)
    num_slots: int = 0
    inside: float = 0.0
    observed: float = 0.0
    peak_bytes: int | None = None


def conf_methods(
    names: list[str], overrides: list[str]
) -> tuple[dict[str, DecodingConfig], AutoWindowConfig]:
    """Methods of conf/method by name, and how a window of `auto` is chosen."""
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config = evaluate_config(compose("evaluate", overrides))
    return {name: config.methods[name] for name in dict.fromkeys([BASELINE, *names])}, config.auto_window


def measure_group(
    backbone: Backbone, cells: dict[str, Cell], group: list[PromptItem], pixels: int, with_share: bool
) -> None:
    """Decodes one group of prompts by every method."""
    layout, device = backbone.layout(pixels, pixels), backbone.device
    texts, seeds = [item.prompt for item in group], [item.seed for item in group]
    baseline = None
    for cell in cells.values():

        def job(model: Any = backbone, cell: Cell = cell) -> Any:
            return decode(model, texts, seeds, cell.config, layout)

        with peak_memory(device) as peak:
            output, seconds = timed(job, device)
        baseline = output if baseline is None else baseline
        cell.seconds.append(seconds)
        cell.nfe += output.stats.nfe.tolist()
        cell.num_slots = layout.num_slots
        cell.peak_bytes = peak.num_bytes or cell.peak_bytes
        if cell.config.sampling.temperature > 0:
            cell.nll += nats_per_code(
                backbone, texts, output.image_ids, layout, cell.config.sampling
            ).tolist()
        for passes in output.stats.accepted:
            cell.accepted.update(passes)
        cell.equal_to_ar += (output.slot_ids == baseline.slot_ids).all(1).tolist()
        if with_share:
            with ExitStack() as watching:  # the trunk of every engine: one of them runs
                trunks = decoder_of(backbone).trunks.values()
                parts = [time_inside(trunk, "run", "prefill", "head", device=device) for trunk in trunks]
                inside = [watching.enter_context(part) for part in parts]
                _, observed = timed(job, device)
            cell.inside += sum(part.seconds for part in inside)
            cell.observed += observed
            if cell.peak_bytes is None:
                with LiveBytes() as live:
                    job()
                cell.peak_bytes = live.peak


def summary(cell: Cell, baseline: Cell) -> dict[str, Any]:
    """What one method came to."""
    steps = ratio_of_totals(
        "step_compression", [cell.num_slots] * len(cell.nfe), cell.nfe, "slots / forward passes"
    )
    speed = ratio_of_totals("speedup", baseline.seconds, cell.seconds, "wall clock, paired by prompt")
    likelihood = {}
    if cell.nll:
        nll = mean_result("nll", cell.nll, "nats a code under the law of ar")
        change = paired_difference("nll_minus_ar", cell.nll, baseline.nll, "paired by prompt and seed")
        likelihood = {
            "nll": nll.value,
            "nll_interval": nll.interval,
            "nll_minus_ar": change.value,
            "nll_minus_ar_interval": change.interval,
        }
    return {
        "lossless": cell.config.lossless,
        "acceptance": cell.config.acceptance,
        "window": cell.config.window,
        "num_levels": cell.config.num_levels,
        "nfe": mean_result("nfe", cell.nfe, "forward passes an image", num_resamples=0).value,
        "step_compression": steps.value,
        "step_compression_interval": steps.interval,
        "speedup": speed.value,
        "speedup_interval": speed.interval,
        "backbone_share": cell.inside / cell.observed if cell.observed else None,
        "equal_to_ar": sum(cell.equal_to_ar) / len(cell.equal_to_ar),
        "images_per_second": len(cell.nfe) / sum(cell.seconds),
        "seconds_per_image": sum(cell.seconds) / len(cell.nfe),
        "acceptance_lengths": {str(length): cell.accepted[length] for length in sorted(cell.accepted)},
        "peak_bytes": cell.peak_bytes,
        **likelihood,
    }


def measure_batch(
    backbone: Backbone,
    methods: dict[str, DecodingConfig],
    auto: AutoWindowConfig,
    batch: int,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """All methods at one batch size."""
    prompts = shipped_prompts(max(options.num_prompts, batch))
    groups = [prompts[start : start + batch] for start in range(0, len(prompts) - batch + 1, batch)]
    layout = backbone.layout(options.pixels, options.pixels)
    methods, choices = resolve_windows(
        backbone, methods, groups[0], layout, windows=auto.windows, repeats=auto.repeats
    )
    cells = {name: Cell(config) for name, config in methods.items()}
    compiled = cells[BASELINE].config.engine == "compiled"
    warm = {name: Cell(config) for name, config in methods.items()}
    # a compiler is given every shape before anything is timed
    measure_group(backbone, warm, groups[0], options.pixels if compiled else 32, False)
    for number, group in enumerate(track(groups, f"batch {batch}")):
        # a compiled trunk cannot be watched from inside: the watch would be compiled with it
        watched = number < options.share_groups and not compiled
        measure_group(backbone, cells, group, options.pixels, watched)
    found = {name: summary(cell, cells[BASELINE]) for name, cell in cells.items()}
    for name, choice in choices.items():
        found[name]["auto_window"] = choice.summary()
    return found


def batch_gain(runs: dict[str, dict[str, dict[str, Any]]]) -> dict[str, dict[str, float]]:
    """Images a second of each larger batch over those of batch 1, by run and method."""
    found = {}
    for title, run in runs.items():
        alone = runs.get(f"{title.partition(',')[0]}, batch 1", {})
        if run is not alone and alone:
            rate = "images_per_second"
            found[f"{title} over 1"] = {name: run[name][rate] / alone[name][rate] for name in run}
    return found


@torch.inference_mode()
def against_generate(
    backbone: Any, baseline: DecodingConfig, options: argparse.Namespace
) -> dict[str, float]:
    """Our autoregression against transformers' `generate` with its static cache, eager, interleaved.

    `generate` samples two rows without guidance, the prompt and the empty prompt: the forward passes of one
    guided image, and less work beside them. Its tokens are text, since the model's own head forbids codes.
    """
    layout, device = backbone.layout(options.pixels, options.pixels), backbone.device
    ours, theirs = [], []
    for item in shipped_prompts(options.generate_prompts):
        ids = backbone.prompt_ids(item.prompt, layout)
        fed = torch.tensor([ids, ids], device=device)

        def generate(fed: torch.Tensor = fed) -> Any:
            return backbone.model.generate(
                fed,
                attention_mask=torch.ones_like(fed),
                do_sample=True,
                top_k=0,
                max_new_tokens=layout.num_slots,
                min_new_tokens=layout.num_slots,
                cache_implementation="static",
                disable_compile=True,
                pad_token_id=0,
            )

        def own(item: PromptItem = item) -> Any:
            return decode(backbone, [item.prompt], [item.seed], baseline, layout)

        if not ours:
            timed(generate, device)  # warms up
        ours.append(timed(own, device)[1])
        theirs.append(timed(generate, device)[1])
    result = ratio_of_totals("speedup", theirs, ours, "wall clock, generate / ours, two rows")
    return {"speedup": result.value, "ours_seconds": sum(ours), "generate_seconds": sum(theirs)}


def rows(found: dict[str, dict[str, Any]]) -> Iterator[list[str]]:
    """Cells of the table."""
    for name, row in found.items():
        share = row["backbone_share"]
        numbers = [f"{row[key]:.2f}" for key in ("nfe", "step_compression", "speedup", "equal_to_ar")]
        nll = f"{row['nll_minus_ar']:+.3f}" if "nll" in row else ""
        yield [name, *numbers, "" if share is None else f"{share:.2f}", nll, str(row["lossless"])]


def command_line() -> argparse.ArgumentParser:
    """What may be asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--weights", default="weights/tiny")
    parser.add_argument("--trunk", default="trunk")
    parser.add_argument("--num-prompts", type=int, default=16, help="images for each method and batch size")
    parser.add_argument("--share-groups", type=int, default=2, help="groups decoded again for backbone_share")
    parser.add_argument("--generate-prompts", type=int, default=3, help="0 leaves the comparison out")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--modes", nargs="+", default=["eager", "compiled"], choices=["eager", "compiled"])
    parser.add_argument("--pixels", type=int, default=shipped_pixels())
    parser.add_argument(
        "--methods",
        nargs="+",
        default=[
            "jacobi",
            "sjd",
            "mc_sjd",
            "gumbel",
            "sjd_pp",
            "sjd_pac",
            "gsd",
            "sjd2",
            "sjd2_exact",
            "sjd2_paper",
            "sjd2_pure",
        ],
    )
    parser.add_argument("--overrides", nargs="*", default=[], help="of the configuration, decoding.window=16")
    parser.add_argument("--device", default="cpu")
    return parser


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All that is written to `--json`; tables are printed on the way."""
    methods, auto = conf_methods(options.methods, options.overrides)
    backbone = load_backbone("chameleon", options.weights, options.trunk).eval().to(options.device)
    runs: dict[str, Any] = {}
    for mode in options.modes:
        chosen = {name: replace(config, engine=mode) for name, config in methods.items()}
        for batch in options.batches:
            found = measure_batch(backbone, chosen, auto, batch, options)
            runs[f"{mode}, batch {batch}"] = found
            columns = ("method", "nfe", "compression", "speedup", "equal to ar", "in backbone", "nll - ar")
            table = Table(*columns, "lossless", title=f"{mode}, batch {batch}")
            for row in rows(found):
                table.add_row(*row)
            Console().print(table)
    facts: dict[str, Any] = {"num_prompts": options.num_prompts, "threads": torch.get_num_threads()}
    facts["batch_gain"] = batch_gain(runs)
    for title, gains in facts["batch_gain"].items():
        parts = ", ".join(f"{name} {gain:.2f}" for name, gain in gains.items())
        Console().print(f"images a second, {title}: {parts}")
    if options.generate_prompts:
        facts["ar_vs_generate"] = against_generate(backbone, methods[BASELINE], options)
        Console().print("autoregression against generate:", facts["ar_vs_generate"])
    return {"methods": next(iter(runs.values())), "runs": runs, **facts}


def main() -> None:
    """Command line."""
    options = command_line().parse_args()
    found = measure(options)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
