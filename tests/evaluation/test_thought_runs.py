"""Ways to come to an answer in the shared comparison: records, equality, continuing, tables."""

import json
from dataclasses import replace

import numpy as np
import pytest

from sjd2_lightning.data.sources.arithmetic import ProblemSource
from sjd2_lightning.evaluation.quality import QualityMeter, QualityMetrics
from sjd2_lightning.evaluation.results import measure_methods
from sjd2_lightning.evaluation.store import RecordStore
from sjd2_lightning.evaluation.thought_methods import ThoughtMethod
from sjd2_lightning.evaluation.thought_runs import (
    Answering,
    ThoughtRecord,
    answer_methods,
    card,
    problem_prompts,
    with_accuracy,
)
from sjd2_lightning.fixed_point import Schedule
from sjd2_lightning.models.thinking import answers_of, think
from sjd2_lightning.report.table import markdown_table
from sjd2_lightning.report.write import write_report
from tests.models.test_thinking import thinker

PROBLEMS = ProblemSource().held_out(5, 0)
PROMPTS = problem_prompts(PROBLEMS, 0)
METHODS = {
    "ar": ThoughtMethod(schedule=Schedule(window=1)),
    "jacobi": ThoughtMethod(schedule=Schedule(tolerance=0)),
    "pccot": ThoughtMethod(schedule=Schedule(max_passes=2, tolerance=0)),
    "pause": ThoughtMethod("pause"),
    "no_cot": ThoughtMethod("none"),
    "cot": ThoughtMethod("steps"),
}


def run(folder, **kwargs):
    model = thinker(seed=5)
    ways = {name: Answering(model, method, 4, 10) for name, method in METHODS.items()}
    return answer_methods(ways, PROMPTS, PROBLEMS, folder, **kwargs)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return run(tmp_path_factory.mktemp("thoughts"), batch_size=2)


def test_each_way_has_its_passes_and_jacobi_is_the_chain(store):
    rows = {(record.method, record.key): record for record in store.load()}
    assert len(rows) == len(METHODS) * len(PROMPTS)
    assert len({rows["ar", item.key].answer_ids for item in PROMPTS}) > 1, (
        "answers differ, so equality says something"
    )
    for item in PROMPTS:
        own = {name: rows[name, item.key] for name in METHODS}
        assert own["jacobi"].percent_equal(own["ar"]) == 100
        assert own["jacobi"].thought == own["ar"].thought
        assert own["ar"].accepted == (1,) * 7
        assert own["pccot"].accepted == (1, 1, 5)
        assert own["pause"].accepted == (7,)
        assert own["no_cot"].accepted == (1,)
        assert own["cot"].nfe == own["cot"].num_generated <= 10
        assert own["jacobi"].nfe <= 7
        assert own["pccot"].residual > 0 == own["pause"].residual == own["cot"].residual
        for record in own.values():
            assert sum(record.accepted) == record.num_generated == len(record.settled_iteration)
            assert record.settled_iteration[-1] == record.nfe - 1
    assert [name for name, method in METHODS.items() if method.lossless] == ["ar", "jacobi"]


def test_an_answer_is_right_to_the_letter(tmp_path):
    model = thinker(seed=5)
    ways = {"ar": Answering(model, METHODS["ar"], 4, 10)}
    given = {record.key: record.answer for record in run(tmp_path / "all").load() if record.method == "ar"}
    problems = [
        problem._replace(answer=given[item.key] + ("" if number % 2 else "0"))
        for number, (item, problem) in enumerate(zip(PROMPTS, PROBLEMS, strict=True))
    ]
    found = {
        record.key: record.right
        for record in answer_methods(ways, PROMPTS, problems, tmp_path / "own").load()
    }
    assert [found[item.key] for item in PROMPTS] == [False, True, False, True, False]


def test_answers_are_those_of_the_model(store):
    model = thinker(seed=5)
    for name, num_passes in (("ar", 6), ("pccot", 2), ("pause", 0)):
        wanted = answers_of(model, think(model, [item.prompt for item in PROMPTS], 6, num_passes), 4)
        found = {record.key: list(record.answer_ids) for record in store.load() if record.method == name}
        assert [found[item.key] for item in PROMPTS] == wanted


def test_a_run_goes_on_where_it_stopped_and_refuses_another_one(store):
    lines = store.path.read_text().splitlines()
    store.path.write_text("\n".join(lines[: 4 * len(METHODS)]) + "\n")  # the last batch is lost
    assert len(run(store.folder, batch_size=2).load()) == len(METHODS) * len(PROMPTS)
    with pytest.raises(ValueError, match="batch_size"):
        run(store.folder, batch_size=1)


def test_records_are_read_back(store):
    record = store.load()[0]
    assert ThoughtRecord.from_json(json.loads(store.path.read_text().splitlines()[0])) in store.load()
    assert replace(record, answer_ids=(9, 9)).percent_equal(record) == 0
    assert RecordStore(store.folder, store.identity, kind=ThoughtRecord).load() == store.load()


def test_a_card_is_green_where_the_answer_is_right(store):
    record = replace(store.load()[0], answer="3", thought="1 2")
    right, wrong = (card(replace(record, right=right)).astype(int) for right in (True, False))
    assert right.shape == (96, 176, 3)
    assert not np.array_equal(right, wrong)
    lower = slice(64, 96)
    assert (right[lower, :, 1] > right[lower, :, 0] + 50).any()
    assert (wrong[lower, :, 0] > wrong[lower, :, 1] + 50).any()


def test_the_shared_report_shows_answers(store, tmp_path):
    result = with_accuracy(measure_methods(store, METHODS, PROMPTS, QualityMeter(QualityMetrics(), None)), 50)
    assert result.methods["jacobi"].equal_to_ar == 1
    table = markdown_table(result)
    assert "accuracy" in table
    assert "| jacobi | tolerance | 100 %" in table
    assert "| pccot | passes (lossy) |" in table
    files = write_report(result, {}, folder=tmp_path)
    found = json.loads(files.json.read_text())
    own = found["methods"]["pccot"]
    right = [record.right for record in result.methods["pccot"].records]
    assert own["accuracy"] == sum(right) / len(right)
    low, high = own["accuracy_interval"]
    assert 0 <= low <= own["accuracy"] <= high <= 1
    assert high - low > 0.3, "five answers say little"
    assert own["accuracy_minus_ar"] is not None
    assert own["config"]["schedule"]["max_passes"] == 2
    assert "question included" in found["metrics"]["nfe"]["protocol"]
    assert "pccot" in files.html.read_text()
