"""Prompts of GenEval and DPG-Bench, and decoded images in the folders that their judges read.

Sources: Ghosh et al. 2023 (GenEval: `evaluation_metadata.jsonl`, <index>/metadata.jsonl,
<index>/samples/0000.png) and Hu et al. 2024 (DPG-Bench: a text file a prompt, <name>.png as a grid of four).
Their judges are not part of this package.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from sjd2_lightning.data.captions import plain_caption
from sjd2_lightning.data.names import passed_over
from sjd2_lightning.data.pictures import png_bytes, read_image
from sjd2_lightning.evaluation.prompts import PromptItem, check_prompts, repeat_key, seed_of
from sjd2_lightning.evaluation.store import Record, RecordStore
from sjd2_lightning.run.files import text_of

NUM_SAMPLES = 4  # images of each prompt, in both benchmarks

# Reads key, prompt and what the layout keeps beside the images, for each prompt of the benchmark.
Reader = Callable[[Path], list[tuple[str, str, str]]]
# Writes the images of one key into a folder, with what is kept beside them.
Writer = Callable[[Path, str, str, list[Path]], None]


def benchmark_prompts(benchmark: str, source: str | Path, seed: int = 0) -> list[PromptItem]:
    """The prompts of "geneval" (its metadata file) or "dpg" (its folder of .txt files), in their order.

    Raises:
        ValueError: the benchmark is unknown, or the source is missing, empty or unreadable.
    """
    read, _ = _layout(benchmark)
    prompts = [PromptItem(key, text, seed_of(key, seed)) for key, text, _ in read(Path(source))]
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
        benchmark: "geneval" or "dpg".
        source: metadata file or folder that the prompts were read from.
        store: store of the images.
        records: records of the method, four of each prompt; see `prompts.repeat_prompts`.
        folder: folder to write.

    Raises:
        ValueError: the benchmark is unknown, or a prompt lacks one of its four images.
    """
    read, write = _layout(benchmark)
    paths = {record.key: store.image_path(record) for record in records}
    wanted = [entry for entry in read(Path(source)) if entry[0] in paths]
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
        whole = Path(scratch) / "whole"
        whole.mkdir()
        for key, _, extra in wanted:
            samples = [repeat_key(key, repeat) for repeat in range(NUM_SAMPLES)]
            if missing := [sample for sample in samples if sample not in paths]:
                raise ValueError(
                    f"prompt {key!r} has no image {missing[0]!r}: {benchmark} judges {NUM_SAMPLES} images of "
                    f"each prompt; set samples_per_prompt={NUM_SAMPLES}"
                )
            write(whole, key, extra, [paths[sample] for sample in samples])
        if folder.exists():
            shutil.rmtree(folder)
        whole.replace(folder)
    return folder


def _geneval_entries(source: Path) -> list[tuple[str, str, str]]:
    """Key, prompt and line of each entry of evaluation_metadata.jsonl."""
    entries: list[tuple[str, str, str]] = []
    try:
        lines = [line.strip("\r") for line in text_of(source.read_bytes()).split("\n")]
        for number, line in enumerate(line for line in lines if line.strip()):
            entries.append((f"{number:05d}", plain_caption(json.loads(line)["prompt"]), line))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{source} cannot be read as GenEval's metadata ({type(error).__name__}: {error}); give "
            "prompts/evaluation_metadata.jsonl of its repository"
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


def _write_geneval(folder: Path, key: str, line: str, images: list[Path]) -> None:
    samples = folder / key / "samples"
    samples.mkdir(parents=True)
    (folder / key / "metadata.jsonl").write_text(line + "\n", encoding="utf-8")
    for number, path in enumerate(images):
        shutil.copyfile(path, samples / f"{number:04d}.png")


def _write_dpg(folder: Path, key: str, _: str, images: list[Path]) -> None:
    (folder / f"{key}.png").write_bytes(png_bytes(_grid([read_image(path) for path in images])))


def _grid(images: list[Tensor]) -> Tensor:
    """Four images (h, w, 3) as one (2 h, 2 w, 3), the first two in the upper row."""
    return torch.cat([torch.cat(images[:2], dim=1), torch.cat(images[2:], dim=1)], dim=0)


_LAYOUTS: dict[str, tuple[Reader, Writer]] = {
    "geneval": (_geneval_entries, _write_geneval),
    "dpg": (_dpg_entries, _write_dpg),
}


def _layout(benchmark: str) -> tuple[Reader, Writer]:
    if benchmark not in _LAYOUTS:
        raise ValueError(f"unknown benchmark {benchmark!r}; choose {' or '.join(_LAYOUTS)}")
    return _LAYOUTS[benchmark]
