"""Draws pictures from prompts and writes them as PNG files.

KEY=VALUE are the keys of `sjd2 evaluate`. Each PNG holds its prompt, seed and
settings as text.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from sjd2_lightning.cli.preview import PictureProgress, Preview
from sjd2_lightning.run.files import whole_file
from sjd2_lightning.run.stages import stage

if TYPE_CHECKING:
    from sjd2_lightning.cli.pipeline import Drawn, Pipeline
    from sjd2_lightning.decoding import Iteration
    from sjd2_lightning.evaluation.prompts import PromptItem

_KEY = re.compile(r"[+~]{0,2}[a-z_][\w.@]*=.*", re.DOTALL)
_NAME = 40  # letters of a prompt in the name of its file


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    options = _parser().parse_intermixed_args(arguments)
    keys = [word for word in options.words if _KEY.fullmatch(word)]
    prompts = [word for word in options.words if not _KEY.fullmatch(word)]
    try:
        for line in generate(options, prompts, keys):
            print(line, flush=True)
    except ValueError as error:
        raise SystemExit(f"sjd2 generate: {error}") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sjd2 generate",
        description=__doc__,
        epilog='examples:\n  sjd2 generate "red heart" -n 4\n'
        '  sjd2 generate "red heart" "sleepy face" --method sjd2 --compare ar --seed 7\n'
        "  sjd2 generate --file prompts.txt weights=outputs/demo/model",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("words", nargs="*", metavar="PROMPT | KEY=VALUE", help="texts, and keys of evaluate")
    parser.add_argument("--file", type=Path, help="prompts: .txt, .json or .tar, see docs/evaluation.md")
    parser.add_argument("-n", type=int, default=1, metavar="N", help="pictures of each prompt (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of a prompt's first picture (%(default)s)")
    parser.add_argument("--method", default="sjd2", help="%(default)s, or another file of conf/method")
    parser.add_argument("--compare", metavar="METHOD", help="draw by this method too, such as ar")
    parser.add_argument("--out", type=Path, default=Path("outputs/generate"), help="folder (%(default)s)")
    return parser


@dataclass(frozen=True)
class Job:
    """One picture to draw: its text, its seed, and the start of its file's name."""

    prompt: str
    seed: int
    name: str


def jobs_of(prompts: Sequence[str], listed: Sequence[PromptItem], num: int, seed: int) -> list[Job]:
    """All pictures to draw: `num` of each prompt, with seeds one behind the other.

    Args:
        prompts: texts of the command line.
        listed: prompts of a file, which have keys and seeds of their own.
        num: number of pictures of each.
        seed: seed of the first picture of each text.
    """
    starts = [(text, seed, re.sub(r"\W+", "-", text.strip())[:_NAME].strip("-")) for text in prompts]
    starts += [(item.prompt, item.seed, item.key) for item in listed]
    places = len(str(max(len(starts) - 1, 0)))
    return [
        Job(text, first + index, f"{place:0{places}}-{name}-{first + index}")
        for place, (text, first, name) in enumerate(starts)
        for index in range(num)
    ]


def generate(options: argparse.Namespace, prompts: Sequence[str], keys: Sequence[str]) -> Iterator[str]:
    """Draws and writes everything; gives one line a picture, and where the sheet of all is.

    Raises:
        ValueError: no prompt, a number that is none, or what `Pipeline` refuses; before anything is drawn.
    """
    from sjd2_lightning.evaluation.prompts import read_prompts

    listed = read_prompts(options.file, options.seed) if options.file is not None else []
    if not prompts and not listed:
        raise ValueError("there is no prompt; give one in quotation marks, or a file of them by --file")
    if options.n < 1 or options.seed < 0:
        raise ValueError(f"-n {options.n} --seed {options.seed}: need at least one picture and a seed >= 0")
    if blank := [text for text in prompts if not text.strip()]:
        raise ValueError(f"prompt {blank[0]!r} is empty; give it a text")
    jobs = jobs_of(prompts, listed, options.n, options.seed)
    with stage("loading libraries"):
        from sjd2_lightning.cli.pipeline import Pipeline, check_method, evaluation_settings
    config = evaluation_settings(keys)
    methods = list(dict.fromkeys([options.compare or options.method, options.method]))
    for method in methods:
        check_method(config, method)
    pipeline = Pipeline.of(config)
    options.out.mkdir(parents=True, exist_ok=True)
    size = pipeline.config.batch_size
    pictures: dict[str, list[Drawn]] = {method: [] for method in methods}
    with _progress(len(jobs) * len(methods) * pipeline.layout.num_slots) as progress:
        for start in range(0, len(jobs), size):
            batch = jobs[start : start + size]
            for method in methods:
                drawn = _draw(pipeline, batch, method, progress)
                pictures[method].append(drawn)
                other = pictures[methods[0]][-1] if method != methods[0] else None
                yield from _write(pipeline, batch, method, drawn, other, options.out)
    yield f"sheet: {_sheet(jobs, pictures, options.out)}"


def _draw(pipeline: Pipeline, batch: Sequence[Job], method: str, progress: PictureProgress) -> Drawn:
    texts, seeds = [job.prompt for job in batch], [job.seed for job in batch]
    task = progress.task_ids[0]
    if pipeline.backbone.device.type != "cpu":  # with an observer nothing is captured
        drawn = pipeline(texts, seeds, method)
        progress.update(task, advance=len(batch) * pipeline.layout.num_slots)
        return drawn

    can_show = progress.has_room and len(batch) == 1
    preview = Preview(progress, pipeline.backbone, pipeline.layout) if can_show else None

    def seen(iteration: Iteration) -> None:
        progress.update(task, advance=int(iteration.num_committed.sum()))
        if preview is not None:
            preview(iteration)

    drawn = pipeline(texts, seeds, method, observer=seen)
    return drawn if preview is None else replace(drawn, seconds=drawn.seconds - preview.seconds)


@contextmanager
def _progress(num_slots: int) -> Iterator[PictureProgress]:
    """A bar of slots on standard error, so that standard output has the lines alone."""
    from rich.console import Console

    with PictureProgress(Console(stderr=True)) as progress:
        progress.add_task("tokens", total=num_slots)
        yield progress


def _write(
    pipeline: Pipeline, batch: Sequence[Job], method: str, drawn: Drawn, other: Drawn | None, folder: Path
) -> Iterator[str]:
    """Writes the pictures of a batch; gives a line for each, with whether it is the one of `other`."""
    from PIL.PngImagePlugin import PngInfo

    from sjd2_lightning import __version__

    for place, job in enumerate(batch):
        path = folder / f"{job.name}-{method}.png"
        said = {
            "prompt": job.prompt,
            "seed": str(job.seed),
            "method": json.dumps({"name": method, **asdict(pipeline.config.methods[method])}),
            "model": pipeline.weights,
            "passes": str(drawn.passes[place]),
            "Software": f"sjd2_lightning {__version__}",
        }
        info = PngInfo()
        for name, text in said.items():
            info.add_itxt(name, text)
        with whole_file(path) as unfinished:
            drawn.images[place].save(unfinished, "PNG", pnginfo=info)
        line = (
            f"{path}: {method}, {drawn.passes[place]} passes, {drawn.tokens_a_pass[place]:.2f} tokens a pass"
        )
        if other is not None:
            same = drawn.output.slot_ids[place].equal(other.output.slot_ids[place])
            line += ", the same image" if same else ", another image"
        pixels = f", its pixels {drawn.pixel_seconds / len(batch):.1f} s" if drawn.pixel_seconds else ""
        yield line + f" ({drawn.seconds / len(batch):.1f} s{pixels})"


def _sheet(jobs: Sequence[Job], pictures: dict[str, list[Drawn]], folder: Path) -> Path:
    """One picture of all pictures, a line a method."""
    import numpy as np
    import torch

    from sjd2_lightning.report.figures import grid_figure, save_figure

    images = [
        [torch.from_numpy(np.array(image)) for drawn in batches for image in drawn.images]
        for batches in pictures.values()
    ]
    return save_figure(
        grid_figure(list(pictures), images, [job.prompt for job in jobs]), folder / "sheet.png"
    )


if __name__ == "__main__":
    main()
