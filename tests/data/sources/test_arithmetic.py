"""Problems of arithmetic: right to the last step, held out, read from files of GSM8K-Aug's fields."""

import json
import re
from itertools import islice

import pytest

from sjd2_lightning.data.sources.arithmetic import Problem, ProblemSource, is_held_out, read_problems

REAL = {"question": "Ann has 16 eggs ...?", "steps": ["<<16-3-4=9>>", "<<9*2=18>>"], "answer": "18"}


@pytest.mark.parametrize("source", [ProblemSource(), ProblemSource(6, 10)])
def test_steps_lead_from_the_question_to_the_answer(source):
    for problem in islice(source.training(0), 200):
        chain, modulus = problem.question.split(" mod ")
        value, parts = int(chain[0]), re.findall(r"([+*-])(\d)", chain[1:])
        assert len(parts) == len(problem.steps) == source.num_operations
        for (sign, number), step in zip(parts, problem.steps, strict=True):
            result = eval(f"{value}{sign}{number}") % int(modulus)
            assert step == f"<<{value}{sign}{number}={result}>>"
            value = result
        assert problem.answer == str(value) == problem.results[-1]
        assert problem.leading_steps == problem.steps[:-1]


def test_held_out_problems_are_never_trained_on_and_all_differ():
    source = ProblemSource(num_operations=3)
    held_out = source.held_out(300, seed=0)
    assert len({problem.question for problem in held_out}) == 300
    assert all(map(is_held_out, held_out))
    trained = {problem.question for problem in islice(source.training(0), 5000)}
    assert not trained & {problem.question for problem in held_out}
    assert source.held_out(20, seed=0) == held_out[:20]
    assert source.held_out(20, seed=1) != held_out[:20]
    assert next(source.training(0)) != next(source.training(1))
    with pytest.raises(ValueError, match=r"num_operations=2 modulo 4, and 300 were asked for"):
        ProblemSource(2, 4).held_out(300, seed=0)


def test_a_file_is_read_in_another_order_each_round(tmp_path):
    path = tmp_path / "train.jsonl"
    rows = [{**REAL, "answer": number} for number in range(5)]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert read_problems(path)[3] == Problem(REAL["question"], ("<<16-3-4=9>>", "<<9*2=18>>"), "3")
    assert read_problems(path)[3].results == ("9", "18")
    source = ProblemSource(train_file=str(path), test_file=str(path))
    assert source.problems() == []
    rounds = [[problem.answer for problem in islice(source.training(0), 5 * n, 5 * n + 5)] for n in range(3)]
    assert all(sorted(own) == list("01234") for own in rounds)
    assert len(set(map(tuple, rounds))) > 1
    assert [problem.answer for problem in source.held_out(2, 0)] == ["0", "1"]
    with pytest.raises(ValueError, match="holds 5 problems; 6 were asked for"):
        source.held_out(6, 0)


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        "3",
        '{"question": "x"}',
        json.dumps({**REAL, "steps": "no"}),
        json.dumps({**REAL, "question": 1}),
    ],
)
def test_a_wrong_line_is_named(line, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text(f"{json.dumps(REAL)}\n{line}\n")
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))}, line 2 is no problem"):
        read_problems(path)


def test_wrong_values_are_named(tmp_path):
    assert ProblemSource(1).problems() == ["num_operations=1: must be at least 2"]
    assert (
        ProblemSource(train_file="x", test_file="x")
        .problems()[0]
        .startswith("train_file=x: there is no such file")
    )
    (line,) = ProblemSource(train_file=__file__).problems()
    assert line.startswith("test_file=null: give both files")
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    with pytest.raises(ValueError, match="holds no problems"):
        read_problems(empty)
