"""Trains what corrects drafts on a model's own decodings.

The model stays as it is. Images are drawn by sjd2, from the paper's noise, for
captions of training shards. Give the sampling, window and levels that the model
will be decoded with. As corrector.safetensors in the model's folder the result
is its own; elsewhere it is for methods.sjd2.corrector.weights.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import cycle

import torch

from sjd2_lightning.cli.own_decodings import add_arguments, batches, methods_of, write_learnt
from sjd2_lightning.decoding import DecodingConfig
from sjd2_lightning.models.backbone import Backbone
from sjd2_lightning.models.draft_corrector import DraftCorrector
from sjd2_lightning.run.stages import counted, speak
from sjd2_lightning.training.recipes.corrections import CorrectorRecipe, Learner, traces_of
from sjd2_lightning.training.recipes.fitting import divided


def learnt(
    backbone: Backbone,
    captions: list[str],
    methods: Sequence[DecodingConfig],
    pixels: tuple[int, int],
    recipe: CorrectorRecipe,
    batch: int = 8,
) -> tuple[DraftCorrector, tuple[float, float]]:
    """A corrector that was trained on decodings of captions, and shares of held-out drafts that are right.

    Args:
        backbone: the model, in eval mode.
        captions: at least two for each method; each gives one image, and their last batches measure.
        methods: those that draw, a batch each in turn, at one temperature; a corrector of theirs is what
            training goes on from.
        pixels: height and width of the images.
        recipe: how it is trained.
        batch: images drawn at once, if there are enough for two batches by each method.
    """
    layout = backbone.layout(*pixels)
    drawn = batches(captions, recipe.seed, batch, 2 * len(methods))
    parts = [
        traces_of(backbone, part, seeds, method, layout, recipe.per_image)
        for method, (part, seeds) in zip(cycle(methods), drawn, strict=False)
    ]
    train, val = divided(parts, recipe.val_share)
    torch.manual_seed(recipe.seed)
    start = methods[0].corrector.weights
    if start is None:
        corrector = DraftCorrector(backbone.hidden_size, recipe.width)
    else:
        corrector = DraftCorrector.load(start, backbone.hidden_size).requires_grad_(True)
    corrector = corrector.to(backbone.device)
    learner = Learner(backbone, methods[0].sampling.temperature, corrector)
    with counted("training", recipe.steps, "steps") as advance:
        learner.fit(train, recipe, advance)
    return corrector, learner.right(val)


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
    methods = methods_of(asked, asked.start)
    recipe = CorrectorRecipe(width=asked.width, steps=asked.steps, seed=asked.seed)
    alone, right = write_learnt(
        parser,
        asked,
        [line for method in methods for line in method.problems()] + recipe.problems(),
        lambda backbone, captions, pixels: learnt(backbone, captions, methods, pixels, recipe),
    )
    print(
        f"{asked.out}: of held-out drafts {right:.1%} are right beside their true neighbours, {alone:.1%} "
        f"without; decode with methods.sjd2.corrector.weights={asked.out}"
    )


if __name__ == "__main__":
    main()
