"""A headless Chromium for pages of reports, and screenshots of them.

    .venv/bin/python -m tests.tools.browser outputs/demo/report.html docs/images/report.png

writes a picture of a page for the README.
"""

from __future__ import annotations

import argparse
import base64
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
MISSING = (
    "no Chromium with its chromedriver is on the PATH: on Debian `apt-get install --no-install-recommends "
    "chromium chromium-driver`, then run `make test-browser` again"
)
_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
)
_TIMEOUT_S = 120  # a busy machine starts a browser slowly


def programs() -> tuple[str, str]:
    """Paths of the browser and its driver.

    Raises:
        LookupError: one of them is missing.
    """
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    driver = shutil.which("chromedriver")
    if browser is None or driver is None:
        raise LookupError(MISSING)
    return browser, driver


@contextmanager
def chromium(width: int = 1280, height: int = 900) -> Iterator[Any]:
    """A selenium driver with an empty profile; nothing is downloaded."""
    from selenium import webdriver

    browser, driver = programs()
    with tempfile.TemporaryDirectory() as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = browser
        for flag in (*_FLAGS, f"--user-data-dir={profile}", f"--window-size={width},{height}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        session = webdriver.Chrome(options, webdriver.ChromeService(driver))
        session.set_page_load_timeout(_TIMEOUT_S)
        session.set_script_timeout(_TIMEOUT_S)
        try:
            yield session
        finally:
            session.quit()


def emulate(session: Any, width: int, height: int = 900, *, dark: bool = False, scale: float = 1.0) -> None:
    """Size of the window, down to a phone's, and the colour scheme that the page is asked for."""
    size = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": width < 600}
    session.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
    session.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})


def screenshot(session: Any, path: Path, height: int | None = None) -> Path:
    """A PNG of the page's top `height` pixels; None takes all of it."""
    size = session.execute_script(
        "return [document.documentElement.clientWidth, document.documentElement.scrollHeight]"
    )
    clip = {"x": 0, "y": 0, "width": size[0], "height": min(height or size[1], size[1]), "scale": 1}
    taken = session.execute_cdp_cmd("Page.captureScreenshot", {"clip": clip, "captureBeyondViewport": True})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(base64.b64decode(taken["data"]))
    return path


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("page", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--width", type=int, default=1180)
    parser.add_argument("--height", type=int, default=1500, help="pixels from the top; 0 is the whole page")
    parser.add_argument("--dark", action="store_true")
    options = parser.parse_args()
    with chromium() as session:
        emulate(session, options.width, dark=options.dark)
        session.get(options.page.resolve().as_uri())
        print(screenshot(session, options.picture, options.height or None))


if __name__ == "__main__":
    main()
