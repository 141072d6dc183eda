"""Turns captioned pictures into shards that training reads: image codes, or raw pictures.

A run that was killed goes on where it stopped when the same command is given again. docs/data.md says more.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from sjd2_lightning.cli.arguments import program
from sjd2_lightning.cli.launch import composed
from sjd2_lightning.config.groups import shipped
from sjd2_lightning.config.reading import model_choices
from sjd2_lightning.data.build import SKIPPED_NAME, skipped_line, write_skipped
from sjd2_lightning.data.ensure import Coder, Wanted, ensure_shards
from sjd2_lightning.data.index import HELD_OUT_NAME, PROMPTS_NAME, ShardIndex
from sjd2_lightning.data.pictures import CROPPED, png_bytes
from sjd2_lightning.data.sources.coco import coco_records
from sjd2_lightning.data.sources.emoji import SOURCE as EMOJI
from sjd2_lightning.data.sources.emoji import prepare_emoji
from sjd2_lightning.data.sources.folder import folder_records
from sjd2_lightning.data.sources.parquet import block_of, read_cell, table_records
from sjd2_lightning.data.sources.record import (
    FilePictures,
    NothingUsableError,
    Reader,
    Record,
    chosen_records,
    read_stretch,
    reasons_of,
    share_of_fewest,
)
from sjd2_lightning.data.sources.tars import tar_records
from sjd2_lightning.run.stages import speak, stage

SHIPPED = "tiny"  # the model of conf/base.yaml
SPLITS = {"both": ("train", "val"), "train": ("train",), "val": ("val",)}
NUM_PROMPTS = 5000  # as many as are ever measured
NUM_HELD_OUT = 256  # pictures kept beside the shards; data.reference_dir names a folder of more
FEWEST_HELD_OUT = 8  # of small sets, but no more than a fifth of them
VAL_SHARE = 0.01
_PURPOSE = """\
Turns captioned pictures into shards for training: image codes, or raw pictures
where no tokenizer is named. A folder has NAME.txt beside each picture, or one
metadata.jsonl or metadata.csv; tars are those of img2dataset and WebDataset; hf
is parquet or save_to_disk; emoji is the embedded set. A command that was killed
goes on where it stopped."""
_EXAMPLE = """\
example:
  sjd2 prepare folder --input photos --out data/photos \\
      --model-family chameleon --model-path weights/tiny"""


def main(arguments: list[str] | None = None) -> None:
    """Command line: prepare a data set and say what is there."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    speak()
    options.name = options.name or (options.input.resolve().name if options.input else options.source)
    options.out = options.out or Path("data") / options.name
    try:
        if options.source == EMOJI:
            with stage("loading the image tokenizer"):
                coder = load_coder(options)
            indexes = prepare_emoji(
                options.out,
                coder,
                options.views,
                size=_size(options)[0],
                samples_per_shard=options.samples_per_shard,
                max_images=options.max_images,
                num_workers=options.workers,
            )
        else:
            chosen, read = chosen_of(options)  # before weights are loaded
            with stage("loading the image tokenizer"):
                coder = load_coder(options)
            indexes = prepare_source(options, coder, chosen, read)
    except ValueError as error:
        parser.exit(1, f"{error}\n")
    for name, index in indexes.items():
        skipped = f", {index.meta.num_skipped} unusable pictures left out" if index.meta.num_skipped else ""
        print(f"{options.out / name}: {index.num_samples} samples in {len(index.shards)} shards{skipped}")
    with stage("reading the configuration"):
        command = training_command(options, coder is not None)
    print(f"train on them: {command}")
    print(kept_of(options.out, indexes))


def kept_of(out: Path, indexes: dict[str, ShardIndex]) -> str:
    """How many samples were kept of how many, and where the others are named."""
    kept = sum(index.num_samples for index in indexes.values())
    skipped = {name: index.meta.num_skipped for name, index in indexes.items() if index.meta.num_skipped}
    lost = sum(skipped.values())
    named = " and ".join(str(out / name / SKIPPED_NAME) for name in skipped)
    return f"kept {kept} of {kept + lost} samples" + (f"; {lost} unusable, named in {named}" if lost else "")


def training_command(options: argparse.Namespace, has_codes: bool) -> str:
    """What to type to train on what was prepared, in quotes where a shell needs them.

    Args:
        options: those of the command line.
        has_codes: whether the shards hold codes of a model's image tokenizer, and not pictures.
    """
    is_emoji = options.source == EMOJI
    keys = [f"data={EMOJI if is_emoji else 'shards' if has_codes else 'raw'}", f"data.data_dir={options.out}"]
    if is_emoji:
        keys += [f"data.views={options.views}"]
        keys += [f"data.max_images={options.max_images}"] if options.max_images else []
    keys += model_keys(options)
    config = composed("train", [key for key in keys if key.startswith("model")])
    if list(config.model.image_size) != [*_size(options)]:
        keys.append(f"model.image_size=[{_size(options)[0]},{_size(options)[1]}]")
    train = options.out / ("codes" if has_codes else "raw") / "train"
    if train.is_dir() and (count := ShardIndex.load(train).num_samples) < config.data.batch_size:
        keys.append(f"data.batch_size={count}")
    return shlex.join([*program().split(), "train", *keys])


def model_keys(options: argparse.Namespace) -> list[str]:
    """Keys that choose the model whose image tokenizer made the codes; none where it is the shipped one's."""
    family, path = options.model_family, str(options.model_path)
    if options.tokenizer is not None:  # of which model it is, its place alone can tell
        named = [n for n, found in model_choices().items() if found["path"] == str(options.tokenizer.parent)]
        return [f"model={name}" for name in named[:1] if name != SHIPPED]
    if family is None:
        return []
    own = {name: str(found["path"]) for name, found in model_choices().items() if found["family"] == family}
    named = [name for name, place in own.items() if place == path.rstrip("/")]
    name = (named or ([SHIPPED] if SHIPPED in own else list(own)))[0]
    keys = [] if name == SHIPPED else [f"model={name}"]
    if path == "random_tiny":
        return [*keys, "model.init=random_tiny"]
    return keys if named else [*keys, f"model.path={path}"]


def build_parser() -> argparse.ArgumentParser:
    """The options of the command line."""
    parser = argparse.ArgumentParser(
        prog="sjd2 prepare",
        usage="%(prog)s SOURCE --input PATH [--out FOLDER] [options]",
        description=_PURPOSE,
        epilog=_EXAMPLE,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=27),
    )
    add = parser.add_argument
    sources = ["folder", "tars", "coco", "hf", EMOJI]
    add("source", choices=sources, metavar="SOURCE", help=f"one of {', '.join(sources)}")
    add("--input", type=Path, metavar="PATH", help="folder of pictures, tars or tables; or a tar")
    add("--annotations", type=Path, metavar="FILE", help="coco: captions_*.json")
    add("--out", type=Path, metavar="FOLDER", help="gets codes/ or raw/ (default: data/NAME)")
    add("--name", help="name in the index (default: that of --input)")
    add("--attribution", default="", metavar="TEXT", help="licence line, kept in the index")
    add("--tokenizer", type=Path, metavar="FOLDER", help="image tokenizer in diffusers' layout")
    add("--model-family", metavar="NAME", help="tokenizer of a model: chameleon, simple_ar, ...")
    add("--model-path", type=Path, metavar="FOLDER", help="its folder; random_tiny: a dry run")
    add("--image-size", type=int, nargs="+", metavar="N", help="height and width (128)")
    add("--size", dest="image_size", type=int, nargs="+", help=argparse.SUPPRESS)
    add("--split", choices=list(SPLITS), default="both", metavar="NAME", help="train, val or both (default)")
    add("--val-share", type=float, metavar="X", help="share held out (0.01, 8 pictures at least)")
    add("--captions-per-image", type=int, default=1, metavar="N", help="coco: 0 is all (default: 1)")
    add("--image-column", metavar="NAME", help="hf: column of the pictures")
    add("--caption-column", metavar="NAME", help="hf: column of the captions")
    add("--min-side", type=int, default=1, metavar="N", help="leave out smaller ones (default: 1)")
    add("--max-bad-share", type=float, default=0.1, metavar="X", help="unusable share to stop at (0.1)")
    add("--max-images", type=int, metavar="N", help="only so many pictures of each split")
    add("--seed", type=int, default=0, metavar="N", help="seed of the order (default: 0)")
    add("--views", type=int, default=4, metavar="N", help="emoji: views of a picture (default: 4)")
    add("--samples-per-shard", type=int, default=2048, metavar="N", help="(default: %(default)s)")
    add("--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes (one a core)")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="of the tokenizer; cuda: all GPUs")
    add("--encode-batch", type=int, metavar="N", help="pictures encoded at once (by their size)")
    return parser


def chosen_of(options: argparse.Namespace) -> tuple[dict[str, list[Record]], Reader]:
    """Records of the source by split, and what reads their pictures.

    Raises:
        ValueError: a split has none, or more are unusable than --max-bad-share allows.
    """
    if options.input is None:
        raise ValueError(f"the source `{options.source}` needs --input")
    _size(options)
    for name, value in (("--max-bad-share", options.max_bad_share), ("--val-share", options.val_share)):
        if value is not None and not 0 <= value <= 1:
            raise ValueError(f"{name} {value}: is a share; it must lie in [0, 1]")
    try:
        with stage("listing the pictures"):
            records, read = list_records(options)
    except NothingUsableError as error:
        raise ValueError(f"{error}{_named(options.out, error.records)}") from error
    block = block_of if options.source == "hf" else None
    if options.split != "both":
        share = float(options.split == "val")
    elif options.val_share is not None:
        share = options.val_share
    else:
        share = max(VAL_SHARE, share_of_fewest(records, FEWEST_HELD_OUT))
    chosen = {
        split: chosen_records(records, split, share, options.seed, options.max_images, block)
        for split in SPLITS[options.split]
    }
    unusable = [record for found in chosen.values() for record in found if record.problem]
    allowed, total = _allowed(options, chosen), sum(map(len, chosen.values()))
    if len(unusable) > allowed:
        raise ValueError(
            f"{options.input}: {len(unusable)} of {total} samples cannot be used and {allowed} are allowed "
            f"({reasons_of(unusable)}){_named(options.out, unusable)}; repair the source or raise "
            f"--max-bad-share {options.max_bad_share}"
        )
    if empty := [split for split, found in chosen.items() if all(record.problem for record in found)]:
        raise ValueError(
            f"{len(records)} pictures leave none for {empty[0]}: change --val-share {share:.2g}, or "
            "prepare two sources with --split train and --split val"
        )
    return chosen, read


def prepare_source(
    options: argparse.Namespace, coder: Coder | None, chosen: dict[str, list[Record]], read: Reader
) -> dict[str, ShardIndex]:
    """Shards of the chosen records, by "<kind>/<split>"."""
    root = str(options.input if options.input.is_dir() else options.input.parent)
    allowed, indexes = _allowed(options, chosen), {}
    for split, found in chosen.items():
        pictures = FilePictures(root, found, _size(options), options.min_side, read)
        wanted = Wanted(
            options.out,
            split,
            options.name,
            options.attribution,
            CROPPED,
            _size(options),
            [pictures.identity, options.min_side],
            lambda pictures=pictures: pictures,  # type: ignore[misc]
            coder,
            options.samples_per_shard,
        )
        index = ensure_shards(wanted, num_workers=options.workers, max_bad=allowed)
        indexes[f"{wanted.kind}/{split}"] = index
        allowed -= index.meta.num_skipped
    (options.out / SKIPPED_NAME).unlink(missing_ok=True)  # of a call that was refused
    if "val" in chosen:
        write_prompts(options.out / PROMPTS_NAME, chosen["val"])
        with stage("writing held-out pictures"):
            write_held_out(options.out / HELD_OUT_NAME, replace(pictures, records=_seen(chosen["val"])))
    return indexes


def _named(out: Path, unusable: Sequence[Record]) -> str:
    """Writes the samples that a refused call could not use; says where."""
    if not unusable:
        return ""
    out.mkdir(parents=True, exist_ok=True)
    facts = [({"key": record.key, "file": record.name}, record.problem) for record in unusable]
    write_skipped(out / SKIPPED_NAME, [skipped_line(*fact) for fact in facts])
    return f"; all are named in {out / SKIPPED_NAME}"


def _allowed(options: argparse.Namespace, chosen: dict[str, list[Record]]) -> int:
    """Number of unusable samples of the source, all splits together, at which the command goes on."""
    return int(options.max_bad_share * sum(map(len, chosen.values())) + 1e-9)


def write_prompts(path: Path, records: Sequence[Record]) -> None:
    """Captions of held-out pictures, one a picture, as a file for `data.prompt_file`."""
    prompts = [{"key": record.key, "prompt": record.caption} for record in _seen(records)]
    path.write_text(json.dumps(prompts[:NUM_PROMPTS], indent=1) + "\n", encoding="utf-8")


def write_held_out(folder: Path, pictures: FilePictures) -> None:
    """The first held-out pictures as they are trained on, PNG files with their captions: what drawn ones are
    measured against and shown beside. An older folder is replaced."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    lines = []
    for record in pictures.records[:NUM_HELD_OUT]:
        try:
            content = png_bytes(pictures.image(record))
        except ValueError:  # named in skipped.jsonl
            continue
        (folder / f"{record.key}.png").write_bytes(content)
        lines.append(json.dumps({"file_name": f"{record.key}.png", "caption": record.caption}))
    (folder / "metadata.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _seen(records: Sequence[Record]) -> list[Record]:
    """Usable records, the first of each picture."""
    first = {(record.file, record.start): record for record in reversed(records) if not record.problem}
    return list(reversed(first.values()))


def list_records(options: argparse.Namespace) -> tuple[list[Record], Reader]:
    """The records of the source, and what reads their pictures."""
    if options.source == "tars":
        return tar_records(options.input, options.out), read_stretch
    if options.source == "coco":
        if options.annotations is None:
            raise ValueError("the source `coco` needs --annotations captions_*.json")
        limit = options.captions_per_image or None
        return coco_records(options.input, options.annotations, limit), read_stretch
    if options.source == "hf":
        records = table_records(options.input, options.image_column, options.caption_column)
        return records, partial(read_cell, image_field=options.image_column)
    return folder_records(options.input), read_stretch


def load_coder(options: argparse.Namespace) -> Coder | None:
    """The image tokenizer that is asked for; None asks for raw shards."""
    from sjd2_lightning.models.image_codes import has_image_tokenizer
    from sjd2_lightning.models.image_tokenizer import ImageTokenizer, load_image_tokenizer
    from sjd2_lightning.models.registry import build_shrunken, load_backbone
    from sjd2_lightning.models.weights import TOKENIZER

    tokenizer: ImageTokenizer
    if options.tokenizer is not None:
        tokenizer, name = load_image_tokenizer(options.tokenizer), str(options.tokenizer)
    elif options.model_family is None:
        return None
    elif options.model_path is None:
        raise ValueError("--model-family needs --model-path, the folder of the model")
    elif str(options.model_path) == "random_tiny":
        tokenizer = build_shrunken(options.model_family).image_tokenizer
        name = f"{options.model_family}, random weights"
    else:
        name = f"{options.model_family} in {options.model_path}"
        folder = shipped(options.model_path)
        alone = folder / TOKENIZER
        if has_image_tokenizer(alone):  # beside the trunk, which need not be read then
            tokenizer = load_image_tokenizer(alone)
        else:
            tokenizer = load_backbone(options.model_family, folder).image_tokenizer
    return Coder(tokenizer, name, options.device, options.encode_batch)


def _size(options: argparse.Namespace) -> tuple[int, int]:
    sides = options.image_size or [128]
    if len(sides) > 2 or min(sides) < 1:
        raise ValueError(f"--image-size {' '.join(map(str, sides))}: give height and width, or one side")
    return sides[0], sides[-1]


if __name__ == "__main__":
    main()
