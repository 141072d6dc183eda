"""`evaluate.py` with the group `thoughts`: ways to come to an answer, in the report of every evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sjd2_lightning.cli.task_report import write_task_report
from sjd2_lightning.config.reading import save_config
from sjd2_lightning.config.runs import EvaluateConfig
from sjd2_lightning.evaluation.thought_methods import ThoughtEvaluation
from sjd2_lightning.run.files import write_whole
from sjd2_lightning.run.stages import stage

if TYPE_CHECKING:
    from sjd2_lightning.evaluation.results import EvaluationResult
    from sjd2_lightning.evaluation.thought_runs import Answering

_NUM_PROBLEMS = 500  # where `num_prompts` does not say


def evaluate_thoughts(
    config: EvaluateConfig, settings: ThoughtEvaluation, device: str, hand_out: Callable[..., None]
) -> dict[str, Any]:
    """Answers held-out problems in every way and writes the report; answers.md beside it shows some.

    Args:
        config: the evaluation.
        settings: its group `thoughts`.
        device: name of the device.
        hand_out: does what stands behind every report.

    Returns:
        What report.json holds.

    Raises:
        ValueError: weights, problems or the folder of cards cannot be used.
    """
    with stage("loading libraries"):
        from sjd2_lightning.evaluation.quality import QualityMeter, QualityMetrics
        from sjd2_lightning.evaluation.results import measure_methods
        from sjd2_lightning.evaluation.thought_runs import answer_methods, problem_prompts, with_accuracy

    run_dir = Path(config.run_dir)
    number = config.num_prompts or _NUM_PROBLEMS
    with stage("reading the problems"):
        problems = settings.source.held_out(number, config.seed)
    prompts = problem_prompts(problems, config.seed)
    with stage("loading the weights"):
        ways = ways_of(settings, device)
    save_config(config, run_dir / "evaluate.yaml")
    store = answer_methods(
        ways, prompts, problems, run_dir, batch_size=config.batch_size, replace_other=config.replace_images
    )
    methods = {name: own.method for name, own in ways.items()}
    meter = QualityMeter(QualityMetrics(), None)
    result = with_accuracy(measure_methods(store, methods, prompts, meter))
    write_whole(run_dir / "answers.md", "\n".join(answer_lines(result, config.report.num_images)) + "\n")
    found = write_task_report(
        config,
        result,
        next(iter(ways.values())).thinker,
        settings.weights,
        result.store.identity["weights"],
        hand_out,
    )
    print(f"answers: {run_dir / 'answers.md'}")
    return found


def ways_of(settings: ThoughtEvaluation, device: str) -> dict[str, Answering]:
    """The ways to compare, each with its model; weights of one folder are loaded once.

    Raises:
        ValueError: a folder holds no thinking model, or one without latents for a way that passes over them.
    """
    from sjd2_lightning.evaluation.thought_runs import Answering
    from sjd2_lightning.models.thinker import Thinker, load_thinker

    loaded: dict[str, Thinker] = {}
    found = {}
    for name in settings.compare:
        way = settings.ways[name]
        folder = way.weights or settings.weights
        if folder not in loaded:
            loaded[folder] = load_thinker(folder).to(device)
        if way.kind == "latents" and not loaded[folder].settings.num_latents:
            raise ValueError(f"thoughts.ways.{name}: the weights in {folder} have no latents; take kind=none")
        found[name] = Answering(loaded[folder], way, settings.answer_tokens, settings.chain_tokens)
    return found


def answer_lines(result: EvaluationResult, number: int) -> list[str]:
    """A Markdown table of the first problems: what each way thought and answered, wrong ones struck out."""
    from sjd2_lightning.report.table import markdown_lines

    rows: dict[str, Sequence[Any]] = {name: method.records for name, method in result.methods.items()}
    cells = []
    for place, item in enumerate(result.prompts[:number]):
        records = [own[place] for own in rows.values()]
        shown = [r.answer if r.right else f"~~{r.answer}~~" for r in records]
        cells.append([item.prompt, *(f"{r.thought} → {a}" for r, a in zip(records, shown, strict=True))])
    largest = [f"{name} {max(r.residual for r in own):.1e}" for name, own in rows.items()]
    return [
        "# Answers",
        "",
        "What each way thought, which is for latents the likeliest token at each; wrong answers struck out.",
        "",
        *markdown_lines(["question", *rows], cells, num_texts=1 + len(rows)),
        "",
        f"Largest change of a number of a latent in the last pass: {', '.join(largest)}.",
    ]
