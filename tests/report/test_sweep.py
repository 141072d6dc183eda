"""One report of a sweep: rows, best cells, the front, failures, files."""

import csv
import json

import pytest

from sjd2_lightning.report.figures import figure_pixels
from sjd2_lightning.report.sweep import (
    best_rows,
    job_titles,
    read_sweep,
    same_images,
    sweep_csv,
    sweep_rows,
    write_job,
    write_sweep_report,
)
from sjd2_lightning.report.sweep_figures import (
    Cell,
    SweepRow,
    cell_map,
    frame_of,
    pareto_figure,
    pareto_front,
    sweep_cells,
)

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
        {"val/loss_clean": 1.5, "note": "text", "nested": {}},
        None,
    )
    write_job(tmp_path / "1", ["run_dir=x", "optimizer.lr=2e-3"], {"val/loss_clean": 1.25}, None)
    files = write_sweep_report(read_sweep(tmp_path), tmp_path)
    lines = list(csv.DictReader(files.csv.read_text().splitlines()))
    assert [float(line["val/loss_clean"]) for line in lines] == [1.5, 1.25]
    assert job_titles(read_sweep(tmp_path)) == {"0": "optimizer.lr=1e-3", "1": "optimizer.lr=2e-3"}
    assert "| [1](1/) | 2e-3 | 1.250 |" in files.markdown.read_text()
    assert [path.stem for path in files.figures] == ["sweep_val_loss_clean"]


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
    assert "fastest sjd2: 32 / 2, speedup 2.500 [2.40, 2.60]" in text


def test_the_frame_is_on_the_best_cell(folder):
    rows = sweep_rows(read_sweep(folder))
    for key, less_is_better, place in (("speedup", False, (2, 1)), ("seconds_per_image", True, (2, 1))):
        figure = cell_map(sweep_cells(rows, key), key, less_is_better)
        (frame,) = figure.axes[0].patches
        assert (frame.get_x() + 0.5, frame.get_y() + 0.5) == place
    (worst,) = cell_map(sweep_cells(rows, "speedup"), "speedup", True).axes[0].patches
    assert (worst.get_x() + 0.5, worst.get_y() + 0.5) == (0, 0)
    assert figure_pixels(figure).ndim == 3
    texts = [text.get_text() for text in cell_map(sweep_cells(rows, "speedup"), "", False).axes[0].texts]
    assert "2.50\n[2.40, 2.60]" in texts


def test_a_tie_has_no_frame_and_overlap_a_dotted_one():
    clear = {(0, 8): Cell(1.0, 0.9, 1.1), (0, 16): Cell(2.0, 1.9, 2.1)}
    assert frame_of(clear, False) == ((0, 16), True)
    assert frame_of(clear, True) == ((0, 8), True)
    overlap = clear | {(0, 32): Cell(1.8, 1.6, 2.0)}
    assert frame_of(overlap, False) == ((0, 16), False)
    assert cell_map({"sjd2": overlap}, "", False).axes[0].patches[0].get_linestyle() == ":"
    tie = clear | {(0, 32): Cell(2.004, 1.9, 2.1)}
    assert frame_of(tie, False) is None
    assert not cell_map({"sjd2": tie}, "", False).axes[0].patches


def test_what_cannot_vary_is_said_and_not_drawn(folder):
    """All cells have the images of the baseline: one sentence in place of maps of quality."""
    for path in folder.glob("*/report.json"):
        report = json.loads(path.read_text())
        for numbers in report["methods"].values():
            numbers |= {"clip_gain": 5.0, "kid": 0.1, "equal_to_ar": 1.0}
        path.write_text(json.dumps(report))
    jobs = read_sweep(folder)
    assert same_images(sweep_rows(jobs)) == ["sjd2"]
    files = write_sweep_report(jobs, folder)
    assert {path.stem for path in files.figures} == {
        "sweep_seconds_per_image", "sweep_step_compression", "sweep_speedup"
    }  # fmt: skip
    for text in (files.html.read_text(), files.markdown.read_text()):
        assert "sjd2: same images in all cells, those of ar" in text


def test_intervals_counts_links_and_one_line_of_the_baseline(folder):
    files = write_sweep_report(read_sweep(folder), folder)
    page, text = files.html.read_text(), files.markdown.read_text()
    assert "1.250 [1.15, 1.35]" in page
    assert "below 8, no setting can be called best" in page
    assert '<a href="0/report.html">0</a>' in page
    assert "[0](0/report.html)" in text
    # its gain differs from run to run here: as many lines as there are numbers
    assert text.count("| ar |") == 1


def test_a_sweep_of_trainings_shows_swept_keys_and_what_training_changed(tmp_path):
    for number, (rate, levels) in enumerate([("1e-3", 1), ("1e-3", 2), ("2e-3", 1), ("2e-3", 2)]):
        metrics = {
            "start/val/nfe": 70.0, "val/nfe": 60.0 - number, "val/loss_clean": 1.5 - number / 10,
            "val/nfe_ar": 271.0, "start/val/step_compression": 4.0, "val/step_compression": 4.5, "epoch": 1.0,
        }  # fmt: skip
        overrides = [f"optimizer.lr={rate}", f"noise.num_levels={levels}", "trainer=cpu"]
        write_job(tmp_path / str(number), overrides, metrics, None)
    files = write_sweep_report(read_sweep(tmp_path), tmp_path)
    text = files.markdown.read_text()
    assert (
        "| run | optimizer.lr | noise.num_levels | validation loss after | passes before | passes after "
        "| tokens a pass before | tokens a pass after |"
    ) in text
    assert "| [3](3/) | 2e-3 | 2 | 1.200 | 70.000 | 57.000 | 4.000 | 4.500 |" in text
    assert "least val/loss_clean: optimizer.lr=2e-3 noise.num_levels=2, 1.200" in text
    # tokens a pass are the same in all cells
    assert {path.stem for path in files.figures} == {"sweep_val_nfe", "sweep_val_loss_clean"}
    assert all(path.is_file() for path in files.figures)
    assert "271" not in text
    assert "val/nfe_ar" in files.csv.read_text()


def test_nothing_is_drawn_of_nothing(folder):
    rows = sweep_rows(read_sweep(folder))
    assert cell_map(sweep_cells(rows, "kid"), "kid", True) is None
    assert sweep_cells([row for row in rows if row.method == "ar"], "speedup") == {}
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
