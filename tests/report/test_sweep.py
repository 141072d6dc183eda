"""One report of a sweep: rows, best cells, the front, failures, files."""

import csv
import json

import pytest

from sjd2_lightning.report.figures import figure_pixels
from sjd2_lightning.report.sweep import (
    best_rows,
    job_titles,
    read_sweep,
    sweep_csv,
    sweep_rows,
    write_job,
    write_sweep_report,
)
from sjd2_lightning.report.sweep_figures import SweepRow, pareto_figure, pareto_front, sweep_map

WINDOWS, LEVELS = (8, 16, 32), (1, 2)


def method(window, num_levels, speedup, gain):
    return {
        "num_images": 4,
        "acceptance": "replay",
        "lossless": True,
        "window": window,
        "num_levels": num_levels,
        "speedup": speedup,
        "speedup_interval": [speedup - 0.1, speedup + 0.1],
        "seconds_per_image": 2 / speedup,
        "step_compression": 2 * speedup,
        "clip_gain": gain,
        "fd": None,
        "fd_interval": None,
    }


@pytest.fixture
def folder(tmp_path):
    """Six runs; the fourth failed, and left a report of an earlier attempt."""
    points = [(window, levels) for window in WINDOWS for levels in LEVELS]
    for number, (window, levels) in enumerate(points):
        run = tmp_path / str(number)
        speedup = 1 + window / 32 + (levels == 2) * 0.5
        methods = {"ar": method(1, 0, 1.0, 10.0), "sjd2": method(window, levels, speedup, 10 - number)}
        error = "disk full" if number == 3 else None
        write_job(run, [f"decoding.window={window}", f"decoding.num_levels={levels}"], {"x": "text"}, error)
        (run / "report.json").write_text(json.dumps({"methods": methods}))
    return tmp_path


def test_runs_are_read_in_order_and_failed_ones_have_no_rows(folder):
    (folder / "10").mkdir()
    write_job(folder / "10", [], None, "late")
    jobs = read_sweep(folder)
    assert [job.name for job in jobs] == ["0", "1", "2", "3", "4", "5", "10"]
    assert [job.error for job in jobs if job.error] == ["disk full", "late"]
    rows = sweep_rows(jobs)
    assert len(rows) == 10
    assert {row.job for row in rows} == {"0", "1", "2", "4", "5"}
    assert rows[1].setting == "8 / 1"
    assert rows[1].measured["speedup_low"] == pytest.approx(1.15)
    assert "fd" not in rows[1].measured


def test_the_fastest_setting_is_named(folder):
    ((name, row),) = best_rows(sweep_rows(read_sweep(folder)))
    assert (name, row.setting, row.measured["speedup"]) == ("sjd2", "32 / 2", 2.5)


def test_every_run_is_a_line_of_the_csv(folder):
    jobs = read_sweep(folder)
    lines = list(csv.DictReader(sweep_csv(jobs, sweep_rows(jobs)).splitlines()))
    assert len(lines) == 11
    failed = [line for line in lines if line["error"]]
    assert [(line["job"], line["error"], line["method"]) for line in failed] == [("3", "disk full", "")]
    assert lines[1]["decoding.window"] == "8"
    assert float(lines[1]["speedup"]) == 1.25


def test_metrics_of_trainings_are_lines_too(tmp_path):
    write_job(
        tmp_path / "0",
        ["run_dir=x", "optimizer.lr=1e-3"],
        {"val/loss": 1.5, "note": "text", "nested": {}},
        None,
    )
    write_job(tmp_path / "1", ["run_dir=x", "optimizer.lr=2e-3"], {"val/loss": 1.25}, None)
    files = write_sweep_report(read_sweep(tmp_path), tmp_path)
    lines = list(csv.DictReader(files.csv.read_text().splitlines()))
    assert [float(line["val/loss"]) for line in lines] == [1.5, 1.25]
    assert job_titles(read_sweep(tmp_path)) == {"0": "optimizer.lr=1e-3", "1": "optimizer.lr=2e-3"}
    assert "| optimizer.lr=2e-3 | 1.250 |" in files.markdown.read_text()
    assert files.figures == ()


def test_files_of_the_report(folder):
    files = write_sweep_report(read_sweep(folder), folder)
    assert files.num_failed == 1
    drawn = {path.stem for path in files.figures}
    assert drawn == {
        "sweep_seconds_per_image",
        "sweep_step_compression",
        "sweep_speedup",
        "sweep_clip_gain",
        "sweep_pareto",
    }
    assert all(path.is_file() for path in files.figures)
    page, text = files.html.read_text(), files.markdown.read_text()
    for place in (page, text):
        assert "disk full" in place
        assert "decoding.num_levels=2" in place
    assert page.count("<img ") == len(files.figures)
    assert "fastest sjd2: 32 / 2, speedup 2.500" in text


def test_the_frame_is_on_the_best_cell(folder):
    rows = sweep_rows(read_sweep(folder))
    for key, less_is_better, place in (("speedup", False, (2, 1)), ("seconds_per_image", True, (2, 1))):
        figure = sweep_map(rows, key, key, less_is_better)
        frame = figure.axes[0].patches[0]
        assert (frame.get_x() + 0.5, frame.get_y() + 0.5) == place
    worst = sweep_map(rows, "speedup", "speedup", True).axes[0].patches[0]
    assert (worst.get_x() + 0.5, worst.get_y() + 0.5) == (0, 0)
    assert figure_pixels(figure).ndim == 3


def test_nothing_is_drawn_of_nothing(folder):
    rows = sweep_rows(read_sweep(folder))
    assert sweep_map(rows, "kid", "kid", True) is None
    assert sweep_map([row for row in rows if row.method == "ar"], "speedup", "speedup", False) is None
    assert pareto_figure(rows[:2]) is None


def test_the_front_holds_what_nothing_beats():
    points = [(1.0, 5.0), (2.0, 4.0), (2.0, 3.0), (3.0, 1.0), (2.5, 0.5), (0.5, 5.0)]
    assert pareto_front(points) == [0, 1, 3]


def test_a_distance_is_better_below():
    rows = [
        SweepRow("0", "sjd2", "replay", True, {"window": 8, "num_levels": 1, "speedup": s, "kid": k})
        for s, k in ((1.0, 0.1), (2.0, 0.3), (1.5, 0.4))
    ]
    axis = pareto_figure(rows).axes[0]
    assert axis.yaxis_inverted()
    assert list(axis.lines[0].get_xdata()) == [1.0, 2.0]
