"""What commands share that learn a small network from a model's own decodings."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Protocol

from sjd2_lightning.data.index import ShardIndex
from sjd2_lightning.data.reading import read_all
from sjd2_lightning.decoding import DecodingConfig, Sampling
from sjd2_lightning.decoding.config import Correction
from sjd2_lightning.evaluation.prompts import seed_of
from sjd2_lightning.models.backbone import Backbone
from sjd2_lightning.models.registry import FAMILIES, load_backbone
from sjd2_lightning.run.files import whole_file
from sjd2_lightning.run.stages import counted, stage

_SCALES = "1 is off (default: 1); of several each draws a batch in turn"


class Network(Protocol):
    """What is learnt."""

    def save(self, path: str | Path) -> None:
        """Writes a file."""


# (frozen model, captions, height and width of their pictures) -> the network, and shares of held-out drafts
# that are right: without their true neighbours, and behind them
Learn = Callable[[Backbone, list[str], tuple[int, int]], tuple[Network, tuple[float, float]]]


def batches(captions: list[str], seed: int, size: int, least: int) -> Iterator[tuple[list[str], list[int]]]:
    """Captions and seeds of images that are drawn together; says how far it is.

    Args:
        captions: at least `least`.
        seed: what seeds are made of, beside captions and their numbers.
        size: images drawn at once, if there are enough of them for `least` batches.
        least: number of batches that there are at least.
    """
    size = min(size, len(captions) // least)
    with counted("drawing", len(captions), "images") as advance:
        for start in range(0, len(captions), size):
            part = captions[start : start + size]
            keys = (f"{number} {caption}" for number, caption in enumerate(part, start))
            yield part, [seed_of(key, seed) for key in keys]
            advance(len(part))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of commands that learn from a model's own decodings."""
    parser.add_argument("shards", type=Path, help="folder of training shards of codes, for their captions")
    parser.add_argument("out", type=Path, help="safetensors file to write")
    add = parser.add_argument
    add("--weights", type=Path, required=True, metavar="FOLDER", help="folder of the model")
    add("--family", choices=sorted(FAMILIES), default="chameleon", help="its family (chameleon)")
    add("--device", default="cpu", metavar="NAME", help="cpu, cuda, cuda:1, ... (cpu)")
    add("--temperature", type=float, default=1.0, metavar="X", help="(default: 1)")
    add("--guidance-scale", type=float, nargs="+", default=[1.0], metavar="X", help=_SCALES)
    add("--window", type=int, default=32, metavar="N", help="(default: 32)")
    add("--levels", type=int, default=1, metavar="N", help="noisy levels; 0 is none (default: 1)")
    add("--num-images", type=int, default=320, metavar="N", help="images to learn from (default: 320)")


def model_and_captions(
    asked: argparse.Namespace, problems: list[str]
) -> tuple[Backbone, list[str], tuple[int, int]]:
    """The frozen model, captions, and height and width of their pictures, by `add_arguments`.

    Args:
        asked: the arguments.
        problems: what is wrong with those of one command.

    Raises:
        ValueError: for these and further problems.
    """
    found = list(problems)
    if asked.temperature == 0:
        found.append("--temperature=0: greedy decoding draws nothing that could be learnt")
    if len(asked.guidance_scale) > 1 and 1 in asked.guidance_scale:
        found.append("--guidance-scale: 1 is decoding without guidance, which goes with no other scale")
    if asked.num_images < (least := 2 * len(asked.guidance_scale)):
        found.append(
            f"--num-images={asked.num_images}: must be at least {least}, to learn from and to measure"
            + " under each scale" * (least > 2)
        )
    if found:
        raise ValueError("; ".join(found))
    with stage("checking the shards"):
        index = ShardIndex.load(asked.shards)
        index.check_codes()
    if index.meta.pixel_size is None or index.num_samples < least:
        raise ValueError(f"{asked.shards}: needs at least {least} captions and the size of their pictures")
    with stage("loading the weights"):
        backbone = load_backbone(asked.family, asked.weights).eval().to(asked.device)
    backbone.requires_grad_(False)
    index.check_model(backbone.num_codes, getattr(backbone.image_tokenizer, "identity", None))
    captions = [sample.caption for sample in islice(read_all(asked.shards), asked.num_images)]
    return backbone, captions, index.meta.pixel_size


def methods_of(asked: argparse.Namespace, corrector: str | None) -> list[DecodingConfig]:
    """The methods that draw, one for each scale of guidance, by `add_arguments`.

    Args:
        asked: the arguments.
        corrector: weights of what corrects its drafts, see `Correction`.
    """
    samplings = [Sampling(asked.temperature, guidance_scale=scale) for scale in asked.guidance_scale]
    correction = Correction(corrector)
    return [
        DecodingConfig("sjd2", asked.window, asked.levels, sampling=sampling, corrector=correction)
        for sampling in samplings
    ]


def write_learnt(
    parser: argparse.ArgumentParser, asked: argparse.Namespace, problems: list[str], learn: Learn
) -> tuple[float, float]:
    """Learns a network and writes it; ends the command with one line where that cannot be.

    Args:
        parser: the command's.
        asked: its arguments.
        problems: what is wrong with those that only it has.
        learn: what learns.

    Returns:
        The shares that `learn` measures.
    """
    try:
        network, shares = learn(*model_and_captions(asked, problems))
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(asked.out) as path:
            network.save(path)
    except (ValueError, OSError) as error:
        parser.exit(1, f"{error}\n")
    return shares
