"""What judges of benchmarks, which are programs of their own, said of images that were decoded here.

GenEval (Ghosh et al. 2023): `evaluate_images.py` writes a line of JSON an image, with `filename`, `tag` and
`correct`; its overall score is the mean over tags of the share of images that are correct.

DPG-Bench (Hu et al. 2024): `compute_dpg_bench.py` writes a line a prompt, path of the grid, score of each of
its four images and their mean, behind them the scores of categories and of all, in hundredths.

GenEval 2 (Kamath et al. 2025): `evaluation.py` writes a list over prompts of a list of probabilities, one of
each question in the order of `geneval2_data.jsonl`. A prompt's score is their arithmetic mean (Soft-TIFA AM)
or geometric mean (GM); both are averaged over prompts.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from sjd2_lightning.data.captions import json_of
from sjd2_lightning.evaluation.geneval_dpg import num_samples
from sjd2_lightning.evaluation.prompts import repeat_key
from sjd2_lightning.evaluation.results import EvaluationResult
from sjd2_lightning.metrics.bootstrap import MetricResult, mean_result, percentile_interval
from sjd2_lightning.run.files import sha256_of_file, text_of

# Numbers of one method by their keys, from how they came about and the number of resamples.
Scores = Callable[[str, int], dict[str, MetricResult]]


@dataclass(frozen=True)
class Judgement:
    """What a judge said of one method's images.

    Attributes:
        keys: keys of the images that it is about.
        scores: the numbers; see `Scores`.
    """

    keys: frozenset[str]
    scores: Scores


def with_judged(
    result: EvaluationResult, benchmark: str, source: str | Path, path: str | Path, num_resamples: int = 2000
) -> EvaluationResult:
    """The result with the judge's numbers among those of its methods.

    They are `geneval` and `geneval_<tag>`, `dpg` and `dpg_<category>`, or `geneval2`, `geneval2_am` and
    `geneval2_<skill>`.

    Args:
        result: result of an evaluation of the benchmark.
        benchmark: "geneval", "dpg" or "geneval2".
        source: where the prompts of the benchmark were read from.
        path: what the judge wrote, of one method or of several.
        num_resamples: bootstrap resamples over prompts; 0 leaves intervals out.

    Raises:
        ValueError: a file that is none of the judge, or one of other images; nothing is guessed.
    """
    path = Path(path)
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if benchmark == "geneval2":
        found = {file.stem: _probabilities(file, Path(source)) for file in files}
    else:
        found = {"geneval": _verdicts, "dpg": _grids}[benchmark](path)
    if not found:
        raise ValueError(f"report.judged={path}: it is empty")
    title, licence = _JUDGES[benchmark]
    methods = dict(result.methods)
    if unknown := sorted(found.keys() - methods.keys()):
        raise ValueError(
            f"report.judged={path}: of the method {unknown[0]}, which is not compared here; methods are "
            f"{', '.join(methods)}, named by {_NAMED_BY[benchmark]}"
        )
    for name, judgement in found.items():
        keys = {record.key for record in methods[name].records}
        if keys != judgement.keys:
            differs = sorted(keys ^ judgement.keys)[0]
            side = "has no line of" if differs in keys else "has a line of another image,"
            raise ValueError(
                f"report.judged={path}: of {name} it {side} {differs}; judge the whole folder again"
            )
        file = path / f"{name}.json" if path.is_dir() else path
        protocol = (
            f"{title}'s judge, run outside of this package, which does not know its weights; what it wrote "
            f"has sha256 {sha256_of_file(file)}; {title} is under {licence}"
        )
        scores = judgement.scores(protocol, num_resamples)
        methods[name] = replace(methods[name], measured={**methods[name].measured, **scores})
    return replace(result, methods=methods)


_JUDGES = {
    "geneval": ("GenEval", "the MIT licence"),
    "dpg": ("DPG-Bench", "the Apache licence 2.0"),
    "geneval2": ("GenEval 2", "CC BY-NC 4.0, not for commerce"),
}
_NAMED_BY = {
    "geneval": "the folders that the judge read, geneval/METHOD/...",
    "dpg": "the folders that the judge read, dpg/METHOD/...",
    "geneval2": "the files, METHOD.json",
}


def _lines_of(path: Path) -> list[str]:
    try:
        return [line for line in text_of(path.read_bytes()).splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise ValueError(f"report.judged={path}: cannot be read: {error}") from error


def _verdicts(path: Path) -> dict[str, Judgement]:
    """Lines of GenEval's judge by method."""
    found: dict[str, dict[str, tuple[str, bool]]] = defaultdict(dict)
    for number, line in enumerate(_lines_of(path), start=1):
        try:
            fields = json.loads(line)
            method, key, _, image = Path(fields["filename"]).parts[-4:]
            sample, correct = int(Path(image).stem), fields["correct"]
            if not isinstance(correct, bool) or not 0 <= sample < num_samples("geneval"):
                raise ValueError("`correct` is no truth value, or the image none of four")
            found[method][repeat_key(key, sample)] = (str(fields["tag"]), correct)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"report.judged={path}: line {number} is none of GenEval's judge ({type(error).__name__}: "
                f"{error}); give the --outfile of its evaluate_images.py over <run_dir>/geneval/METHOD"
            ) from error
    return {method: Judgement(frozenset(own), _geneval_scores(own)) for method, own in found.items()}


def _geneval_scores(verdicts: Mapping[str, tuple[str, bool]]) -> Scores:
    """`geneval`, the mean over tags, and `geneval_<tag>`; intervals are over prompts.

    Args:
        verdicts: tag and whether it is correct, by the key of an image.
    """

    def scores(protocol: str, num_resamples: int) -> dict[str, MetricResult]:
        prompts: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
        for key, (tag, correct) in verdicts.items():
            prompts[tag][_prompt_of(key)].append(correct)
        rng, whole, drawn = np.random.default_rng(0), [], []
        found = {}
        for tag, own in sorted(prompts.items()):
            shares = np.array([np.mean(samples) for samples in own.values()])
            picks = rng.integers(len(shares), size=(num_resamples, len(shares)))
            whole.append(float(shares.mean()))
            drawn.append(shares[picks].mean(axis=1))
            num = sum(map(len, own.values()))
            found[f"geneval_{tag}"] = _result(f"GenEval, {tag}", whole[-1:], drawn[-1:], num, protocol)
        return {"geneval": _result("GenEval", whole, drawn, len(verdicts), protocol), **found}

    return scores


def _prompt_of(key: str) -> str:
    """Key of an image's prompt."""
    return key.partition("-r")[0]


def _result(
    name: str, values: Sequence[float], drawn: Sequence[np.ndarray], num_images: int, protocol: str
) -> MetricResult:
    """The mean of values, with the interval of the means of their resamples."""
    replicates = np.mean(drawn, axis=0)
    interval = percentile_interval(replicates) if len(replicates) else None
    return MetricResult(name, float(np.mean(values)), interval, num_images, protocol)


_ROUNDING = 1e-6  # of sums of a judge's scores, which it writes with all their digits


def _grids(path: Path) -> dict[str, Judgement]:
    """Lines of DPG-Bench's judge by method, with the categories behind them."""
    grids: dict[str, dict[str, list[float]]] = defaultdict(dict)
    categories: dict[str, dict[str, float]] = defaultdict(dict)
    wholes: dict[str, float] = {}
    method, level = "", ""
    for number, line in enumerate(_lines_of(path), start=1):
        name, _, value = (part.strip() for part in line.rpartition(":"))
        try:
            if line.startswith("Model: "):
                method = line.removeprefix("Model: ").strip()
            elif line.rstrip().endswith("category scores:"):
                level = line[:2]
            elif line.startswith("\t"):
                if level == "L1":
                    categories[method][name] = float(value)
            elif line.startswith("DPG-Bench score: "):
                wholes[method] = float(value)
            elif not line.startswith(("Image path: ", "Save results to: ")):
                folder, key, scores = _grid_line(line)
                grids[folder][key] = scores
        except ValueError as error:
            raise ValueError(
                f"report.judged={path}: line {number} is none of DPG-Bench's judge ({error}); give the "
                "--res-path of its compute_dpg_bench.py over <run_dir>/dpg/METHOD, with --pic-num 4"
            ) from error
    for name, own in grids.items():
        mean = 100 * float(np.mean([np.mean(scores) for scores in own.values()]))
        if abs(wholes.get(name, mean) - mean) > 100 * _ROUNDING:
            raise ValueError(
                f"report.judged={path}: of {name} it says {wholes[name]}, and its lines have the mean "
                f"{mean}; the file is not whole, or of several runs"
            )
    return {
        name: Judgement(
            frozenset(repeat_key(key, place) for key, scores in own.items() for place in range(len(scores))),
            _dpg_scores(own, categories[name]),
        )
        for name, own in grids.items()
    }


def _grid_line(line: str) -> tuple[str, str, list[float]]:
    """Method, key of the prompt and scores of its images; raises ValueError where it is none."""
    path, *numbers = line.rsplit(", ", num_samples("dpg") + 1)
    if len(numbers) != num_samples("dpg") + 1 or len(Path(path).parts) < 2:
        raise ValueError("it is no path with five numbers behind it")
    *scores, mean = map(float, numbers)
    if not all(0 <= score <= 1 for score in scores) or abs(np.mean(scores) - mean) > _ROUNDING:
        raise ValueError("its last number is not the mean of the four before, each from 0 to 1")
    folder, file = Path(path).parts[-2:]
    return folder, Path(file).stem, scores


def _dpg_scores(grids: Mapping[str, Sequence[float]], categories: Mapping[str, float]) -> Scores:
    """`dpg`, with an interval over prompts, and `dpg_<category>`, as the judge has them."""

    def scores(protocol: str, num_resamples: int) -> dict[str, MetricResult]:
        means = [100 * float(np.mean(own)) for own in grids.values()]
        whole = mean_result("DPG-Bench", means, protocol, num_resamples)
        num_images = sum(map(len, grids.values()))
        said = f"{protocol}; of the last image of each prompt, as its judge counts"
        return {"dpg": replace(whole, num_images=num_images)} | {
            f"dpg_{name}": MetricResult(f"DPG-Bench, {name}", value, None, len(grids), said)
            for name, value in sorted(categories.items())
        }

    return scores


def _probabilities(path: Path, source: Path) -> Judgement:
    """A file of GenEval 2's judge; the prompts' file says how many questions each has, and of which skill."""
    try:
        skills = [list(json.loads(line)["skills"]) for line in _lines_of(source)]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"benchmark_prompts={source}: a line has no list of skills ({type(error).__name__}); give "
            "geneval2_data.jsonl of GenEval 2's repository"
        ) from error
    try:
        lists = json_of(path.read_bytes())
        if len(lists) != len(skills):
            raise ValueError(f"it has {len(lists)} prompts, and {source.name} {len(skills)}")
        for place, (own, asked) in enumerate(zip(lists, skills, strict=True)):
            if len(own) != len(asked):
                raise ValueError(f"prompt {place} has {len(own)} scores for {len(asked)} questions")
            # probabilities of several spellings of an answer are added up, and round above 1
            if not all(isinstance(score, float | int) and 0 <= score <= 1.01 for score in own):
                raise ValueError(f"a score of prompt {place} is no probability")
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"report.judged={path}: is none of GenEval 2's judge ({error}); give the --output_file of its "
            "evaluation.py with --method soft_tifa_gm, named METHOD.json"
        ) from error
    keys = frozenset(f"{number:05d}" for number in range(len(lists)))
    return Judgement(keys, _tifa_scores(lists, skills))


def _tifa_scores(lists: Sequence[Sequence[float]], skills: Sequence[Sequence[str]]) -> Scores:
    """`geneval2` (GM), `geneval2_am` and `geneval2_<skill>`, in hundredths; the first two with intervals."""

    def scores(protocol: str, num_resamples: int) -> dict[str, MetricResult]:
        with np.errstate(divide="ignore"):  # a probability of 0 makes its prompt's mean 0
            geometric = [100 * float(np.exp(np.mean(np.log(own)))) for own in lists]
        arithmetic = [100 * float(np.mean(own)) for own in lists]
        found = {
            "geneval2": mean_result("GenEval 2, GM", geometric, protocol, num_resamples),
            "geneval2_am": mean_result("GenEval 2, AM", arithmetic, protocol, num_resamples),
        }
        by_skill: dict[str, list[float]] = defaultdict(list)
        for own, asked in zip(lists, skills, strict=True):
            for score, skill in zip(own, asked, strict=True):
                by_skill[skill].append(100 * score)
        for skill, values in sorted(by_skill.items()):
            mean = float(np.mean(values))
            found[f"geneval2_{skill}"] = MetricResult(f"GenEval 2, {skill}", mean, None, len(lists), protocol)
        return found

    return scores
