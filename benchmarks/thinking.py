"""What a training step of a model that thinks in latents costs: parallel passes against the chain.

    .venv/bin/python -m benchmarks.thinking --json outputs/thinking.json

Both train the same weights on the same problems with all losses of the recipe; only the number of passes
differs. Repeats alternate. Seconds are those of this process on the CPU, one thread, which other load on the
machine does not add to; the least of the repeats counts, and the wall clock stands beside it. `thinking` is
the part from the question to the last latent, without gradients.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from sjd2_lightning.data.sources.arithmetic import Problem, ProblemSource
from sjd2_lightning.models.thinker import ThinkerSizes, ThoughtSettings
from sjd2_lightning.models.thinking import think
from sjd2_lightning.run.files import write_whole
from sjd2_lightning.training.optimizer import OptimizerConfig, build_optimizer
from sjd2_lightning.training.recipes import ThoughtRecipe
from sjd2_lightning.training.recipes.latent_chain import ThoughtModule

Clock = tuple[float, float]  # seconds of the process, seconds on the wall


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="file that gets the figures")
    parser.add_argument("--latents", type=int, default=24, help="latents of a thought")
    parser.add_argument("--passes", type=int, default=3, help="parallel passes over them")
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 64], help="problems in a batch")
    parser.add_argument("--repeats", type=int, default=9, help="timed steps of each")
    parser.add_argument("--width", type=int, default=96, help="width of the model")
    parser.add_argument("--layers", type=int, default=3, help="layers of the model")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    ways = {"passes": options.passes, "chain": options.latents}
    kinds: dict[str, dict[str, Callable[[list[Problem]], None]]] = {"step": {}, "thinking": {}}
    for name, num_passes in ways.items():
        kinds["step"][name], kinds["thinking"][name] = calls_of(options, num_passes)
    rows = []
    for batch in track(options.batches, "timing", console=Console(stderr=True)):
        problems = list(islice(ProblemSource().training(0), batch))
        for kind, calls in kinds.items():
            found = timings(calls, problems, options.repeats)
            ratio = found["passes"][0] / found["chain"][0]
            rows.append({"kind": kind, "batch": batch, "share_of_chain": ratio} | milliseconds(found))
    model = {name: getattr(options, name) for name in ("latents", "passes", "width", "layers", "repeats")}
    whole = {"settings": model, "load": os.getloadavg(), "torch": torch.__version__, "rows": rows}
    write_whole(options.json, json.dumps(whole, indent=1) + "\n")
    show(rows, options)


def calls_of(
    options: argparse.Namespace, num_passes: int
) -> tuple[Callable[[list[Problem]], None], Callable[[list[Problem]], None]]:
    """A training step, and a thought without gradients, of a new model."""
    torch.manual_seed(0)
    sizes = ThinkerSizes(width=options.width, num_layers=options.layers, num_heads=3, num_positions=192)
    thoughts = ThoughtSettings(options.latents, num_passes, answer_prompt="A:")
    config = OptimizerConfig(lr=1e-4)
    module = ThoughtModule(ThoughtRecipe(sizes, thoughts, step_loss=1.0), config)
    optimizer = build_optimizer(module.named_parameters(), config)

    def step(problems: list[Problem]) -> None:
        optimizer.zero_grad()
        torch.stack(list(module.losses(problems).values())).sum().backward()
        optimizer.step()

    @torch.no_grad()
    def thought(problems: list[Problem]) -> None:
        think(module.thinker, [problem.question for problem in problems], options.latents, num_passes)

    return step, thought


def timings(
    calls: dict[str, Callable[[list[Problem]], None]], problems: list[Problem], repeats: int
) -> dict[str, Clock]:
    """Least seconds of each call, in turn; the first round is not counted."""
    found: dict[str, list[Clock]] = {name: [] for name in calls}
    for _ in range(repeats + 1):
        for name, call in calls.items():
            own, wall = time.process_time(), time.perf_counter()
            call(problems)
            found[name].append((time.process_time() - own, time.perf_counter() - wall))
    return {
        name: (min(own for own, _ in clocks[1:]), min(wall for _, wall in clocks[1:]))
        for name, clocks in found.items()
    }


def milliseconds(found: dict[str, Clock]) -> dict[str, float]:
    """The clocks by name, in milliseconds."""
    return {
        f"{name}_{clock}_ms": 1000 * seconds
        for name, clocks in found.items()
        for clock, seconds in zip(("cpu", "wall"), clocks, strict=True)
    }


def show(rows: list[dict[str, object]], options: argparse.Namespace) -> None:
    """Prints the figures."""
    title = f"{options.passes} passes against a chain of {options.latents}, milliseconds of one core"
    table = Table("", "batch", "passes", "chain", "share", title=title)
    for row in rows:
        cells = (row["passes_cpu_ms"], row["chain_cpu_ms"])
        numbers = [f"{cell:.0f}" for cell in cells] + [f"{100 * row['share_of_chain']:.0f} %"]  # type: ignore[operator]
        table.add_row(str(row["kind"]), str(row["batch"]), *numbers)
    Console().print(table)


if __name__ == "__main__":
    main()
