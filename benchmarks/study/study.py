"""Variants of noise training against decoding without training: tokens a pass over window and levels.

    python train.py -m experiment=study/plain,study/recipe seed=0,1
    python benchmarks/study/study.py --runs outputs/study --json outputs/study.json

Every trained variant decodes the same held-out prompts with the same seeds: in replay mode by each number of
levels, 0 being plain coupled drafts, and by the lossless methods that need no training, on the same weights.
A variant decodes as its train.yaml configures sjd2 (schedule of noise, first drafts and so on). Only window,
levels and sampling are set here, and fields that are given behind a plus: `--training-free
mc_sjd+draft_init=repeat_above`, `--noisy +tree.width=3`. A token is a slot, row ends included, as in
`DecodeStats`; the siblings of a tree are fed beside its window.

Tokens a pass do not depend on the batch, so many prompts are decoded at once; `--time` adds the wall clock of
single prompts. Each finished setting is a file under `--out` and is not decoded again: after a kill the same
command continues. Seeds of training are pooled: a prompt counts its passes over all of them.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from hydra import compose, initialize_config_dir
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.likelihood import log_laws
from benchmarks.shipped import shipped_prompts
from benchmarks.study.study_table import COLUMNS, Run, figure, lines, markdown, tabulate
from sjd2_lightning.config.groups import Group
from sjd2_lightning.config.reading import conf_dir, evaluate_config
from sjd2_lightning.decoding import DecodingConfig, Sampling, decode
from sjd2_lightning.decoding.config import BASELINE
from sjd2_lightning.evaluation.prompts import PromptItem
from sjd2_lightning.evaluation.store import method_fields
from sjd2_lightning.metrics.efficiency import timed
from sjd2_lightning.models.backbone import Backbone
from sjd2_lightning.models.registry import load_backbone
from sjd2_lightning.noise import NoiseProcess
from sjd2_lightning.report.figures import figure_png
from sjd2_lightning.run.files import sha256_of_json, write_whole

# lossless methods of conf/method
TRAINING_FREE = (
    "mc_sjd",
    "mc_sjd+draft_init=repeat_above",
    "gumbel",
    "gumbel+draft_init=repeat_above",
    "sjd_pp",
    "sjd_pac",
    "sjd_pac+draft_init=repeat_above",
)


class Methods(Group):
    """The part of train.yaml that decides decoding."""

    methods: dict[str, DecodingConfig]


def read_run(folder: Path) -> Run:
    """A run from the folder that train.py wrote."""
    config = yaml.safe_load((folder / "train.yaml").read_text())
    nested = {name: _with_noise(method) for name, method in config["methods"].items()}
    methods = Methods.model_validate_json(json.dumps({"methods": nested})).methods
    variant = folder.name.removesuffix(f"-{config['seed']}")
    model = config["model"]
    return Run(
        folder=folder,
        variant=variant,
        seed=config["seed"],
        base=f"{model['path']}/{model['trunk']}" if model["init"] == "pretrained" else None,
        is_plain=not config["noise"]["enabled"],
        family=model["family"],
        pixels=tuple(model["image_size"]),
        method=methods["sjd2"],
        losses=validation_losses(folder),
    )


def _with_noise(method: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a method; runs from before noise had fields of its own left them beside the others."""
    names = {field.name for field in fields(NoiseProcess)}
    noise = {name: value for name, value in method.items() if name in names}
    return {"noise": noise} | {name: value for name, value in method.items() if name not in names}


def finished_runs(folders: Iterable[Path]) -> list[Run]:
    """Runs with exported weights in the folders, or in folders inside them; plain variants first."""
    places = [inner for folder in folders for inner in (folder, *sorted(folder.glob("*/")))]
    runs = [read_run(place) for place in places if (place / "model" / "backbone.json").is_file()]
    return sorted(runs, key=lambda run: (not run.is_plain, run.variant, run.seed))


def validation_losses(folder: Path) -> dict[str, dict[str, float]]:
    """First and last value of each validation loss in the tables of a run, however often it was continued."""
    tables = sorted(folder.glob("csv/version_*/metrics.csv"), key=lambda path: int(path.parent.name[8:]))
    losses: dict[str, dict[str, float]] = {"start": {}, "end": {}}
    for table in tables:
        for row in csv.DictReader(io.StringIO(table.read_text())):
            values = {name: float(value) for name, value in row.items() if name.startswith("val/") and value}
            losses["start"] = values | losses["start"]
            losses["end"] |= values
    return losses


def settings(run: Run, options: argparse.Namespace) -> dict[str, DecodingConfig]:
    """The baseline and every setting, by the name of its file."""
    sampling = Sampling(options.temperature, guidance_scale=options.guidance_scale)
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        shipped = evaluate_config(compose("evaluate")).methods
    found = {BASELINE: replace(shipped[BASELINE], sampling=sampling)}
    bases = {
        f"replay-l{levels}{changes}": changed(
            replace(run.method, num_levels=levels, acceptance="replay"), changes
        )
        for levels in options.levels
        for changes in options.noisy
    }
    for title in options.training_free:
        name, plus, changes = title.partition("+")
        if name not in shipped:
            raise SystemExit(f"--training-free {title}: no method {name!r}; known: {', '.join(shipped)}")
        bases[title] = changed(shipped[name], plus + changes)
    for window in options.windows:
        for title, config in bases.items():
            found[f"{title}-w{window}"] = replace(config, window=window, sampling=sampling)
    return found


def changed(config: DecodingConfig, changes: str) -> DecodingConfig:
    """A method with fields set as `+field=value+group.field=value` says."""
    for change in filter(None, changes.split("+")):
        name, _, value = change.partition("=")
        group, _, field = name.rpartition(".")
        try:
            held = getattr(config, group) if group else config
            held = replace(held, **{field: yaml.safe_load(value)})
        except (AttributeError, TypeError):
            raise SystemExit(f"+{change}: there is no decoding.{name}; see conf/method/base.yaml") from None
        config = replace(config, **{group: held}) if group else held
    config.check()
    return config


def identity(config: DecodingConfig, weights: str, prompts: list[PromptItem]) -> str:
    """Hash of all that decides a setting's tokens; fields with their standard value do not count.

    So a field that a later version adds changes nothing until it is used.
    """
    standard = method_fields(DecodingConfig(config.method))
    chosen = {name: value for name, value in method_fields(config).items() if value != standard.get(name)}
    return sha256_of_json([config.method, chosen, weights, [item.identity for item in prompts]])


def weights_digest(folder: Path) -> str:
    """sha256 of a backbone folder's files."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(folder)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def decoded(
    backbone: Backbone,
    config: DecodingConfig,
    prompts: list[PromptItem],
    pixels: tuple[int, int],
    batch: int,
    baseline: dict[str, Any] | None,
) -> dict[str, Any]:
    """Decodes all prompts by one setting: passes, tokens of each pass, and whether tokens are the baseline's.

    The baseline (`baseline` is None) also keeps its tokens and, in nats a code, the mean entropy of its law
    and the negative log-probability of its images.
    """
    layout = backbone.layout(*pixels)
    found: dict[str, Any] = {"num_slots": layout.num_slots, "nfe": []}
    accepted: Counter[int] = Counter()
    slot_ids: list[list[int]] = []
    entropy: list[float] = []
    nll: list[float] = []
    for start in range(0, len(prompts), batch):
        group = prompts[start : start + batch]
        texts = [item.prompt for item in group]
        output = decode(backbone, texts, [item.seed for item in group], config, layout)
        found["nfe"] += output.stats.nfe.tolist()
        slot_ids += output.slot_ids.tolist()
        for passes in output.stats.accepted:
            accepted.update(passes)
        if baseline is None:
            laws = log_laws(backbone, texts, output.image_ids, layout, config.sampling)
            entropy += torch.special.entr(laws.exp()).sum(-1).mean(1).tolist()
            codes = output.image_ids.flatten(1)[..., None]
            nll += (-laws.gather(-1, codes)).squeeze(-1).mean(1).tolist()
    found["accepted"] = {str(num): accepted[num] for num in sorted(accepted)}
    if baseline is None:
        return found | {"slot_ids": slot_ids, "entropy": entropy, "nll": nll}
    pairs = zip(slot_ids, baseline["slot_ids"], strict=True)
    return found | {"equal_to_ar": [own == plain for own, plain in pairs]}


def held(path: Path, wanted: str) -> dict[str, Any] | None:
    """Content of a file if it has this identity, else None."""
    content = json.loads(path.read_text()) if path.is_file() else {}
    return content if content.get("identity") == wanted else None


def measure(run: Run, options: argparse.Namespace) -> None:
    """Fills a run with the results of its settings, decoding those that are missing."""
    prompts = shipped_prompts(options.num_prompts)
    sampling = f"t{options.temperature:g}-g{options.guidance_scale:g}"
    out = options.out / run.folder.name / sampling
    weights = weights_digest(run.folder / "model")
    backbone = load_backbone(run.family, run.folder / "model").eval().to(options.device)
    configs = settings(run, options)
    names = {name: identity(config, weights, prompts) for name, config in configs.items()}
    for name in track(configs, f"{run.folder.name} {sampling}"):
        path = out / f"{name.replace('/', '_')}.json"  # a change may hold the path of a table
        found = held(path, names[name])
        if found is None and not options.tabulate:
            job = (backbone, configs[name], prompts, run.pixels, options.batch, run.found.get(BASELINE))
            content, seconds = timed(partial(decoded, *job), options.device)
            found = {"identity": names[name], "seconds": seconds, **content}
            write_whole(path, json.dumps(found))
        if found is not None:
            run.found[name] = found
    if options.time:
        measure_times(run, backbone, configs, out / "times.json", sha256_of_json(names), options)


def measure_times(
    run: Run,
    backbone: Backbone,
    configs: Mapping[str, DecodingConfig],
    path: Path,
    wanted: str,
    options: argparse.Namespace,
) -> None:
    """Wall clock at batch 1: each prompt by every setting in turn, so that drift of the machine hits all."""
    layout, prompts = backbone.layout(*run.pixels), shipped_prompts(options.num_prompts)
    run.times = (held(path, wanted) or {"rounds": []})["rounds"]
    if options.tabulate:
        return
    for place, item in enumerate(prompts[len(run.times) : options.time]):
        seconds = {}
        for name, config in configs.items():
            job = partial(decode, backbone, [item.prompt], [item.seed], config, layout)
            if place == 0:
                timed(job, options.device)  # warms up
            seconds[name] = timed(job, options.device)[1]
        run.times.append(seconds)
        write_whole(path, json.dumps({"identity": wanted, "rounds": run.times}))


def command_line() -> argparse.ArgumentParser:
    """The command line's options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--runs",
        type=Path,
        nargs="+",
        default=[Path("outputs/study")],
        help="folders of runs, or of such folders",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("outputs/study_decoding"), help="where each setting is kept"
    )
    parser.add_argument("--json", type=Path, help="write the table here")
    parser.add_argument("--markdown", type=Path, help="and here, as text")
    parser.add_argument(
        "--figure", type=Path, help="PNG: tokens a pass over the window and over the clean loss"
    )
    parser.add_argument("--num-prompts", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--windows", type=int, nargs="+", default=[16, 32, 64, 128])
    parser.add_argument("--levels", type=int, nargs="+", default=[0, 1, 2, 4, 8])
    parser.add_argument("--training-free", nargs="*", default=list(TRAINING_FREE), metavar="METHOD+CHANGES")
    parser.add_argument(
        "--noisy", nargs="*", default=[""], metavar="+CHANGES", help="of replay, for all of --levels"
    )
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--guidance-scale", type=float, default=3.0)
    parser.add_argument("--time", type=int, default=0, metavar="N", help="time N prompts, one by one")
    parser.add_argument("--tabulate", action="store_true", help="decode nothing: tabulate what is there")
    parser.add_argument("--device", default="cpu")
    return parser


def study(options: argparse.Namespace) -> dict[str, Any]:
    """Decodes what is missing and returns what `--json` gets."""
    runs = finished_runs(options.runs)
    if not runs:
        raise SystemExit(
            f"no run with weights in {', '.join(map(str, options.runs))}: train the variants first"
        )
    for run in runs:
        measure(run, options)
    runs = [run for run in runs if len(run.found) > 1]
    if not runs:
        raise SystemExit(f"nothing is decoded in {options.out} with these options: leave out --tabulate")
    sampling = {"temperature": options.temperature, "guidance_scale": options.guidance_scale}
    return {"num_prompts": options.num_prompts, **sampling, **tabulate(runs)}


def as_text(found: dict[str, Any]) -> str:
    """JSON with one line a setting."""
    return re.sub(r"\n {5,}", " ", json.dumps(found, indent=1)) + "\n"


def main() -> None:
    """Command line."""
    options = command_line().parse_args()
    found = study(options)
    table = Table(*COLUMNS)
    for line in lines(found):
        table.add_row(*(cell.replace(" [", "\n[") for cell in line))
    Console().print(table)
    if options.json is not None:
        write_whole(options.json, as_text(found))
    if options.markdown is not None:
        write_whole(options.markdown, markdown(found))
    if options.figure is not None:
        write_whole(options.figure, figure_png(figure(found)))


if __name__ == "__main__":
    main()
