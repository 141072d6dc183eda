"""What the page of `sjd2 play` costs and how far it lags behind the decoder, in a headless Chromium.

    .venv/bin/python -m benchmarks.play --json outputs/play.json

Three figures, on an otherwise idle machine:

- first token: seconds from pressing the button to the first picture in the page that shows a pass;
- lag: the longest time, over a whole drawing, for which a pass was finished and the page showed only earlier
  ones;
- cost: seconds that a race of two methods takes while it is watched, over those that it takes alone, in turn;
  and the same of the processors' seconds, which other programs on the machine hardly change.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console

from sjd2_lightning.cli.launch import composed
from sjd2_lightning.cli.play import build_offer, warm_up
from sjd2_lightning.config.reading import evaluate_config
from sjd2_lightning.playground.offer import Offer, Wish, single
from sjd2_lightning.playground.player import Player
from sjd2_lightning.playground.race import Race, Runner

# notes what each picture shows, at the moment at which it is on the page
WATCH = """
const area = document.getElementById('pictures'); window.shown = [];
const note = () => { const passes = [...area.querySelectorAll('figure')].map((f) => Number(f.dataset.passes));
  window.shown.push([Date.now() / 1000, passes]); };
new MutationObserver(note).observe(area, {childList: true, subtree: true, attributes: true});
window.pressed = Date.now() / 1000; document.getElementById('draw').click();
"""
STATUS = "return document.getElementById('status').innerText"


@contextmanager
def finished_passes() -> Iterator[dict[str, list[float]]]:
    """When each pass of each method ended, as the clock says it."""
    step, found = Runner.step, {}

    def noted(runner: Runner) -> None:
        step(runner)
        found.setdefault(runner.name, []).append(time.time())

    Runner.step = noted
    try:
        yield found
    finally:
        Runner.step = step


def lags(shown: list[tuple[float, list[int]]], finished: list[list[float]]) -> list[float]:
    """For each time that the page changed, how long before a pass had ended that it did not show until then.

    Args:
        shown: moments, and the passes that the page showed of each method from then on.
        finished: when each pass of each method ended.
    """
    found = []
    for (_, before), (moment, after) in pairwise(shown):
        missed = [
            ends[old]
            for old, new, ends in zip(before, after, finished, strict=True)
            if new > old and old < len(ends)
        ]
        found += [moment - min(missed)] if missed else []
    return found


def race_of(offer: Offer, prompt: str) -> Race:
    """A race as the page starts it."""
    sampling = offer.methods["ar"].sampling
    wish = Wish(offer.sizes()[0], 0, sampling.temperature, sampling.guidance_scale)
    methods = {name: offer.method(name, wish) for name in ("ar", offer.preferred)}
    return Race(offer.backbone, single(prompt, 0), methods, offer.layout(wish))


def cost(offer: Offer, player: Player, repeats: int) -> dict[str, float]:
    """Seconds of a race alone and watched, medians, in turn."""
    found: dict[str, list[float]] = {}

    def noted(name: str, draw: Callable[[Race], object]) -> None:
        race, wall, work = race_of(offer, offer.prompts[0]), time.perf_counter(), time.process_time()
        draw(race)
        found.setdefault(f"{name}_seconds", []).append(time.perf_counter() - wall)
        found.setdefault(f"{name}_processor_seconds", []).append(time.process_time() - work)

    for _ in range(repeats):
        noted("alone", lambda race: race.run(lambda: False))
        noted("watched", lambda race: found.setdefault("frames", []).append(count(player, race)))
    middle = {name: statistics.median(values) for name, values in found.items()}
    slower = middle["watched_seconds"] / middle["alone_seconds"] - 1
    more_work = middle["watched_processor_seconds"] / middle["alone_processor_seconds"] - 1
    return {**middle, "slower": slower, "more_work": more_work}


def count(player: Player, race: Race) -> int:
    """Number of frames of a race, each looked at for no time."""
    return sum(1 for _ in player.watch("cost", race))


def in_browser(offer: Offer, player: Player, repeats: int) -> dict[str, float]:
    """First token and lag, as a browser sees them."""
    from sjd2_lightning.playground import tabs
    from tests.tools.browser import chromium
    from tests.tools.play_page import wait_for

    blocks = tabs.build(offer, player)
    firsts, worst, usual = [], [], []
    try:
        address = tabs.serve(blocks, port=None, share=False, browser=False)
        with chromium() as session:
            for _ in range(repeats):
                session.get(address)
                wait_for(session, lambda: session.execute_script("return !!document.getElementById('draw')"))
                with finished_passes() as ended:
                    session.execute_script(WATCH)
                    wait_for(session, lambda: "tokens are equal" in session.execute_script(STATUS))
                shown = session.execute_script("return window.shown")
                firsts.append(
                    next(moment for moment, passes in shown if max(passes) > 0)
                    - session.execute_script("return window.pressed")
                )
                pressed = [(0.0, [0, 0]), *((moment, passes) for moment, passes in shown)]
                found = lags(pressed, [ended["ar"], ended[offer.preferred]])
                worst.append(max(found))
                usual.append(statistics.median(found))
    finally:
        blocks.close()
    return {"first_token_seconds": max(firsts), "lag_seconds": max(worst), "usual_lag_seconds": max(usual)}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All figures."""
    keys = ["metrics=none", "logger=none", "compare=[ar]", *options.overrides]
    offer, player = build_offer(evaluate_config(composed("evaluate", keys))), Player()
    warm_up(offer)
    try:
        found: dict[str, Any] = {"model": offer.name, "cost": cost(offer, player, options.repeats)}
        if not options.no_browser:
            found["page"] = in_browser(offer, player, options.repeats)
    finally:
        player.close()
    return found


def command_line() -> argparse.ArgumentParser:
    """The arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-browser", action="store_true", help="measure the cost alone")
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*", help="keys of conf/evaluate.yaml")
    return parser


def main() -> None:
    """Command line."""
    options = command_line().parse_intermixed_args()
    found = measure(options)
    Console().print_json(data=found)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
