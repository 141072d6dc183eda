"""The files of a report: keys, numbers, tables, figures, and the page."""

import dataclasses
import io
import json
import runpy
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from sjd2_lightning.evaluation.controls import Control
from sjd2_lightning.evaluation.quality import judged, judged_less
from sjd2_lightning.metrics.judge import Asked, Verdict
from sjd2_lightning.report.figures import figure_pixels, grid_figure, heat_map_png, settled_map
from sjd2_lightning.report.page import html_page
from sjd2_lightning.report.table import (
    columns,
    console_table,
    equal_text,
    judge_columns,
    judge_rows,
    markdown_table,
)
from sjd2_lightning.report.wandb_log import sampled_names, scalar_row
from sjd2_lightning.report.write import MEASURES, report_object, write_report
from tests.tools.small_evaluation import METHODS, PROMPTS
from tests.tools.source import REPO

DEMANDED = ("nfe", "step_compression", "speedup", "clip_score", "fd", "kid", "num_images")


@pytest.fixture(scope="module")
def files(result, provenance, tmp_path_factory):
    return write_report(result, provenance, folder=tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def report(files):
    return json.loads(files.json.read_text())


def test_report_has_every_number_that_is_demanded(report):
    assert list(report["methods"]) == list(METHODS)
    for numbers in report["methods"].values():
        assert all(np.isfinite(numbers[name]) for name in DEMANDED)
        for name in ("nfe", "step_compression", "speedup", "clip_score", "fd", "kid"):
            low, high = numbers[f"{name}_interval"]
            assert low <= numbers[name] <= high
    assert report["methods"]["sjd2"]["lossless"] is True
    assert report["methods"]["sjd2_paper"]["lossless"] is False
    assert report["methods"]["sjd2"]["equal_to_ar"] == 1
    assert report["metrics"]["fd"]["name"] == "fd_Colours"
    assert report["metrics"]["clip_score"]["name"] == "clip_score_fake"
    assert set(report["references"]) == {"real", "reconstructed", "blurred", "patch_shuffled"}
    assert report["provenance"]["weights_hash"]


def test_ci_accepts_the_report(report):
    problems = runpy.run_path(str(REPO / ".ci" / "check_report.py"))["problems"](report)
    assert problems == ["methods.mc_sjd is missing"]


def test_what_could_not_be_measured_is_null(result, provenance):
    method = dataclasses.replace(result.methods["sjd"], measured={})
    bare = dataclasses.replace(result, methods={"sjd": method}, references={})
    found = report_object(bare, provenance)["methods"]["sjd"]
    assert {found[name] for name in MEASURES} == {None}
    broken = {"nfe": dataclasses.replace(result.methods["sjd"].measured["nfe"], value=float("nan"))}
    method = dataclasses.replace(method, measured=broken)
    bare = dataclasses.replace(bare, methods={"sjd": method})
    assert report_object(bare, provenance)["methods"]["sjd"]["nfe"] is None


def test_tables(result):
    keys = [column.key for column in columns(result)]
    assert keys == [
        "nfe", "step_compression", "speedup", "seconds_per_image", "kid", "clip_score", "clip_gain", "fd"
    ]  # fmt: skip
    lines = markdown_table(result).splitlines()
    assert len(lines) == 2 + len(METHODS) + 4
    assert len({line.count("|") for line in lines}) == 1
    assert "fd_Colours" in lines[0]
    assert lines[2].startswith("| ar | replay | – |")
    assert "| sjd2 | replay | 100 % |" in lines[4]
    assert "paper (lossy)" in lines[5]


def printed(result, width):
    console = Console(width=width, file=io.StringIO())
    with console.capture() as captured:
        console.print(console_table(result, width))
    return captured.get()


def test_the_table_fits_a_terminal_of_80_columns_and_fills_a_wider_one(result):
    assert [column.key for column in columns(result) if column.is_first] == [
        "nfe", "step_compression", "speedup", "seconds_per_image", "kid"
    ]  # fmt: skip
    narrow, wide = printed(result, 80), printed(result, 160)
    for text, width in ((narrow, 80), (wide, 160)):
        assert max(map(len, text.splitlines())) <= width
        assert "[" in text  # intervals are not taken for markup
        for name in METHODS:
            assert any(line.split()[:1] == [name] for line in text.splitlines())
    assert all(word in narrow for word in ("= ar", "passes", "speedup", "KID"))
    assert "more on" in narrow
    assert "FD" not in narrow
    assert "FD" in wide
    assert "more on" not in wide


def test_nearly_equal_is_not_shown_as_equal(result):
    method = dataclasses.replace(result.methods["sjd"], equal_to_ar=0.9999)
    assert equal_text(method) == "99 %"


def test_tables_say_what_equality_was_held_against(result):
    assert "one token of each pass" not in markdown_table(result)
    baseline = result.methods["ar"]
    config = dataclasses.replace(baseline.config, window_shape=32, invariant=True)
    shaped = {**result.methods, "ar": dataclasses.replace(baseline, config=config)}
    text = markdown_table(dataclasses.replace(result, methods=shaped))
    assert "ar commits one token of each pass, and passes are shaped for 32 slots and computes by" in text


def test_markdown_names_its_sources(files, provenance):
    text = files.markdown.read_text()
    assert provenance["weights_hash"][:21] in text
    assert "random pictures" in text
    assert "figures/grid.png" in text
    assert files.grid == files.markdown.parent / "figures" / "grid.png"


def test_figures_show_what_they_say(result, files):
    for path in (files.grid, files.histogram, files.maps):
        assert np.asarray(Image.open(path)).std() > 10
    images = result.store.images(result.methods["ar"].records)
    figure = grid_figure(["a", "b"], [images, images], ["caption"] * len(images), prompts_per_row=2)
    pixels = figure_pixels(figure)
    colours = {tuple(colour) for colour in pixels.reshape(-1, 3)}
    assert {tuple(colour) for colour in images[4].reshape(-1, 3).tolist()} <= colours


def test_map_of_passes(result):
    record = result.methods["ar"].records[0]
    passes = settled_map(record)
    assert passes[0, :3].tolist() == [0, 1, 2]
    assert passes[1, 0] == 5  # the row end is a slot too
    assert passes.max() == record.nfe - 1
    assert heat_map_png(record).startswith(b"\x89PNG")


class Page(HTMLParser):
    """What a page links to, and whether its elements are closed."""

    def __init__(self):
        super().__init__()
        self.open, self.links, self.tags = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href") and value[0] != "#"]
        if tag not in ("meta", "link", "img", "br", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_page_is_whole_and_needs_no_network(files, result):
    text = files.html.read_text()
    page = Page()
    page.feed(text)
    assert page.open == []
    assert all(link.startswith("data:") for link in page.links)
    # images and maps, real pictures, and two that are filled by choice
    assert page.tags.count("img") == (2 * len(METHODS) + 1) * len(PROMPTS) + 2
    assert "What the words mean" in text
    assert page.tags.count("script") == 2  # the data, and the script whose hash the policy names
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text
    assert all(warning.replace("<", "&lt;") in text for warning in result.warnings)


def test_prompts_are_text_not_markup(result, provenance):
    prompts = (dataclasses.replace(PROMPTS[0], prompt="<script>alert(1)</script>"), *PROMPTS[1:])
    text = html_page(dataclasses.replace(result, prompts=prompts, reference=None), provenance, num_prompts=2)
    assert "alert(1)</script>" not in text
    assert "&lt;script&gt;" in text
    assert "\\u003cscript\\u003e" in text  # in the data of the page's script
    assert "3 more prompts" in text


@pytest.fixture(scope="module")
def judged_result(result):
    """The small evaluation as if its prompts were those of scenes: ar draws four right, the others two."""
    categories = ["single", "two", "counting", "position", "names"]
    methods = {}
    for name, method in result.methods.items():
        num_right = 4 if name == "ar" else 2
        verdicts = tuple(
            Verdict(Asked(category, {"dog": 1}), (), "grey", () if place < num_right else ("0 of 'dog' <&>",))
            for place, category in enumerate(categories)
        )
        baseline = methods["ar"].verdicts if methods else verdicts
        found = judged(verdicts, 50) | (judged_less(verdicts, baseline, 50) if methods else {})
        methods[name] = dataclasses.replace(method, verdicts=verdicts, measured=method.measured | found)
    control = Control("judge", True, "judge: 24 real scenes are right", {})
    return dataclasses.replace(result, methods=methods, controls=(control,))


def test_the_judge_stands_in_tables_page_and_logs(judged_result, provenance, tmp_path):
    files = write_report(judged_result, provenance, folder=tmp_path)
    assert "judged right" in [column.heading for column in columns(judged_result)]
    headings = [column.heading for column in judge_columns(judged_result)]
    assert headings == ["single", "two", "counting", "position", "names", "overall", "overall less ar"]
    rows = dict(judge_rows(judged_result))
    assert [cell.value for cell in rows["ar"]] == ["1.00"] * 4 + ["0.00", "1.00", "–"]
    assert [cell.value for cell in rows["sjd2"]][-2:] == ["0.50", "-0.50"]
    assert rows["sjd2"][-1].interval
    assert {cell.value for cell in rows["real"]} == {"–"}
    report = json.loads(files.json.read_text())
    assert report["methods"]["sjd2"]["judge_minus_ar"] == -0.5
    assert report["controls"]["judge"]["passed"] is True
    markdown, html = files.markdown.read_text(), files.html.read_text()
    for text in (markdown, html):
        assert "What the judge sees" in text
        assert "24 real scenes are right" in text
    assert html.count("✓") == 4 + 3 * 2
    assert "judge: 0 of &#39;dog&#39; &lt;&amp;&gt;" in html
    row = scalar_row(judged_result)
    assert (row["val/judge_ar"], row["val/judge"], row["val/judge_single"]) == (1, 0.5, 1)
    assert row["val/judge_minus_ar"] == -0.5
    names = sampled_names(list(METHODS), ["Colours"], True, False, ("overall", "single", "two", "names"))
    assert {"val/judge", "val/judge_ar", "val/judge_single", "val/judge_two_minus_ar"} <= set(names)


def test_without_a_judge_nothing_is_said_of_one(result, files):
    assert judge_columns(result) == ()
    assert judge_rows(result) == []
    assert "judge" not in files.markdown.read_text()
    assert 'id="judge"' not in files.html.read_text()
