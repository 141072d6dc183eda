"""A page on this machine: type a prompt, watch two methods draw it side by side.

KEY=VALUE are the keys of `sjd2 evaluate` that say what decodes: model, weights,
ckpt_path, methods, decoding, device, data.prompt_file (the prompts to begin
with). Ctrl-C ends it.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
from contextlib import suppress
from typing import TYPE_CHECKING

from sjd2_lightning.cli.evaluate import chosen_prompts, pick_device, weights_folder
from sjd2_lightning.cli.launch import composed, restrict_targets
from sjd2_lightning.config.reading import evaluate_config
from sjd2_lightning.config.runs import EvaluateConfig
from sjd2_lightning.decoding.config import BASELINE
from sjd2_lightning.run.stages import stage

if TYPE_CHECKING:
    from sjd2_lightning.playground.offer import Offer

INSTALL = (
    "sjd2 play needs Gradio: pip install 'sjd2-lightning[play]' (in a checkout: pip install -e '.[play]')"
)
# what the page does not do, and so must not ask for
_ALONE = ("metrics=none", "logger=none", "compare=[ar]")
_NUM_PROMPTS = 6  # that the page begins with
_WARM_PASSES = 3


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="sjd2 play",
        description=__doc__,
        epilog="examples:\n  sjd2 play                    the last export, else the shipped model\n"
        "  sjd2 play experiment=demo    the model of `make demo`\n"
        "  sjd2 play model=janus_pro methods.sjd2.window=64",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="keys of conf/evaluate.yaml")
    parser.add_argument("--port", type=int, help="port on 127.0.0.1 (default: the first free from 7860)")
    parser.add_argument("--no-browser", action="store_true", help="print the address and open no browser")
    parser.add_argument(
        "--share", action="store_true", help="open a public link too, through Gradio's servers"
    )
    options = parser.parse_intermixed_args(arguments)
    if importlib.util.find_spec("gradio") is None:
        parser.exit(2, f"{INSTALL}\n")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        restrict_targets()
        play(
            evaluate_config(composed("evaluate", [*_ALONE, *options.overrides])),
            port=options.port,
            share=options.share,
            browser=not options.no_browser,
        )
    except ValueError as error:
        parser.exit(2, f"{error}\n")


def play(config: EvaluateConfig, *, port: int | None, share: bool, browser: bool) -> None:
    """Serves the page until Ctrl-C.

    Args:
        config: model, weights and methods.
        port, share, browser: arguments of `tabs.serve`.

    Raises:
        ValueError: weights, prompts or the port cannot be used.
    """
    with stage("loading libraries"):
        from sjd2_lightning.playground import tabs
        from sjd2_lightning.playground.player import Player
    offer, player = build_offer(config), Player()
    warm_up(offer)
    with stage("starting the page"):
        blocks = tabs.build(offer, player)
        address = tabs.serve(blocks, port=port, share=share, browser=browser)
    print(f"{address}  (Ctrl-C ends it)", flush=True)
    try:
        blocks.block_thread()
    finally:
        player.close()


def build_offer(config: EvaluateConfig) -> Offer:
    """The model and all methods of a configuration; windows of `auto` are chosen now."""
    from sjd2_lightning.cli.build import decoding_backbone
    from sjd2_lightning.evaluation.auto_window import resolve_windows
    from sjd2_lightning.playground.offer import Offer

    weights, device = weights_folder(config), pick_device(config.device)
    backbone = decoding_backbone(config.model, weights, config.ckpt_path, device).eval()
    prompts = chosen_prompts(config.model_copy(update={"num_prompts": config.num_prompts or _NUM_PROMPTS}))
    pixels = config.model.image_size
    methods, _ = resolve_windows(
        backbone,
        config.methods,
        prompts[:1],
        backbone.layout(*pixels),
        windows=config.auto_window.windows,
        repeats=config.auto_window.repeats,
    )
    others = [name for name in config.compare if name != BASELINE] or ["sjd2"]
    texts = list(dict.fromkeys(item.prompt for item in prompts))[:_NUM_PROMPTS]
    name = f"{config.ckpt_path or weights} on {device}"
    return Offer(backbone, name, methods, others[0], pixels, texts)


def warm_up(offer: Offer) -> None:
    """Draws a part of a picture: what is made at first use, the first visitor does not wait for."""
    from sjd2_lightning.playground.frames import sides
    from sjd2_lightning.playground.offer import Wish, single
    from sjd2_lightning.playground.race import Race, StoppedError

    sampling = offer.methods[BASELINE].sampling
    wish = Wish(offer.sizes()[0], 0, sampling.temperature, sampling.guidance_scale)
    methods = {name: offer.method(name, wish) for name in (BASELINE, offer.preferred)}
    race = Race(offer.backbone, single(offer.prompts[0], 0), methods, offer.layout(wish))
    with stage("drawing a first picture"), suppress(StoppedError):
        race.run(lambda: min(runner.seen.num_passes for runner in race.runners) >= _WARM_PASSES)
    sides(race)


if __name__ == "__main__":
    main()
