"""CI's check of the demo's report refuses what README does not promise."""

import importlib.util

import pytest

from tests.tools.source import REPO

spec = importlib.util.spec_from_file_location("check_report", REPO / ".ci" / "check_report.py")
check_report = importlib.util.module_from_spec(spec)
spec.loader.exec_module(check_report)


@pytest.fixture
def report() -> dict:
    figures = dict.fromkeys(check_report.FIGURES, 1.0)
    return {"methods": {name: dict(figures) for name in check_report.METHODS}, "provenance": {"git": "0"}}


def test_complete_report_passes(report):
    assert check_report.problems(report) == []


def test_missing_method_is_named(report):
    del report["methods"]["sjd2_paper"]
    assert check_report.problems(report) == ["methods.sjd2_paper is missing"]


@pytest.mark.parametrize("value", [None, "4.0", True, float("nan"), float("inf")])
def test_figure_that_is_no_number_is_named(report, value):
    report["methods"]["sjd2"]["speedup"] = value
    assert [line.split(" is ")[0] for line in check_report.problems(report)] == ["methods.sjd2.speedup"]


def test_no_images_and_no_provenance(report):
    report["methods"]["ar"]["num_images"] = 0
    report["provenance"] = {}
    assert check_report.problems(report) == ["methods.ar has no images", "provenance is missing"]
