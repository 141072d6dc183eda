"""What judges of benchmarks wrote becomes numbers of the report, and only where it is of its images."""

import json
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import gmean

from sjd2_lightning.evaluation.judged import with_judged
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
    judged = with_judged(result, "geneval", "", path)
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
    assert with_judged(result, "geneval", "", path).methods["ar"].measured["geneval"].value == 0.5
    without = with_judged(result, "geneval", "", path, num_resamples=0)
    assert without.methods["sjd"].measured["geneval"].interval is None


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
        with_judged(result, "geneval", "", path)


SCORES = {"p0": (1.0, 0.75, 0.5, 0.25), "p1": (0.0, 0.0, 1.0, 1.0), "p2": (0.125, 0.0, 0.0, 1.0)}


def dpg_file(method: str, scores=SCORES, end: bool = True) -> str:
    """As the judge writes it: a line a grid, then categories and the whole."""
    lines = [
        f"runs, mine/dpg/{method}/{key}.png, " + ", ".join(map(str, [*own, sum(own) / len(own)]))
        for key, own in scores.items()
    ]
    whole = 100 * np.mean([np.mean(own) for own in scores.values()])
    lines += [f"Model: {method}", "L1 category scores:", "\tentity: 91.5", "\tother: 40.0"]
    lines += ["L2 category scores:", "\tentity - whole: 90.0", f"Image path: runs, mine/dpg/{method}"]
    lines += ["Save results to: r.txt", f"DPG-Bench score: {whole}"]
    return "\n".join(lines[: None if end else len(scores)]) + "\n"


def test_scores_of_dpg_bench_are_those_of_its_judge(result, tmp_path):
    path = tmp_path / "results.txt"
    path.write_text(dpg_file("ar") + dpg_file("sjd", {**SCORES, "p2": (0.0, 0.0, 0.0, 1.0)}))
    judged = with_judged(result, "dpg", "", path)
    found = judged.methods["ar"].measured
    assert found["dpg"].value == pytest.approx(100 * (0.625 + 0.5 + 0.28125) / 3)
    assert found["dpg"].interval[0] < found["dpg"].value < found["dpg"].interval[1]
    assert (found["dpg_entity"].value, found["dpg_entity"].interval) == (91.5, None)
    assert {key for key in found if key.startswith("dpg")} == {"dpg", "dpg_entity", "dpg_other"}
    assert (found["dpg"].num_images, found["dpg_entity"].num_images) == (12, 3)
    assert "of the last image of each prompt" in found["dpg_entity"].protocol
    for said in ("DPG-Bench's judge", "sha256", "Apache licence 2.0"):
        assert said in found["dpg"].protocol
    assert judged.methods["sjd"].measured["dpg"].value < found["dpg"].value
    assert "DPG-Bench" in markdown_table(judged)
    path.write_text(dpg_file("ar", end=False))
    plain = with_judged(result, "dpg", "", path).methods["ar"].measured
    assert [key for key in plain if key.startswith("dpg")] == ["dpg"], "of a judge that was stopped early"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "it is empty"),
        ("hello\n", r"line 1 is none of DPG-Bench's judge \(it is no path with five numbers"),
        ("a/ar/p0.png, 1, 1\n", "it is no path with five numbers behind it.*--pic-num 4"),
        ("a/ar/p0.png, 1, 0, 0, 0, 0.5\n", "its last number is not the mean of the four before"),
        ("a/ar/p0.png, 4, 4, 4, 4, 4\n", "each from 0 to 1"),
        ("a/ar/p0.png, 1, x, 0, 0, 0.5\n", "line 1 is none"),
        (dpg_file("other"), "of the method other, which is not compared here; methods are ar, sjd"),
        (dpg_file("ar", {"p0": SCORES["p0"]}), "of ar it has no line of p1"),
        (dpg_file("ar").replace("p2", "p7"), "of ar it has no line of p2"),
        (dpg_file("ar").split("\n", 1)[1], "of ar it says .* and its lines have the mean"),
    ],
)
def test_what_is_none_of_dpg_bench_is_refused(result, tmp_path, content, message):
    path = tmp_path / "results.txt"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        with_judged(result, "dpg", "", path)


PROBABILITIES = [[1.0, 0.5, 1.0000000387], [0.25, 0.0], [0.5, 0.5]]
SKILLS = [["count", "attribute", "object"], ["object", "verb"], ["count", "object"]]


@pytest.fixture
def geneval2(result, tmp_path):
    """The result with keys as GenEval 2's prompts have, and the file of its prompts."""
    methods = {}
    for name, method in result.methods.items():
        own = [record for record in method.records if "-r" not in record.key]
        records = tuple(replace(record, key=f"{number:05d}") for number, record in enumerate(own))
        methods[name] = replace(method, records=records)
    source = tmp_path / "geneval2_data.jsonl"
    lines = [json.dumps({"prompt": f"a {number}", "skills": own}) for number, own in enumerate(SKILLS)]
    source.write_text("\n".join(lines) + "\n")
    return replace(result, methods=methods), source


def test_scores_of_geneval_2_are_those_of_its_judge(geneval2, tmp_path):
    result, source = geneval2
    folder = tmp_path / "scores"
    folder.mkdir()
    (folder / "ar.json").write_text(json.dumps(PROBABILITIES))
    (folder / "sjd.json").write_text(json.dumps([[1, 1, 1], [1, 1], [1, 1]]))
    judged = with_judged(result, "geneval2", source, folder)
    found = judged.methods["ar"].measured
    with np.errstate(divide="ignore"):
        wanted = 100 * np.mean([gmean(own) for own in PROBABILITIES])
    assert found["geneval2"].value == pytest.approx(wanted)
    assert found["geneval2_am"].value == pytest.approx(100 * np.mean([np.mean(own) for own in PROBABILITIES]))
    assert found["geneval2"].interval[0] < wanted < found["geneval2"].interval[1]
    skills = {key.removeprefix("geneval2_"): found[key].value for key in found if key.startswith("geneval2_")}
    assert skills.pop("am")
    assert skills == pytest.approx({"attribute": 50, "count": 75, "object": 100 * 1.75 / 3, "verb": 0})
    assert "not for commerce" in found["geneval2"].protocol
    assert judged.methods["sjd"].measured["geneval2"].value == 100
    assert "GenEval 2, GM" in markdown_table(judged)
    alone = with_judged(result, "geneval2", source, folder / "ar.json", num_resamples=0)
    assert alone.methods["ar"].measured["geneval2"].interval is None
    assert "geneval2" not in alone.methods["sjd"].measured


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is none of GenEval 2's judge"),
        ("{}", "it has 0 prompts, and geneval2_data.jsonl 3"),
        ("[[1], [1, 1], [1, 1]]", "prompt 0 has 1 scores for 3 questions"),
        ('[[1, 1, "x"], [1, 1], [1, 1]]', "a score of prompt 0 is no probability"),
        ("[[1, 1, 1], [1, 2], [1, 1]]", "a score of prompt 1 is no probability"),
        ("[1, 2, 3]", r"is none of GenEval 2's judge.*soft_tifa_gm, named METHOD\.json"),
    ],
)
def test_what_is_none_of_geneval_2_is_refused(geneval2, tmp_path, content, message):
    result, source = geneval2
    path = tmp_path / "ar.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        with_judged(result, "geneval2", source, path)


def test_files_of_geneval_2_are_named_by_methods(geneval2, tmp_path):
    result, source = geneval2
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(PROBABILITIES))
    with pytest.raises(ValueError, match=r"of the method mine.* named by the files, METHOD\.json"):
        with_judged(result, "geneval2", source, path)
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="none: it is empty"):
        with_judged(result, "geneval2", source, tmp_path / "none")
    source.write_text('{"prompt": "a"}\n')
    with pytest.raises(ValueError, match="a line has no list of skills"):
        with_judged(result, "geneval2", source, path)
