"""Inversions side by side in the shared comparison: records, equality, continuing, tables."""

import json
from dataclasses import replace

import pytest
import torch

from sjd2_lightning.evaluation.flow_methods import FlowMethod
from sjd2_lightning.evaluation.flow_runs import FlowRecord, invert_methods, start_of
from sjd2_lightning.evaluation.prompts import PromptItem
from sjd2_lightning.evaluation.quality import QualityMeter, QualityMetrics
from sjd2_lightning.evaluation.results import measure_methods
from sjd2_lightning.evaluation.store import RecordStore
from sjd2_lightning.fixed_point import Schedule
from sjd2_lightning.report.table import markdown_table
from sjd2_lightning.report.write import write_report
from tests.models.test_tarflow import flow

PROMPTS = [PromptItem(f"key{n}", f"text {n}", n) for n in range(3)]
VECTORS = {
    item.prompt: torch.randn(5, generator=torch.Generator().manual_seed(n)) for n, item in enumerate(PROMPTS)
}
METHODS = {
    "ar": FlowMethod((Schedule(window=1),) * 3),
    "jacobi": FlowMethod((Schedule(),) * 3),
    "cut": FlowMethod((Schedule(max_passes=1),) * 3),
}


def run(folder, **kwargs):
    return invert_methods(flow(), VECTORS, METHODS, PROMPTS, folder, **kwargs)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return run(tmp_path_factory.mktemp("flow"), batch_size=2)


def test_lossless_methods_equal_the_loop_and_a_cut_does_not(store):
    rows = {(record.method, record.key): record for record in store.load()}
    assert len(rows) == 9
    for item in PROMPTS:
        loop, jacobi, cut = (rows[name, item.key] for name in METHODS)
        assert loop.difference == 0
        assert loop.nfe == 45
        assert loop.block_passes == (15, 15, 15)
        assert jacobi.percent_equal(loop) == 100
        assert jacobi.nfe < 45
        assert cut.percent_equal(loop) == 0
        assert cut.nfe == 3
        assert all(sum(row.accepted) == row.num_generated == 45 for row in (loop, jacobi, cut))
        assert len(jacobi.settled_iteration) == 16
        assert max(jacobi.settled_iteration) < max(jacobi.block_passes)
    assert METHODS["jacobi"].lossless
    assert not METHODS["cut"].lossless


def test_a_run_goes_on_where_it_stopped_and_refuses_another_one(store):
    before = store.path.read_text()
    lines = before.splitlines()
    store.path.write_text("\n".join(lines[:6]) + "\n")  # the second batch is lost
    assert len(run(store.folder, batch_size=2).load()) == 9
    assert store.path.read_text().startswith("\n".join(lines[:6]))
    with pytest.raises(ValueError, match="batch_size"):
        run(store.folder, batch_size=1)


def test_a_picture_does_not_depend_on_its_batch(store, tmp_path):
    alone = run(tmp_path, batch_size=1)
    assert torch.equal(start_of(flow(), PROMPTS)[2], start_of(flow(), PROMPTS[2:])[0])
    for record in alone.load():
        if record.method != "cut":
            other = next(r for r in store.load() if (r.method, r.key) == (record.method, record.key))
            gap = alone.images([record])[0].int() - store.images([other])[0].int()
            assert gap.abs().max() <= 1


def test_records_are_read_back(store):
    record = store.load()[0]
    assert FlowRecord.from_json(json.loads(store.path.read_text().splitlines()[0])) in store.load()
    assert replace(record, difference=2e-3).percent_equal(record) == 0
    assert RecordStore(store.folder, store.identity, kind=FlowRecord).load() == store.load()


def test_the_shared_report_shows_flows(store, tmp_path):
    result = measure_methods(store, METHODS, PROMPTS, QualityMeter(QualityMetrics(), None))
    assert result.methods["jacobi"].equal_to_ar == 1
    assert result.methods["cut"].equal_to_ar == 0
    table = markdown_table(result)
    assert "| jacobi | tolerance | 100 %" in table
    assert "| cut | tolerance (lossy) | 0 %" in table
    files = write_report(result, {}, folder=tmp_path)
    found = json.loads(files.json.read_text())["methods"]["jacobi"]
    assert found["config"]["schedules"][0] == {
        "window": 0, "segments": 1, "tolerance": 1e-5, "max_passes": 0, "guess": "given",
    }  # fmt: skip
    assert "jacobi" in files.html.read_text()
