"""HTML of frames: texts of visitors are escaped, sums are right."""

from sjd2_lightning.evaluation.prompts import PromptItem
from sjd2_lightning.playground.frames import BLANK, Side
from sjd2_lightning.playground.markup import Row, gallery, line, pair, status, summary
from sjd2_lightning.playground.player import Frame

SAME = "Same image: all 16 tokens are equal."
EVIL = "<img src=x onerror=alert(1)>"


def side(name: str, passes: int, seconds: float) -> Side:
    return Side(name, passes, seconds, 0.25, True, BLANK, (8, 16))


def frame(first: int, second: int, verdict: str | None = SAME) -> Frame:
    return Frame("done", (side("ar", first, 2.0), side("sjd2", second, 1.0)), verdict)


def test_texts_are_escaped():
    for found in (line(EVIL), gallery([Row(PromptItem("p", EVIL, 0), frame(4, 2))])):
        assert "<img src=x" not in found
        assert "&lt;img src=x" in found


def test_a_pair_says_how_far_it_is():
    found = pair(frame(4, 1).sides)
    assert found.count("<figure") == 2
    assert 'data-passes="4"' in found
    assert "aspect-ratio: 16 / 8" in found
    assert "width: 25.0%" in found
    assert "<em>1</em> pass," in found


def test_same_is_marked_only_where_it_was_found():
    assert 'class="line same"' in status(frame(4, 2))
    assert "sjd2 took 2 passes in place of 4, and 1.00 s in place of 2.00 s." in status(frame(4, 2))
    for other in ("Another image, and of another law: 40 % of the tokens are equal.", None):
        assert "same" not in status(frame(4, 2, other))
    assert "Stopped." in status(Frame("stopped", frame(4, 2).sides, None))


def test_sums_over_prompts():
    item = PromptItem("p", "red", 0)
    rows = [Row(item, frame(4, 2)), Row(item, frame(6, 3, "Another image"))]
    found = summary(rows, 5)
    assert (
        "2 of 5 prompts. ar: 5.0 passes and 2.00 s an image; sjd2: 2.5 passes and 1.00 s an image." in found
    )
    assert "Same image: 1 of 2." in found
    assert 'class="line same"' not in found
    assert 'class="line same"' in summary(rows[:1], 5)
    assert summary([], 5) == line("0 of 5 prompts.")
