"""Trains what guesses slots that enter the window on a model's own decodings.

The model stays as it is. Images are drawn by sjd2, from the paper's noise, for
captions of training shards. Give the sampling, window, levels and corrector
that the model will be decoded with. The result is for
methods.sjd2.drafter.weights.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import cycle

import torch

from sjd2_lightning.cli.own_decodings import add_arguments, batches, methods_of, write_learnt
from sjd2_lightning.decoding import DecodingConfig
from sjd2_lightning.decoding.config import OWN
from sjd2_lightning.models.backbone import Backbone
from sjd2_lightning.models.block_drafter import BlockDrafter
from sjd2_lightning.run.stages import counted, speak
from sjd2_lightning.training.recipes.drafting import BlockLearner, DrafterRecipe, windows_of
from sjd2_lightning.training.recipes.fitting import divided


def learnt(
    backbone: Backbone,
    captions: list[str],
    methods: Sequence[DecodingConfig],
    pixels: tuple[int, int],
    recipe: DrafterRecipe,
    batch: int = 8,
) -> tuple[BlockDrafter, tuple[float, float]]:
    """A drafter that was trained on decodings of captions, and shares of held-out guesses that are right.

    Args:
        backbone: the model, in eval mode.
        captions: at least two for each method; each gives one image, and their last batches measure.
        methods: those that draw, a batch each in turn, at one temperature.
        pixels: height and width of the images.
        recipe: how it is trained.
        batch: images drawn at once, if there are enough for two batches by each method.

    Returns:
        The drafter, and shares of slots that entered: behind no left neighbour, behind the true one.
    """
    layout = backbone.layout(*pixels)
    drawn = batches(captions, recipe.seed, batch, 2 * len(methods))
    parts = [
        windows_of(backbone, part, seeds, method, layout, recipe.per_image)
        for method, (part, seeds) in zip(cycle(methods), drawn, strict=False)
    ]
    train, val = divided(parts, recipe.val_share)
    torch.manual_seed(recipe.seed)
    drafter = BlockDrafter(backbone.hidden_size, recipe.width, recipe.layers).to(backbone.device)
    learner = BlockLearner(backbone, methods[0].sampling.temperature, drafter)
    with counted("training", recipe.steps, "steps") as advance:
        learner.fit(train, recipe, advance)
    return drafter, learner.right(val)


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="sjd2 drafter",
        usage="%(prog)s SHARDS OUT --weights FOLDER [options]",
        description=__doc__,
        epilog="example:\n  sjd2 drafter data/scenes_small/codes/train drafter.safetensors \\\n"
        "    --weights weights/tiny --temperature 0.9 --guidance-scale 1.5",
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=25),
    )
    plain = DrafterRecipe()
    add_arguments(parser)
    add = parser.add_argument
    add("--corrector", default=OWN, metavar="FILE", help="own: the model's, if any (own); none; or a file")
    add("--width", type=int, default=plain.width, metavar="N", help=f"units (default: {plain.width})")
    add("--layers", type=int, default=plain.layers, metavar="N", help=f"(default: {plain.layers})")
    add("--steps", type=int, default=plain.steps, metavar="N", help=f"(default: {plain.steps})")
    add("--seed", type=int, default=0, metavar="N", help="(default: 0)")
    asked = parser.parse_args(arguments)
    speak()
    methods = methods_of(asked, None if asked.corrector == "none" else asked.corrector)
    recipe = DrafterRecipe(asked.width, asked.layers, asked.steps, seed=asked.seed)
    alone, right = write_learnt(
        parser,
        asked,
        [line for method in methods for line in method.problems()] + recipe.problems(),
        lambda backbone, captions, pixels: learnt(backbone, captions, methods, pixels, recipe),
    )
    print(
        f"{asked.out}: of held-out guesses {right:.1%} are right behind their true neighbours, {alone:.1%} "
        f"behind none; decode with methods.sjd2.drafter.weights={asked.out}"
    )


if __name__ == "__main__":
    main()
