"""The variants of the study: tokens a pass of every decoding, on every set of weights, paired by prompt.

    .venv/bin/python train.py -m experiment=study/plain,study/levels_1 seed=0,1
    .venv/bin/python benchmarks/study.py outputs/study/{plain,levels_1}-{0,1} --json docs/study/variants.json

Every run's weights decode the same held-out prompts with the same seeds: by noise-tuned drafts in replay
mode and by the lossless methods that need no training. A run decodes with the noise that it was trained
with. Replay gives the images of plain autoregression, so tokens a pass say all; whether every image is equal
is checked. Counts are kept beside each run, a file a sampling, as they come: a second start goes on.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table

from sjd2_lightning.decoding import DecodingConfig, Sampling, decode
from sjd2_lightning.decoding.methods import TreeShape
from sjd2_lightning.metrics.bootstrap import ratio_of_totals
from sjd2_lightning.models.registry import load_backbone
from sjd2_lightning.prompts import held_out_prompts
from sjd2_lightning.records import write_atomic

AR = DecodingConfig("ar", window=1)
RIVALS = {  # lossless, and no training: the best of them is what noise-tuned drafts must beat
    "replay": DecodingConfig("gumbel"),
    "mc_sjd": DecodingConfig("mc_sjd", acceptance="exact"),
    "sjd_pp": DecodingConfig("sjd_pp", acceptance="exact", refiner="reuse"),
    "sjd_pac": DecodingConfig("sjd_pac", acceptance="exact", tree=TreeShape(4, 2, 2)),
}
SHARED = ("schedule", "t_min", "rho", "tied", "path")  # of decoding: as in training


@dataclass(frozen=True)
class Run:
    """Weights to decode with.

    Attributes:
        name: of the table's rows.
        folder: where its counts are kept.
        weights: folder of the backbone.
        clean_loss: held-out loss of clean input in nats; None = not known.
        noise: keys of decoding that training decided.
    """

    name: str
    folder: Path
    weights: Path
    clean_loss: float | None
    noise: dict[str, Any]


def read_run(folder: Path) -> Run:
    """A run of train.py, or a bare folder of weights.

    Raises:
        ValueError: the folder holds neither.
    """
    if (folder / "backbone.json").is_file():
        return Run("shipped", Path("outputs/study/shipped"), folder, None, {})
    if not (folder / "model" / "backbone.json").is_file():
        raise ValueError(f"{folder} holds no exported weights (model/); train it first, or wait for its end")
    noise = yaml.safe_load((folder / "train.yaml").read_text())["noise"]
    losses = [
        row["val/loss_clean"]
        for path in sorted(folder.glob("csv/*/metrics.csv"), key=lambda path: path.stat().st_mtime)
        for row in csv.DictReader(path.open())
        if row.get("val/loss_clean")
    ]
    return Run(
        folder.name,
        folder,
        folder / "model",
        float(losses[-1]) if losses else None,
        {name: noise[name] for name in SHARED if name in noise},
    )


def settings(
    options: argparse.Namespace, noise: dict[str, Any], sampling: Sampling
) -> dict[str, DecodingConfig]:
    """By name; rivals have no levels."""
    found = {"ar": replace(AR, sampling=sampling)}
    for window in options.windows:
        for name in options.rivals:
            found[f"{name} w{window}"] = replace(RIVALS[name], window=window, sampling=sampling)
        for num_levels in options.levels:
            for rule in options.level_rules:
                for estimate in options.estimates:
                    words = [word for word in (rule, estimate) if word not in ("age", "drawn")]
                    found[" ".join(["sjd2", f"w{window}", f"l{num_levels}", *words])] = DecodingConfig(
                        "sjd2", window, num_levels, **noise, level_rule=rule, estimate=estimate,
                        sampling=sampling,
                    )  # fmt: skip
    return found


class Entropy:
    """Observer: mean entropy in nats of the laws of the codes that plain autoregression draws."""

    def __init__(self) -> None:
        self.total, self.num = 0.0, 0

    def __call__(self, iteration: Any) -> None:
        """Adds those of one pass."""
        is_code = iteration.tokens[:, 0] < iteration.scores.shape[-1]
        log_probs = iteration.scores[:, 0].log_softmax(-1)[is_code]
        self.total -= float((log_probs.exp() * log_probs.clamp_min(-1e4)).sum())
        self.num += int(is_code.sum())


@torch.inference_mode()
def decode_run(run: Run, options: argparse.Namespace, sampling: Sampling) -> dict[str, Any]:
    """Counts of every setting, those found in the run's folder and new ones."""
    name = f"decoded_t{sampling.temperature:g}_g{sampling.guidance_scale:g}_n{options.num_prompts}.json"
    path = run.folder / name
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    wanted = settings(options, run.noise, sampling)
    missing = {name: config for name, config in wanted.items() if name not in found}
    if missing:
        backbone = load_backbone("chameleon", run.weights).eval()
        layout = backbone.layout(*options.pixels)
        prompts = held_out_prompts(options.num_prompts)
        run.folder.mkdir(parents=True, exist_ok=True)
    for name, config in track(missing.items(), run.name) if missing else ():
        nfe, runs, images, entropy = [], Counter[int](), [], Entropy()
        for start in range(0, len(prompts), options.batch_size):
            part = prompts[start : start + options.batch_size]
            texts, seeds = [item.prompt for item in part], [item.seed for item in part]
            output = decode(backbone, texts, seeds, config, layout, entropy if name == "ar" else None)
            nfe += output.stats.nfe.tolist()
            runs.update(num for passes in output.stats.accepted for num in passes)
            images += output.slot_ids.tolist()
        found[name] = {"nfe": nfe, "runs": {str(length): runs[length] for length in sorted(runs)}}
        if name == "ar":
            found[name] |= {"entropy": entropy.total / entropy.num, "images": images}
        elif config.acceptance == "replay":
            same = [ours == theirs for ours, theirs in zip(images, found["ar"]["images"], strict=True)]
            found[name]["equal_to_ar"] = sum(same)
        write_atomic(path, json.dumps(found))
    return {name: found[name] for name in wanted}


def tokens_a_pass(base: Sequence[int], nfe: Sequence[int]) -> dict[str, Any]:
    """Ratio of passes with its interval over prompts."""
    result = ratio_of_totals("ratio", base, nfe, "passes, paired by prompt", num_resamples=1000)
    low, high = result.interval or (result.value, result.value)
    return {"value": round(result.value, 3), "interval": [round(low, 3), round(high, 3)]}


def best_of(cells: dict[str, Any], kinds: Sequence[str]) -> str:
    """The setting of these kinds with the fewest passes."""
    return min((name for name in cells if name.split()[0] in kinds), key=lambda name: sum(cells[name]["nfe"]))


def summary(run: Run, cells: dict[str, Any], reference: dict[str, Any]) -> dict[str, Any]:
    """Figures of one run; `reference` are the counts of the run that training-free methods are quoted on."""
    found: dict[str, Any] = {
        "clean_loss": None if run.clean_loss is None else round(run.clean_loss, 4),
        "entropy": round(cells["ar"]["entropy"], 4),
        "settings": {},
    }
    ar = cells["ar"]["nfe"]
    for name, cell in cells.items():
        passes = sum(cell["runs"].values())
        row = {
            "tokens_a_pass": tokens_a_pass(ar, cell["nfe"]),
            "share_of_passes_with_one": round(cell["runs"].get("1", 0) / passes, 3),
            "runs": cell["runs"],
        }
        if "equal_to_ar" in cell:
            row["equal_to_ar"] = f"{cell['equal_to_ar']} of {len(ar)}"
        found["settings"][name] = row
    if any(name.startswith("sjd2") for name in cells):
        ours = found["best_sjd2"] = best_of(cells, ["sjd2"])
        rival = found["best_rival"] = best_of(cells, list(RIVALS))
        theirs = found["best_rival_of_reference"] = best_of(reference, list(RIVALS))
        found["over_rival"] = tokens_a_pass(cells[rival]["nfe"], cells[ours]["nfe"])
        found["over_rival_of_reference"] = tokens_a_pass(reference[theirs]["nfe"], cells[ours]["nfe"])
    return found


def lines(results: dict[str, Any]) -> list[list[str]]:
    """Rows of the table, a run each, with its head."""
    rows = [
        ["weights", "clean loss", "entropy", "best rival", "tokens/pass", "best sjd2", "tokens/pass",
         "passes with one", "over its rival", "over the reference's"]
    ]  # fmt: skip
    for name, run in results.items():
        if "best_sjd2" not in run:
            continue
        ours, rival = run["settings"][run["best_sjd2"]], run["settings"][run["best_rival"]]
        loss = "" if run["clean_loss"] is None else f"{run['clean_loss']:.3f}"
        values = (
            _value(rival["tokens_a_pass"]),
            run["best_sjd2"],
            _value(ours["tokens_a_pass"]),
            f"{100 * ours['share_of_passes_with_one']:.0f} %",
            _value(run["over_rival"]),
            _value(run["over_rival_of_reference"]),
        )
        rows.append([name, loss, f"{run['entropy']:.2f}", run["best_rival"], *values])
    return rows


def _value(result: dict[str, Any]) -> str:
    low, high = result["interval"]
    return f"{result['value']:.2f} [{low:.2f}, {high:.2f}]"


def figure(results: dict[str, Any]) -> Figure:
    """Tokens a pass over the window, a line for each run's best levels and one for its best rival."""
    drawing = Figure(figsize=(7, 4.2), layout="constrained")
    axis = drawing.subplots()
    for number, (name, run) in enumerate(results.items()):
        for kinds, style in ((["sjd2"], "-"), (list(RIVALS), ":")):
            best: dict[int, float] = {}
            for setting, row in run["settings"].items():
                if setting.split()[0] in kinds:
                    window = int(setting.split()[1].removeprefix("w"))
                    best[window] = max(best.get(window, 0), row["tokens_a_pass"]["value"])
            windows = sorted(best)
            label = name if style == "-" else None
            axis.plot(windows, [best[w] for w in windows], style, marker="o", color=f"C{number}", label=label)
    axis.set(xlabel="window", ylabel="tokens a pass", xscale="log")
    axis.set_xticks(windows, [str(window) for window in windows])
    axis.minorticks_off()
    axis.legend(title="solid: sjd2 in replay mode\ndotted: best training-free", fontsize="small")
    return drawing


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+", help="of train.py, or of weights; the first is "
                        "the reference that training-free methods are quoted on")  # fmt: skip
    parser.add_argument("--json", type=Path, help="where the figures go")
    parser.add_argument("--markdown", type=Path, help="where the table goes")
    parser.add_argument("--figure", type=Path, help="where the picture goes (.png or .svg)")
    parser.add_argument("--num-prompts", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--windows", type=int, nargs="+", default=[16, 32, 64, 128])
    parser.add_argument("--levels", type=int, nargs="*", default=[1, 2, 4, 8])
    parser.add_argument("--level-rules", nargs="+", default=["age"])
    parser.add_argument("--estimates", nargs="+", default=["drawn"])
    parser.add_argument("--rivals", nargs="+", default=list(RIVALS), choices=list(RIVALS))
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--guidance-scale", type=float, default=3.0)
    parser.add_argument("--pixels", type=int, nargs=2, default=[64, 64])
    options = parser.parse_args(arguments)
    sampling = Sampling(options.temperature, guidance_scale=options.guidance_scale)
    runs = [read_run(folder) for folder in options.runs]
    cells = {run.name: decode_run(run, options, sampling) for run in runs}
    results = {run.name: summary(run, cells[run.name], cells[runs[0].name]) for run in runs}
    rows = lines(results)
    table = Table(*rows[0])
    for row in rows[1:]:
        table.add_row(*row)
    Console().print(table)
    for path in filter(None, (options.json, options.markdown, options.figure)):
        path.parent.mkdir(parents=True, exist_ok=True)
    if options.json:
        facts = {"num_prompts": options.num_prompts, "sampling": {"temperature": options.temperature,
                 "guidance_scale": options.guidance_scale}, "reference": runs[0].name}  # fmt: skip
        write_atomic(options.json, json.dumps({**facts, "runs": results}, indent=1))
    if options.markdown:
        head = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
        body = ["| " + " | ".join(row) + " |" for row in rows[1:]]
        write_atomic(options.markdown, "\n".join([*head, *body]) + "\n")
    if options.figure:
        figure(results).savefig(options.figure, dpi=110)


if __name__ == "__main__":
    main()
