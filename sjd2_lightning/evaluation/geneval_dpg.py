"""Prompts of GenEval, DPG-Bench and GenEval 2, and decoded images in the folders that their judges read.

Sources: Ghosh et al. 2023 (GenEval: `evaluation_metadata.jsonl`, <index>/metadata.jsonl,
<index>/samples/0000.png), Hu et al. 2024 (DPG-Bench: a text file a prompt, <name>.png as a grid of four) and
Kamath et al. 2025, arXiv 2512.16853 (GenEval 2: `geneval2_data.jsonl`, a file from prompts to images).
Their judges are not part of this package.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from sjd2_lightning.data.captions import plain_caption
from sjd2_lightning.data.names import passed_over
from sjd2_lightning.data.pictures import png_bytes, read_image
from sjd2_lightning.evaluation.prompts import PromptItem, check_prompts, repeat_key, seed_of
from sjd2_lightning.evaluation.store import Record, RecordStore
from sjd2_lightning.run.files import text_of

IMAGE_PATHS = "image_paths.json"  # what GenEval 2's judge takes as --image_filepath_data

# Reads key, prompt and what the layout keeps beside the images, for each prompt of the benchmark.
Reader = Callable[[Path], list[tuple[str, str, str]]]
# What belongs to one prompt: its key, its text, what the layout keeps beside the images, and the images.
Entry = tuple[str, str, str, list[Path]]
# Writes all images of a method into a folder, which is put into its place afterwards.
Writer = Callable[[Path, Path, list[Entry]], None]


class _Layout(NamedTuple):
    """How a benchmark's prompts are read, its images written, and how many images each prompt has."""

    read: Reader
    write: Writer
    num_samples: int


def benchmark_prompts(benchmark: str, source: str | Path, seed: int = 0) -> list[PromptItem]:
    """The prompts of "geneval" or "geneval2" (JSON lines) or "dpg" (a folder of .txt files), in their order.

    Raises:
        ValueError: the benchmark is unknown, or the source is missing, empty or unreadable.
    """
    entries = _layout(benchmark).read(Path(source))
    prompts = [PromptItem(key, text, seed_of(key, seed)) for key, text, _ in entries]
    check_prompts(prompts)
    return prompts


def export_benchmark(
    benchmark: str,
    source: str | Path,
    store: RecordStore,
    records: Sequence[Record],
    folder: str | Path,
) -> Path:
    """Writes one method's images in a benchmark's layout; the folder appears whole, and replaces an old one.

    Args:
        benchmark: "geneval", "dpg" or "geneval2".
        source: metadata file or folder that the prompts were read from.
        store: store of the images.
        records: records of the method, as many of each prompt as are judged; see `prompts.repeat_prompts`.
        folder: folder to write.

    Raises:
        ValueError: the benchmark is unknown, or a prompt lacks one of its images.
    """
    layout = _layout(benchmark)
    paths = {record.key: store.image_path(record) for record in records}
    entries: list[Entry] = []
    for key, text, extra in layout.read(Path(source)):
        samples = [repeat_key(key, repeat) for repeat in range(layout.num_samples)]
        missing = [sample for sample in samples if sample not in paths]
        if key in paths and missing:
            raise ValueError(
                f"prompt {key!r} has no image {missing[0]!r}: {benchmark} judges {layout.num_samples} images "
                f"of each prompt; set samples_per_prompt={layout.num_samples}"
            )
        if key in paths:
            entries.append((key, text, extra, [paths[sample] for sample in samples]))
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
        whole = Path(scratch) / "whole"
        whole.mkdir()
        layout.write(whole, folder, entries)
        if folder.exists():
            shutil.rmtree(folder)
        whole.replace(folder)
    return folder


def num_samples(benchmark: str) -> int:
    """Number of images of each prompt that a benchmark judges."""
    return _layout(benchmark).num_samples


def _geneval_entries(source: Path) -> list[tuple[str, str, str]]:
    """Key, prompt and line of each entry of evaluation_metadata.jsonl or geneval2_data.jsonl."""
    entries: list[tuple[str, str, str]] = []
    try:
        lines = [line.strip("\r") for line in text_of(source.read_bytes()).split("\n")]
        for number, line in enumerate(line for line in lines if line.strip()):
            entries.append((f"{number:05d}", plain_caption(json.loads(line)["prompt"]), line))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{source} cannot be read as GenEval's metadata ({type(error).__name__}: {error}); give "
            "prompts/evaluation_metadata.jsonl of its repository, or geneval2_data.jsonl of GenEval 2's"
        ) from error
    return entries


def _dpg_entries(source: Path) -> list[tuple[str, str, str]]:
    """Key and prompt of each text file; its layout keeps nothing more."""
    if not source.is_dir():
        raise ValueError(f"{source} is no folder; give DPG-Bench's folder of prompts, one .txt a prompt")
    entries = []
    for path in sorted(source.iterdir()):
        if path.suffix.lower() == ".txt" and not passed_over(path.name):
            try:
                entries.append((path.stem, plain_caption(path.read_bytes()), ""))
            except (OSError, ValueError) as error:
                raise ValueError(f"the prompt {path} cannot be read: {error}") from error
    return entries


def _write_geneval(folder: Path, _: Path, entries: list[Entry]) -> None:
    for key, _text, line, images in entries:
        samples = folder / key / "samples"
        samples.mkdir(parents=True)
        (folder / key / "metadata.jsonl").write_text(line + "\n", encoding="utf-8")
        for number, path in enumerate(images):
            shutil.copyfile(path, samples / f"{number:04d}.png")


def _write_dpg(folder: Path, _: Path, entries: list[Entry]) -> None:
    for key, _text, _extra, images in entries:
        (folder / f"{key}.png").write_bytes(png_bytes(_grid([read_image(path) for path in images])))


def _write_geneval2(folder: Path, place: Path, entries: list[Entry]) -> None:
    for key, _text, _line, images in entries:
        shutil.copyfile(images[0], folder / f"{key}.png")
    # its judge looks prompts up as they are written in its own file
    paths = {json.loads(line)["prompt"]: str(place.resolve() / f"{key}.png") for key, _, line, _ in entries}
    (folder / IMAGE_PATHS).write_text(json.dumps(paths, indent=1) + "\n", encoding="utf-8")


def _grid(images: list[Tensor]) -> Tensor:
    """Four images (h, w, 3) as one (2 h, 2 w, 3), the first two in the upper row."""
    return torch.cat([torch.cat(images[:2], dim=1), torch.cat(images[2:], dim=1)], dim=0)


_LAYOUTS = {
    "geneval": _Layout(_geneval_entries, _write_geneval, 4),
    "dpg": _Layout(_dpg_entries, _write_dpg, 4),
    "geneval2": _Layout(_geneval_entries, _write_geneval2, 1),
}


def _layout(benchmark: str) -> _Layout:
    if benchmark not in _LAYOUTS:
        raise ValueError(f"unknown benchmark {benchmark!r}; choose {', '.join(_LAYOUTS)}")
    return _LAYOUTS[benchmark]
