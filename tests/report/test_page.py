"""Parts of the page: observations, room for images, what the script is given, costs, figures as SVG."""

import base64
import dataclasses
import hashlib
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from sjd2_lightning.evaluation.references import ReferenceSet
from sjd2_lightning.evaluation.store import RecordStore
from sjd2_lightning.report.cost import measure_pass_costs, method_costs, seconds_per_pass
from sjd2_lightning.report.figures import cost_chart, settling_map
from sjd2_lightning.report.html import (
    LOSSLESS_PX,
    MAX_PX,
    METHOD_COLOURS,
    data_uri,
    embedded_image,
    figure_svg,
)
from sjd2_lightning.report.likeness import best_known, has_real_pictures
from sjd2_lightning.report.observe import observe
from sjd2_lightning.report.page import html_page
from sjd2_lightning.report.table import LEAST_IMAGES, headline
from sjd2_lightning.report.write import report_object, write_report
from tests.tools.small_evaluation import METHODS, PROMPTS, SIDE, small_backbone


@pytest.fixture(scope="module")
def backbone():
    return small_backbone()


@pytest.fixture(scope="module")
def seen(result, backbone):
    layout = backbone.layout(SIDE, SIDE)
    backbone.train()
    found = observe(backbone, result, layout, num_trajectories=2, num_frames=4, cost_windows=(1, 4))
    assert backbone.training
    return found


@pytest.fixture(scope="module")
def text(result, provenance, seen):
    return html_page(result, provenance, seen)


def script_data(page):
    return json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', page)[1])


def test_the_script_gets_a_replay_of_every_method(text, result):
    data = script_data(text)
    assert data["methods"] == list(METHODS)
    assert [entry["caption"] for entry in data["replays"]] == [
        result.prompts[place].prompt for place in best_known(result)[:2]
    ]
    for entry in data["replays"]:
        assert entry["size"] == [4, 4]
        for method in entry["methods"]:
            assert len(method["committed"]) == len(method["seen"]) == method["passes"]
            assert method["committed"][-1] == 16
            for place, levels in zip(method["frames"], method["levels"], strict=True):
                assert len(levels) == method["seen"][place] - method["committed"][place]
            assert method["sprite"].startswith("data:image/webp;base64,")
    assert [prompt["caption"] for prompt in data["prompts"]] == [
        result.prompts[place].prompt for place in best_known(result)
    ]
    equal = data["prompts"][0]["equal"]
    assert equal[0][2] == equal[2][0] == equal[1][1] == 100  # ar and sjd2; a method and itself


def test_only_the_page_s_own_script_may_run(text):
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', text)[1]
    script = re.search(r"<script>(.*?)</script>", text, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy


def test_room_for_images_bounds_the_page(result, provenance, seen, text):
    images = sum(len(match) for match in re.findall(r"data:image/[^\"]+", text))
    small = html_page(result, provenance, seen, max_megabytes=images * 0.75 / 1e6)
    shown = len(script_data(small)["prompts"])
    assert 1 <= shown < len(PROMPTS)
    assert f"{len(PROMPTS) - shown} more prompts" in small
    assert len(script_data(html_page(result, provenance, seen, max_megabytes=1e-6))["prompts"]) == 1


def test_without_observations_there_is_no_replay(result, provenance):
    page = html_page(result, provenance)
    assert 'id="replay"' not in page
    assert script_data(page)["replays"] == []
    assert "Cost of a pass" in page


def test_large_images_are_embedded_smaller(tmp_path):
    rng = np.random.default_rng(0)
    for side, kind in ((LOSSLESS_PX, "png"), (2 * MAX_PX, "webp")):
        path = tmp_path / f"{side}.png"
        Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(path)
        found = embedded_image(path)
        assert found.startswith(f"data:image/{kind};base64,")
        assert (found == data_uri(path.read_bytes())) == (kind == "png")


def test_costs(result, backbone, seen):
    assert [(cost.window, cost.rows) for cost in seen.pass_costs] == [(1, 2), (4, 2)]
    assert all(cost.seconds > 0 for cost in seen.pass_costs)
    assert measure_pass_costs(backbone, result, backbone.layout(SIDE, SIDE), ()) == ()
    costs = {cost.method: cost for cost in method_costs(result)}
    assert costs["ar"].relative == 1
    assert costs["sjd2"].tokens == pytest.approx(result.methods["sjd2"].measured["step_compression"].value)
    records = [
        dataclasses.replace(record, seconds=2.0 + record.batch, nfe=nfe)
        for record, nfe in zip(result.methods["sjd"].records, (5, 10, 6, 3, 8), strict=True)
    ]
    method = dataclasses.replace(result.methods["sjd"], records=tuple(records))
    assert seconds_per_pass(method) == pytest.approx(np.median([2 / 10, 3 / 6, 4 / 8]))


def test_headline_is_the_fastest_lossless_method(result):
    def with_speed(name, value):
        speed = dataclasses.replace(result.methods[name].measured["speedup"], value=value)
        return dataclasses.replace(
            result.methods[name], measured=result.methods[name].measured | {"speedup": speed}
        )

    methods = result.methods | {
        "sjd": with_speed("sjd", 2.0),
        "sjd2": with_speed("sjd2", 3.0),
        "sjd2_paper": with_speed("sjd2_paper", 9.0),
    }
    enough = dataclasses.replace(result, methods=methods, prompts=(result.prompts * 2)[:LEAST_IMAGES])
    found = headline(enough)
    assert found.method == "sjd2"
    low, high = methods["sjd2"].measured["speedup"].interval
    assert (found.numbers[0].value, found.numbers[0].interval) == ("3.00×", f"[{low:.2f}, {high:.2f}]")
    assert f"3.00× [{low:.2f}, {high:.2f}] speedup" in found.numbers_line
    assert "token for token" in found.sentence
    assert headline(dataclasses.replace(enough, methods={"ar": methods["ar"]})) is None


def test_few_images_have_no_headline(result, provenance, text):
    assert len(result.prompts) < LEAST_IMAGES
    assert headline(result) is None
    assert f"{len(result.prompts)} images are too few" in text
    assert "fastest lossless" not in text
    last = dataclasses.replace(result, prompts=(result.prompts * 2)[: LEAST_IMAGES - 1])
    assert headline(last) is None


def test_an_empty_picture_is_not_well_drawn(result, tmp_path):
    """A square of the right colour stands behind a picture of the right shape."""
    real = torch.zeros(2, 16, 16, 3, dtype=torch.uint8)
    real[..., 2] = 200
    real[:, 4:12, 4:12] = 255
    drawn = real.clone()
    drawn[0, 4:12, 4:12] = torch.tensor([0, 0, 200], dtype=torch.uint8)  # all blue
    drawn[1] //= 2  # darker
    store = RecordStore(tmp_path, {})
    records = [dataclasses.replace(record, method="ar") for record in result.methods["ar"].records[:2]]
    store.append(records, list(drawn.numpy()))
    keys = tuple(item.key for item in PROMPTS[:2])
    small = dataclasses.replace(
        result,
        prompts=PROMPTS[:3],
        store=store,
        reference=ReferenceSet("squares", keys, keys, real),
    )
    assert best_known(small) == [1, 0, 2]
    assert has_real_pictures(small)
    without = dataclasses.replace(small, reference=None)
    assert best_known(without) == [0, 1, 2]
    assert not has_real_pictures(without)


def test_figures_take_the_colours_of_the_page(seen, result):
    trajectory = next(t for t in seen.trajectories if t.method == "sjd2")
    svg = figure_svg(settling_map(trajectory, METHOD_COLOURS[2]), "name", 'a "label" & more')
    assert svg.startswith("<svg ")
    assert 'aria-label="a &quot;label&quot; &amp; more"' in svg
    assert "var(--method-2)" in svg
    assert "<style" not in svg
    assert not set(re.findall(r"#[0-9a-f]{6}\b", svg))
    assert all(name.startswith("name-") for name in re.findall(r'\bid="([^"]+)"', svg))
    places = {name: place for place, name in enumerate(METHODS)}
    assert cost_chart((), method_costs(result), places).axes[0].get_legend() is not None


def test_report_holds_what_was_observed(result, provenance, seen, tmp_path):
    files = write_report(result, provenance, seen, tmp_path)
    assert files.settling.is_file()
    assert files.cost.is_file()
    report = json.loads(files.json.read_text())
    assert report == report_object(result, provenance, seen)
    assert set(report["settling"]) == set(report["cost"]["methods"]) == set(METHODS)
    assert [entry["window"] for entry in report["cost"]["passes"]] == [1, 4]
    markdown = files.markdown.read_text()
    assert "## How drafts settle" in markdown
    assert markdown.count("| sjd2 |") == 4
