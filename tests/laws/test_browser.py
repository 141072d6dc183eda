"""The page in headless Chromium: it loads without errors, its controls work, it fits every screen."""

from pathlib import Path

import pytest

from sjd2_lightning.evaluation.prompts import PromptItem
from sjd2_lightning.report.observe import observe
from sjd2_lightning.report.write import write_report
from sjd2_lightning.run.provenance import collect_provenance
from tests.tools.browser import emulate, screenshot
from tests.tools.small_evaluation import METHODS, SIDE, evaluate, small_backbone
from tests.tools.small_evaluation import PROMPTS as FEW
from tests.tools.source import REPO

pytestmark = pytest.mark.browser
PROMPTS = (*FEW, *(PromptItem(f"p{number}", f"red mat {number}", number) for number in range(5, 10)))
NUM_OPEN = 8
SHOTS = REPO / "outputs" / "browser"  # kept by CI


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    backbone = small_backbone()
    result = evaluate(tmp_path_factory.mktemp("small_evaluation"), prompts=PROMPTS)
    provenance = collect_provenance(backbone, {"window": 6}, {item.key: item.seed for item in PROMPTS})
    seen = observe(
        backbone,
        result,
        backbone.layout(SIDE, SIDE),
        num_trajectories=2,
        num_frames=12,
        cost_windows=(1, 4),
    )
    return write_report(result, provenance, seen, tmp_path_factory.mktemp("page")).html


@pytest.fixture
def session(browser, page):
    """The page as a wide light screen shows it first."""
    emulate(browser, 1180)
    browser.get(page.as_uri())
    browser.execute_async_script(
        "const done = arguments[0];"
        "Promise.all([...document.images].map((i) => i.decode().catch(() => 0)))"
        ".then(() => setTimeout(done, 50))"
    )
    yield browser
    errors = [entry["message"] for entry in browser.get_log("browser") if entry["level"] != "INFO"]
    assert errors == []


def picture(session, place: int) -> str:
    """What the canvas of a method shows."""
    return session.execute_script(f"return document.querySelectorAll('.tile canvas')[{place}].toDataURL()")


def move(session, value: int) -> str:
    """Moves the slider as a reader does, and returns what the page says about the moment."""
    return session.execute_script(
        "const slider = document.getElementById('replay-slider'); slider.value = arguments[0];"
        "slider.dispatchEvent(new Event('input', {bubbles: true}));"
        "return document.getElementById('replay-time').textContent",
        value,
    )


def test_every_image_loads_and_nothing_comes_from_elsewhere(session):
    images = session.execute_script(
        "return [...document.querySelectorAll('main img')].map((i) => [i.alt, i.naturalWidth])"
    )
    assert len(images) == (2 * len(METHODS) + 1) * len(PROMPTS)
    assert all(alt and width > 0 for alt, width in images)
    fetched = session.execute_script("return performance.getEntriesByType('resource').map((e) => e.name)")
    assert [name for name in fetched if not name.startswith("data:")] == []
    unlabelled = session.execute_script(
        "return [...document.querySelectorAll('button, select, input, svg, canvas')].filter((e) => "
        "!(e.textContent.trim() || e.getAttribute('aria-label') || (e.labels && e.labels.length)))"
        ".map((e) => e.outerHTML)"
    )
    assert unlabelled == []


def test_the_scrubber_shows_every_moment(session):
    assert move(session, 0) == "pass 0 of 19"
    empty = [picture(session, place) for place in range(len(METHODS))]
    assert len(set(empty)) == 1
    shown = []
    for moment in (3, 6, 19):
        assert move(session, moment) == f"pass {moment} of 19"
        shown.append([picture(session, place) for place in range(len(METHODS))])
    for early, late in zip([empty, *shown], shown, strict=False):
        assert early[0] != late[0]
        assert early[2] != late[2]
    texts = session.execute_script(
        "return [...document.querySelectorAll('.tile figcaption')].map((e) => e.innerText)"
    )
    assert all("done in" in text for text in texts)


def test_the_replay_plays_and_keys_move_it(session):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    slider = session.find_element(By.ID, "replay-slider")
    move(session, 2)
    slider.send_keys(Keys.ARROW_RIGHT)
    assert slider.get_attribute("aria-valuetext") == "pass 3 of 19"
    play = session.find_element(By.ID, "replay-play")
    play.send_keys(Keys.ENTER)
    assert play.text == "Pause"
    WebDriverWait(session, 60).until(lambda _: int(slider.get_property("value")) >= 5)
    play.send_keys(Keys.ENTER)
    assert play.text == "Play"
    session.execute_script("document.querySelector('input[value=seconds]').click()")
    assert move(session, 1000).endswith(" s")
    session.execute_script(
        "const choice = document.getElementById('replay-prompt'); choice.value = 1;"
        "choice.dispatchEvent(new Event('change'))"
    )
    assert session.execute_script("return document.querySelectorAll('.tile').length") == len(METHODS)


def test_two_methods_side_by_side(session):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import Select

    session.find_element(By.CSS_SELECTOR, '.open[data-prompt="1"][data-method="2"]').send_keys(Keys.ENTER)
    captions = session.execute_script("return data.prompts.map((prompt) => prompt.caption)")
    dialog = session.find_element(By.ID, "zoom")
    assert dialog.is_displayed()
    assert session.find_element(By.ID, "zoom-title").text == captions[1]
    verdict = session.find_element(By.ID, "zoom-verdict")
    assert "ar and sjd2 drew the same image" in verdict.text
    Select(session.find_element(By.ID, "zoom-method-1")).select_by_visible_text("sjd2_paper")
    assert "% of the tokens of ar and sjd2_paper are equal" in verdict.text
    assert session.execute_script(
        "return [0, 1].every((side) => document.getElementById(`zoom-image-${side}`).naturalWidth > 0)"
    )
    screenshot(session, SHOTS / "compare.png", 900)
    session.find_element(By.ID, "zoom-close").send_keys(Keys.ARROW_RIGHT)
    assert session.find_element(By.ID, "zoom-title").text == captions[2]
    session.find_element(By.ID, "zoom-close").send_keys(Keys.ESCAPE)
    assert not dialog.is_displayed()
    session.execute_script("document.getElementById('view-map').click()")
    assert session.find_element(By.ID, "map-0-0").is_displayed()
    assert not session.find_element(By.ID, "picture-0-0").is_displayed()


@pytest.mark.parametrize(
    ("name", "width", "dark"), [("light", 1180, False), ("dark", 1180, True), ("phone", 390, False)]
)
def test_it_fits_and_follows_the_colour_scheme(session, name, width, dark):
    emulate(session, width, dark=dark)
    ground, wide = session.execute_script(
        "return [getComputedStyle(document.body).backgroundColor, document.documentElement.scrollWidth]"
    )
    assert wide <= width
    assert (ground == "rgb(255, 255, 255)") != dark
    assert screenshot(session, SHOTS / f"{name}.png").stat().st_size > 10_000


def seen_cells(session) -> list[str]:
    """Labels of the cells of the first method that can be seen."""
    return session.execute_script(
        "return [...document.querySelectorAll('.results-table tbody tr:first-child td')]"
        ".filter((cell) => cell.checkVisibility()).map((cell) => cell.dataset.label)"
    )


@pytest.mark.parametrize("width", [1366, 390])
def test_six_columns_first_and_the_rest_behind_a_switch(session, width):
    emulate(session, width)
    assert seen_cells(session) == ["= ar", "passes", "tokens / pass", "speedup", "s / image", "KID"]
    session.execute_script("document.getElementById('all-columns').click()")
    assert {"CLIP score", "CLIP gain", "FD", "N"} < set(seen_cells(session))
    assert session.execute_script("return document.documentElement.scrollWidth") <= width


def test_on_a_phone_a_method_is_a_card(session):
    """Every figure that is shown lies on the screen, with its name in front."""
    emulate(session, 390)
    edges, labels = session.execute_script(
        "const cells = [...document.querySelectorAll('.results-table tbody td')]"
        ".filter((c) => c.checkVisibility());"
        "return [cells.map((c) => c.getBoundingClientRect().right),"
        " cells.map((c) => getComputedStyle(c, '::before').content)]"
    )
    assert edges
    assert max(edges) <= 390
    assert all(label not in ("none", "normal", '""') for label in labels)
    assert not session.execute_script(
        "return document.querySelector('.results-table thead').checkVisibility()"
    )


def test_headline_words_and_further_prompts(session):
    interval = session.execute_script("return document.querySelector('.numbers dd small').textContent")
    assert interval.startswith("[")
    words, more = session.execute_script(
        "return [document.querySelector('.words dl').checkVisibility(),"
        " [...document.querySelectorAll('.prompt')].filter((e) => e.checkVisibility()).length]"
    )
    assert (words, more) == (False, NUM_OPEN)
    session.execute_script(
        "document.querySelectorAll('main > details summary, #more-images summary').forEach((e) => e.click())"
    )
    words, more = session.execute_script(
        "return [document.querySelector('.words dl').checkVisibility(),"
        " [...document.querySelectorAll('.prompt')].filter((e) => e.checkVisibility()).length]"
    )
    assert (words, more) == (True, len(PROMPTS))
    first = session.execute_script("return document.querySelector('.prompt .images img').alt")
    assert first.startswith("the real picture of")
