"""What GenEval's judge, which is a program of its own, said of images that were decoded here.

Source: Ghosh et al. 2023; its `evaluate_images.py` writes a line of JSON an image, with `filename`, `tag` and
`correct`, and its overall score is the mean over tags of the share of images that are correct.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from sjd2_lightning.evaluation.geneval_dpg import NUM_SAMPLES
from sjd2_lightning.evaluation.prompts import repeat_key
from sjd2_lightning.evaluation.results import EvaluationResult
from sjd2_lightning.metrics.bootstrap import MetricResult, percentile_interval
from sjd2_lightning.run.files import sha256_of_file, text_of

# Verdicts of one method: tag and whether it is correct, by the key of an image
Verdicts = Mapping[str, tuple[str, bool]]


def with_judged(result: EvaluationResult, path: str | Path, num_resamples: int = 2000) -> EvaluationResult:
    """The result with `geneval` among the numbers of its methods, and with `geneval_<tag>`.

    Args:
        result: result of an evaluation with `benchmark=geneval`.
        path: lines of the judge, of one method or of several behind each other.
        num_resamples: bootstrap resamples over prompts; 0 leaves intervals out.

    Raises:
        ValueError: a file that is none of the judge, or one of other images; nothing is guessed.
    """
    path = Path(path)
    found = read_verdicts(path)
    protocol = (
        "GenEval's judge, run outside of this package, which does not know its weights; its lines have "
        f"sha256 {sha256_of_file(path)}; GenEval is under the MIT licence"
    )
    methods = dict(result.methods)
    if unknown := sorted(found.keys() - methods.keys()):
        raise ValueError(
            f"report.judged={path}: of the method {unknown[0]}, which is not compared here; methods are "
            f"{', '.join(methods)}, named by the folders that the judge read, geneval/METHOD/..."
        )
    for name, verdicts in found.items():
        keys = {record.key for record in methods[name].records}
        if keys != verdicts.keys():
            differs = sorted(keys ^ verdicts.keys())[0]
            side = "has no line of" if differs in keys else "has a line of another image,"
            raise ValueError(
                f"report.judged={path}: of {name} it {side} {differs}; judge the whole folder again"
            )
        scores = scores_of(verdicts, protocol, num_resamples)
        methods[name] = replace(methods[name], measured={**methods[name].measured, **scores})
    return replace(result, methods=methods)


def read_verdicts(path: Path) -> dict[str, Verdicts]:
    """Verdicts of each method in a file of the judge; raises ValueError for a line that is none."""
    found: dict[str, dict[str, tuple[str, bool]]] = defaultdict(dict)
    try:
        lines = [line for line in text_of(path.read_bytes()).splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise ValueError(f"report.judged={path}: cannot be read: {error}") from error
    for number, line in enumerate(lines, start=1):
        try:
            fields = json.loads(line)
            method, key, _, image = Path(fields["filename"]).parts[-4:]
            sample, correct = int(Path(image).stem), fields["correct"]
            if not isinstance(correct, bool) or not 0 <= sample < NUM_SAMPLES:
                raise ValueError("`correct` is no truth value, or the image none of four")
            found[method][repeat_key(key, sample)] = (str(fields["tag"]), correct)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"report.judged={path}: line {number} is none of GenEval's judge ({type(error).__name__}: "
                f"{error}); give the --outfile of its evaluate_images.py over <run_dir>/geneval/METHOD"
            ) from error
    if not found:
        raise ValueError(f"report.judged={path}: it is empty")
    return dict(found)


def scores_of(verdicts: Verdicts, protocol: str, num_resamples: int) -> dict[str, MetricResult]:
    """`geneval`, the mean over tags, and `geneval_<tag>`; intervals are over prompts.

    Args:
        verdicts: verdicts of one method.
        protocol: how they came about.
        num_resamples: bootstrap resamples; 0 leaves intervals out.
    """
    prompts: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for key, (tag, correct) in verdicts.items():
        prompts[tag][key.partition("-r")[0]].append(correct)
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


def _result(
    name: str, values: Sequence[float], drawn: Sequence[np.ndarray], num_images: int, protocol: str
) -> MetricResult:
    """The mean of values, with the interval of the means of their resamples."""
    replicates = np.mean(drawn, axis=0)
    interval = percentile_interval(replicates) if len(replicates) else None
    return MetricResult(name, float(np.mean(values)), interval, num_images, protocol)
