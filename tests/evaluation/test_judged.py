"""Lines of GenEval's judge become numbers of the report, and only where they are of its images."""

import json

import pytest

from sjd2_lightning.evaluation.judged import read_verdicts, scores_of, with_judged
from sjd2_lightning.evaluation.prompts import repeat_prompts
from sjd2_lightning.report.table import columns, markdown_table
from tests.tools.small_evaluation import METHODS, PROMPTS, evaluate

TAGS = {"p0": "colors", "p1": "colors", "p2": "counting"}
RIGHT = {"p0": (1, 1, 1, 1), "p1": (0, 0, 1, 1), "p2": (0, 0, 0, 1)}


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    settings = {
        "metrics": None,
        "reference": None,
        "methods": {name: METHODS[name] for name in ("ar", "sjd")},
    }
    return evaluate(tmp_path_factory.mktemp("run"), prompts=repeat_prompts(PROMPTS[:3], 4), **settings)


def lines(method: str) -> list[str]:
    """As the judge writes them of a folder of images."""
    return [
        json.dumps(
            {
                "filename": f"outputs/x/geneval/{method}/{key}/samples/{number:04d}.png",
                "tag": TAGS[key],
                "prompt": "a",
                "correct": bool(right),
                "reason": "",
            }
        )
        for key, samples in RIGHT.items()
        for number, right in enumerate(samples)
    ]


def test_scores_are_those_of_the_judge(result, tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text("\n".join(lines("sjd")))
    judged = with_judged(result, path)
    measured = judged.methods["sjd"].measured
    assert measured["geneval_colors"].value == 0.75
    assert measured["geneval_counting"].value == 0.25
    assert measured["geneval"].value == 0.5, "the mean over tags, not over images"
    low, high = measured["geneval"].interval
    assert low < 0.5 < high
    assert (measured["geneval"].num_images, measured["geneval_colors"].num_images) == (12, 8)
    assert "sha256" in measured["geneval"].protocol
    assert "MIT" in measured["geneval"].protocol
    assert "geneval" not in judged.methods["ar"].measured, "of a method without lines nothing is said"
    assert "GenEval" in [column.heading for column in columns(judged)]
    assert "0.500 [" in markdown_table(judged)
    assert "GenEval" not in markdown_table(result)
    path.write_text("\n".join([*lines("sjd"), *lines("ar")]))
    assert with_judged(result, path).methods["ar"].measured["geneval"].value == 0.5
    assert scores_of(read_verdicts(path)["sjd"], "", 0)["geneval"].interval is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "it is empty"),
        (["{}"], "line 1 is none of GenEval's judge .KeyError"),
        (["[1]"], "line 1 is none"),
        (["half"], "line 1 is none"),
        ([line.replace("true", "1") for line in lines("sjd")], "`correct` is no truth value"),
        (lines("sjd2"), "of the method sjd2, which is not compared here; methods are ar, sjd"),
        (lines("sjd")[:-1], "of sjd it has no line of p2-r3; judge the whole folder again"),
        ([*lines("sjd"), lines("sjd")[0].replace("/p0/", "/p9/")], "has a line of another image, p9;"),
    ],
)
def test_lines_of_something_else_are_refused(result, tmp_path, content, message):
    path = tmp_path / "results.jsonl"
    path.write_text("\n".join(content))
    with pytest.raises(ValueError, match=message):
        with_judged(result, path)
