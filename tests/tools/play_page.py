"""The page of `sjd2 play`, driven in a browser; also takes its picture for the README.

    .venv/bin/python -m tests.tools.play_page docs/images/play.png --prompt "grinning face" experiment=demo

takes it after `make demo`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sjd2_lightning.cli.launch import composed
from sjd2_lightning.cli.play import build_offer, warm_up
from sjd2_lightning.config.reading import evaluate_config
from sjd2_lightning.decoding.config import DecodingConfig
from sjd2_lightning.playground.player import Player
from tests.tools.browser import chromium, emulate, screenshot

SHOWN = "document.querySelectorAll('#pictures figure')"
_LATEST_S = 60  # a busy machine is slow


def methods() -> dict[str, DecodingConfig]:
    """The methods of conf/."""
    keys = ["metrics=none", "logger=none", "weights=model"]
    return dict(evaluate_config(composed("evaluate", keys)).methods)


def wait_for(session: Any, happened: Callable[[], object]) -> None:
    """Waits until something is the case on the page."""
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(session, _LATEST_S, poll_frequency=0.05).until(lambda _: happened())


def drawn(session: Any) -> list[int]:
    """Passes that each picture of the first tab shows."""
    return session.execute_script(f"return [...{SHOWN}].map((f) => Number(f.dataset.passes))")


def say(session: Any, field: str, text: str) -> None:
    """Puts a text into a field as typing does."""
    session.execute_script(
        "const area = document.querySelector(`#${arguments[0]} textarea, #${arguments[0]} input`);"
        "area.value = arguments[1]; area.dispatchEvent(new Event('input', {bubbles: true}))",
        field,
        text,
    )


def main() -> None:
    """Command line."""
    from sjd2_lightning.playground import tabs

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("picture", type=Path)
    parser.add_argument("--prompt", default="cloud")
    parser.add_argument("--share-drawn", type=float, default=0.25, help="of the plain image, at the picture")
    parser.add_argument("overrides", nargs="*", help="keys of conf/evaluate.yaml")
    options = parser.parse_intermixed_args()
    keys = ["metrics=none", "logger=none", "compare=[ar]", *options.overrides]
    offer, player = build_offer(evaluate_config(composed("evaluate", keys))), Player()
    warm_up(offer)
    blocks = tabs.build(offer, player)
    try:
        with chromium() as session:
            emulate(session, 1180, scale=1)
            session.get(tabs.serve(blocks, port=None, share=False, browser=False))
            wait_for(session, lambda: session.execute_script("return !!document.getElementById('draw')"))
            say(session, "prompt", options.prompt)
            session.execute_script("document.getElementById('draw').click()")
            most = offer.backbone.layout(*offer.pixels).num_slots
            wait_for(session, lambda: drawn(session)[0] > options.share_drawn * most)
            print(screenshot(session, options.picture, 900))
            time.sleep(0.1)
    finally:
        player.close()
        blocks.close()


if __name__ == "__main__":
    main()
