"""The page of `sjd2 play` in headless Chromium: type, draw, watch, stop, compare, scrub, on every screen."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from urllib.request import urlopen

import pytest

from benchmarks.shipped import shipped_pixels
from sjd2_lightning.models.registry import load_backbone
from sjd2_lightning.playground.offer import Offer
from sjd2_lightning.playground.player import Player
from sjd2_lightning.playground.race import Runner
from tests.tools.browser import emulate, screenshot
from tests.tools.play_page import SHOWN, drawn, methods, say, wait_for
from tests.tools.source import REPO

pytestmark = pytest.mark.browser
SHOTS = REPO / "outputs" / "browser"  # kept by CI


@pytest.fixture(scope="module")
def page(tiny_weights) -> Iterator[SimpleNamespace]:
    """The page's address and what lies behind it; the server runs in this process."""
    from sjd2_lightning.playground import tabs

    offer = Offer(
        load_backbone("chameleon", tiny_weights).eval(),
        "weights/tiny on cpu",
        methods(),
        "sjd2",
        (shipped_pixels(), shipped_pixels()),
        ["three candles", "a pig", "a key left of a duck"],
    )
    player = Player()
    blocks = tabs.build(offer, player)
    address = tabs.serve(blocks, port=None, share=False, browser=False)
    yield SimpleNamespace(address=address, player=player, blocks=blocks, offer=offer)
    blocks.close()
    player.close()


@pytest.fixture
def session(browser, page):
    """The page as a wide light screen opens it; afterwards: no console errors, nothing from other hosts."""
    emulate(browser, 1180)
    browser.get(page.address)
    wait_for(browser, lambda: browser.execute_script("return !!document.getElementById('draw')"))
    yield browser
    hosts = browser.execute_script(
        "return [...new Set(performance.getEntriesByType('resource').map((e) => new URL(e.name).host))]"
    )
    assert set(hosts) <= {page.address.split("/")[2], ""}, "data: URLs have no host"
    errors = [entry["message"] for entry in browser.get_log("browser") if entry["level"] != "INFO"]
    assert errors == []


@pytest.fixture
def slow(monkeypatch):
    """Passes of 30 ms and more, so that a drawing lasts while it is looked at."""
    step = Runner.step
    monkeypatch.setattr(Runner, "step", lambda self: (time.sleep(0.03), step(self))[1])


def status(session: Any) -> str:
    return session.execute_script("return document.getElementById('status').innerText.trim()")


def open_tab(session: Any, place: int) -> None:
    session.execute_script("document.querySelectorAll('button[role=tab]')[arguments[0]].click()", place)


def test_pixels_appear_while_both_draw_and_the_images_are_the_same(session):
    say(session, "prompt", "a red heart")
    start = time.monotonic()
    session.execute_script("document.getElementById('draw').click()")
    wait_for(session, lambda: max(drawn(session)) > 0)
    assert time.monotonic() - start < 10, "of 2 s on an idle machine, see benchmarks/play.py"
    seen: dict[tuple[int, ...], str] = {}
    while "image" not in status(session):
        seen[tuple(drawn(session))] = session.execute_script(f"return {SHOWN}[1].querySelector('img').src")
        assert time.monotonic() - start < 60
    passes = list(seen)
    assert len(passes) >= 4
    assert passes == sorted(passes)
    assert len(set(seen.values())) >= 4, "the picture changes with the passes"
    assert status(session).startswith("Same image: all 256 tokens are equal. sjd2 took ")
    assert drawn(session)[0] == 271
    assert drawn(session)[1] < 200


def test_stop_ends_it_and_the_next_prompt_is_drawn(session, page, slow):
    session.execute_script("document.getElementById('draw').click()")
    wait_for(session, lambda: min(drawn(session)) > 0)
    screenshot(session, SHOTS / "play_live.png", 900)
    session.execute_script("document.getElementById('stop').click()")
    wait_for(session, lambda: status(session) == "Stopped.")
    wait_for(session, lambda: not page.player._runs)
    after = drawn(session)
    time.sleep(0.5)
    assert drawn(session) == after
    say(session, "prompt", "cloud")
    session.execute_script("document.getElementById('draw').click()")
    wait_for(session, lambda: 0 < drawn(session)[0] < after[0] + 20)
    session.execute_script("document.getElementById('stop').click()")
    wait_for(session, lambda: status(session) == "Stopped.")


def test_closing_the_page_frees_the_device(session, page, slow):
    session.execute_script("document.getElementById('draw').click()")
    wait_for(session, lambda: len(page.player._runs) == 1)
    session.get(page.address)
    wait_for(session, lambda: not page.player._runs)
    session.get_log("browser")  # the page that was left says that its connection was


def test_a_second_visitor_waits_and_then_draws(session, page, slow):
    first = session.current_window_handle
    session.execute_script("document.getElementById('draw').click()")
    wait_for(session, lambda: max(drawn(session)) > 0)
    session.switch_to.new_window("tab")
    session.get(page.address)
    wait_for(session, lambda: session.execute_script("return !!document.getElementById('draw')"))
    session.execute_script("document.getElementById('draw').click()")
    wait_for(session, lambda: status(session) == "Waiting for its turn; drawings before it: 1.")
    time.sleep(0.5)
    assert drawn(session) == [0, 0]
    assert len(page.player._runs) == 2
    screenshot(session, SHOTS / "play_waiting.png", 900)
    second = session.current_window_handle
    session.switch_to.window(first)
    session.execute_script("document.getElementById('stop').click()")
    session.switch_to.window(second)
    wait_for(session, lambda: max(drawn(session)) > 0)
    session.execute_script("document.getElementById('stop').click()")
    wait_for(session, lambda: status(session) == "Stopped.")
    session.close()
    session.switch_to.window(first)


def test_what_is_wrong_is_said_on_the_page(session):
    say(session, "prompt", "  ")
    session.execute_script("document.getElementById('draw').click()")
    wait_for(session, lambda: status(session) == "Type what is to be drawn, at least one word.")


def test_two_methods_on_a_list_end_in_a_gallery(session):
    open_tab(session, 1)
    say(session, "prompts", "red heart\n<b>cloud</b>\n")
    session.execute_script("document.getElementById('compare').click()")
    said = "return document.getElementById('summary').innerText"
    wait_for(session, lambda: "2 of 2 prompts." in session.execute_script(said))
    assert "Same image: 2 of 2." in session.execute_script(said)
    titles = session.execute_script(
        "return [...document.querySelectorAll('.gallery h3')].map((e) => e.innerText)"
    )
    assert titles == ["red heart same image", "<b>cloud</b> same image"]
    widths = session.execute_script(
        "return [...document.querySelectorAll('.gallery img')].map((i) => i.naturalWidth)"
    )
    assert widths == [128] * 4
    screenshot(session, SHOTS / "play_compare.png")


def test_a_finished_decoding_is_scrubbed_pass_by_pass(session):
    session.execute_script("document.getElementById('draw').click()")
    wait_for(session, lambda: "Same image" in status(session))
    open_tab(session, 2)
    said = "return document.getElementById('moment').innerText"
    wait_for(session, lambda: "After pass 271 of 271." in session.execute_script(said))
    pictures = {session.execute_script("return document.querySelectorAll('#moment img')[1].src")}
    for place in (4, 12):
        session.execute_script(
            "const input = document.querySelector('#scrubber input[type=range]'); input.value = arguments[0];"
            "input.dispatchEvent(new Event('input', {bubbles: true}));"
            "input.dispatchEvent(new Event('pointerup', {bubbles: true}))",
            place,
        )
        wait_for(session, lambda at=place: f"After pass {at} of 271." in session.execute_script(said))
        pictures.add(session.execute_script("return document.querySelectorAll('#moment img')[1].src"))
    assert len(pictures) == 3
    screenshot(session, SHOTS / "play_scrub.png", 900)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 768, 1180, 1920])
def test_it_fits_every_screen(session, width, dark):
    emulate(session, width, dark=dark)
    for tab in range(3):
        open_tab(session, tab)
        time.sleep(0.3)
        wide = session.execute_script("return document.documentElement.scrollWidth")
        assert wide <= width, tab
        screenshot(session, SHOTS / f"play_{width}_{'dark' if dark else 'light'}_{tab}.png")
    ground = session.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") != dark


def test_a_taken_port_is_named(page):
    from sjd2_lightning.playground import tabs

    blocks = tabs.build(page.offer, page.player)
    port = int(page.address.strip("/").rpartition(":")[2])
    with pytest.raises(ValueError, match=f"--port {port}: "):
        tabs.serve(blocks, port=port, share=False, browser=False)


def test_the_command_serves_the_page_until_it_is_interrupted():
    command = [sys.executable, "-m", "sjd2_lightning", "play", "--no-browser", "weights=model"]
    with subprocess.Popen(
        command,
        cwd=REPO,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # what a shell starts in the background, tests included, ignores interrupts
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as ran:
        address = ran.stdout.readline().split()[0]
        with urlopen(address) as answer:
            assert "sjd2 play" in answer.read().decode()
        ran.send_signal(signal.SIGINT)
        _, said = ran.communicate(timeout=60)
    assert ran.returncode == 0, said
    assert "Traceback" not in said


def test_only_this_machine_is_served_and_nothing_is_reported(page):
    from gradio import analytics

    assert page.address.startswith("http://127.0.0.1:")
    assert page.blocks.server_name == "127.0.0.1"
    assert not page.blocks.analytics_enabled
    assert not analytics.analytics_enabled()
    assert not page.blocks.share
    assert page.blocks.share_url is None
