"""Trains what corrects drafts on a model's own decodings.

The model stays as it is. Images are drawn by sjd2, from the paper's noise, for
captions of training shards. Give the sampling, window and levels that the model
will be decoded with. As corrector.safetensors in the model's folder the result
is its own; elsewhere it is for methods.sjd2.corrector.weights.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch

from sjd2_lightning.data.index import ShardIndex
from sjd2_lightning.data.reading import read_all
from sjd2_lightning.decoding import DecodingConfig, Sampling
from sjd2_lightning.decoding.config import Correction
from sjd2_lightning.evaluation.prompts import seed_of
from sjd2_lightning.models.backbone import Backbone
from sjd2_lightning.models.draft_corrector import DraftCorrector
from sjd2_lightning.models.registry import FAMILIES, load_backbone
from sjd2_lightning.run.files import whole_file
from sjd2_lightning.run.stages import counted, speak, stage
from sjd2_lightning.training.recipes.corrections import CorrectorRecipe, Learner, Traces, traces_of


def learnt(
    backbone: Backbone,
    captions: list[str],
    config: DecodingConfig,
    pixels: tuple[int, int],
    recipe: CorrectorRecipe,
    batch: int = 8,
) -> tuple[DraftCorrector, tuple[float, float]]:
    """A corrector that was trained on decodings of captions, and shares of held-out drafts that are right.

    Args:
        backbone: the model, in eval mode.
        captions: at least two; one image is drawn for each, and the last batches of them measure.
        config: the method that draws; a corrector of its own is what training goes on from.
        pixels: height and width of the images.
        recipe: how it is trained.
        batch: images drawn at once, if there are twice as many.
    """
    layout = backbone.layout(*pixels)
    parts = [
        traces_of(backbone, part, seeds, config, layout, recipe.per_image)
        for part, seeds in batches(captions, recipe.seed, batch)
    ]
    num_train = min(len(parts) - 1, round((1 - recipe.val_share) * len(parts)))
    train, val = (
        Traces(*map(torch.cat, zip(*some, strict=True))) for some in (parts[:num_train], parts[num_train:])
    )
    torch.manual_seed(recipe.seed)
    if config.corrector.weights is None:
        corrector = DraftCorrector(backbone.hidden_size, recipe.width)
    else:
        corrector = DraftCorrector.load(config.corrector.weights, backbone.hidden_size).requires_grad_(True)
    corrector = corrector.to(backbone.device)
    learner = Learner(backbone, config.sampling.temperature, corrector)
    with counted("training", recipe.steps, "steps") as advance:
        learner.fit(train, recipe, advance)
    return corrector, learner.right(val)


def batches(captions: list[str], seed: int, size: int) -> Iterator[tuple[list[str], list[int]]]:
    """Captions and seeds of images that are drawn together, two batches at least; says how far it is.

    Args:
        captions: at least two.
        seed: what seeds are made of, beside captions and their numbers.
        size: images drawn at once, if there are twice as many.
    """
    size = min(size, len(captions) // 2)
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
    add("--guidance-scale", type=float, default=1.0, metavar="X", help="1 is off (default: 1)")
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
    if asked.num_images < 2:
        found.append(f"--num-images={asked.num_images}: must be at least 2, to learn from and to measure")
    if found:
        raise ValueError("; ".join(found))
    with stage("checking the shards"):
        index = ShardIndex.load(asked.shards)
        index.check_codes()
    if index.meta.pixel_size is None or index.num_samples < 2:
        raise ValueError(f"{asked.shards}: needs at least 2 captions and the size of their pictures")
    with stage("loading the weights"):
        backbone = load_backbone(asked.family, asked.weights).eval().to(asked.device)
    backbone.requires_grad_(False)
    index.check_model(backbone.num_codes, getattr(backbone.image_tokenizer, "identity", None))
    captions = [sample.caption for sample in islice(read_all(asked.shards), asked.num_images)]
    return backbone, captions, index.meta.pixel_size


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="sjd2 corrector",
        usage="%(prog)s SHARDS OUT --weights FOLDER [options]",
        description=__doc__,
        epilog="example:\n  sjd2 corrector data/scenes_small/codes/train corrector.safetensors \\\n"
        "    --weights weights/tiny --temperature 0.9 --guidance-scale 1.5",
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=25),
    )
    plain = CorrectorRecipe()
    add_arguments(parser)
    add = parser.add_argument
    add("--start", metavar="FILE", help="a corrector that draws and is trained on")
    add("--width", type=int, default=plain.width, metavar="N", help=f"units (default: {plain.width})")
    add("--steps", type=int, default=plain.steps, metavar="N", help=f"(default: {plain.steps})")
    add("--seed", type=int, default=0, metavar="N", help="(default: 0)")
    asked = parser.parse_args(arguments)
    speak()
    sampling = Sampling(asked.temperature, guidance_scale=asked.guidance_scale)
    corrector = Correction(asked.start)
    config = DecodingConfig("sjd2", asked.window, asked.levels, sampling=sampling, corrector=corrector)
    recipe = CorrectorRecipe(width=asked.width, steps=asked.steps, seed=asked.seed)
    try:
        backbone, captions, pixels = model_and_captions(asked, config.problems() + recipe.problems())
        network, (alone, right) = learnt(backbone, captions, config, pixels, recipe)
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(asked.out) as path:
            network.save(path)
    except (ValueError, OSError) as error:
        parser.exit(1, f"{error}\n")
    print(
        f"{asked.out}: of held-out drafts {right:.1%} are right behind their true neighbours, {alone:.1%} "
        f"without; decode with methods.sjd2.corrector.weights={asked.out}"
    )


if __name__ == "__main__":
    main()
