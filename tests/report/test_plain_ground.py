"""Tokens a pass by how much of an image is plain ground."""

import dataclasses
import json

import pytest

from sjd2_lightning.report.plain_ground import THIRDS, by_plain_ground, plain_cells, plain_share, plain_thirds
from sjd2_lightning.report.write import write_report
from tests.tools.small_evaluation import METHODS


def test_a_code_is_plain_if_it_equals_its_left_and_upper_neighbour(result):
    record = result.methods["ar"].records[0]
    codes = [1, 1, 1, 2, 1, 1, 1, 2, 1, 3, 1, 1, 1, 1, 1, 1]  # plain: 1 1 . / . . . / . 1 1
    assert plain_share(dataclasses.replace(record, image_ids=tuple(codes))) == pytest.approx(4 / 9)
    assert plain_share(dataclasses.replace(record, image_ids=(5,) * 16)) == 1
    assert plain_share(dataclasses.replace(record, image_ids=tuple(range(16)))) == 0
    assert plain_share(dataclasses.replace(record, image_ids=(1, 1), size=(1, 2))) == 0


def test_plain_images_are_the_fast_ones_where_they_are(result):
    method, flat, varied = result.methods["sjd"], (5,) * 16, tuple(range(16))
    half = (*range(8), *(5,) * 8)
    images = [(flat, 4), (varied, 16), (half, 8), (flat, 5), (varied, 15)]
    records = [
        dataclasses.replace(record, image_ids=ids, nfe=nfe, num_generated=20)
        for record, (ids, nfe) in zip(method.records, images, strict=True)
    ]
    thirds = plain_thirds(dataclasses.replace(method, records=tuple(records)), 50)
    assert [third.tokens.num_images for third in thirds] == [2, 2, 1]
    assert [third.tokens.value for third in thirds] == pytest.approx([40 / 31, 40 / 12, 20 / 5])
    assert [third.share for third in thirds] == pytest.approx([0, (1 + 4 / 9) / 2, 1])
    assert plain_cells(thirds)[2] == "4.00 at 100 %"
    assert plain_cells(thirds)[0].startswith("1.29 [1.25, 1.33] at 0 %")
    assert plain_thirds(dataclasses.replace(method, records=tuple(records[:2]))) == ()


def test_every_report_has_the_table(result, provenance, tmp_path):
    files = write_report(result, provenance, folder=tmp_path)
    report = json.loads(files.json.read_text())
    assert list(report["plain_ground"]) == list(by_plain_ground(result)) == list(METHODS)
    assert report["plain_ground"]["ar"][0]["step_compression"] == 1
    for text in (files.markdown.read_text(), files.html.read_text()):
        assert "Tokens a pass by plain ground" in text
        assert all(third in text for third in THIRDS)
