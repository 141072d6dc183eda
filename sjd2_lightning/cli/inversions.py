"""`evaluate.py` with the group `flow`: ways to invert a TarFlow, in the report of every evaluation."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sjd2_lightning.cli.task_report import write_task_report
from sjd2_lightning.config.groups import shipped
from sjd2_lightning.config.reading import save_config
from sjd2_lightning.config.runs import EvaluateConfig
from sjd2_lightning.evaluation.flow_methods import FlowEvaluation, FlowMethod
from sjd2_lightning.run.files import write_whole
from sjd2_lightning.run.stages import stage

if TYPE_CHECKING:
    from sjd2_lightning.evaluation.flow_blocks import BlockFigures
    from sjd2_lightning.evaluation.prompts import PromptItem
    from sjd2_lightning.evaluation.references import ReferenceSet
    from sjd2_lightning.evaluation.results import EvaluationResult
    from sjd2_lightning.metrics.alignment import CLIPScorer
    from sjd2_lightning.models.tarflow import TarFlow


def evaluate_flow(
    config: EvaluateConfig,
    settings: FlowEvaluation,
    prompts: Sequence[PromptItem],
    device: str,
    hand_out: Callable[..., None],
) -> dict[str, Any]:
    """Draws the prompts by every inversion and writes the report; blocks.md beside it has a line a block.

    Args:
        config: the evaluation.
        settings: its group `flow`.
        prompts: prompts with their seeds.
        device: name of the device.
        hand_out: does what stands behind every report.

    Returns:
        What report.json holds.

    Raises:
        ValueError: weights, prompts or the folder of images cannot be used.
    """
    with stage("loading libraries"):
        from sjd2_lightning.cli.build import variety_of
        from sjd2_lightning.evaluation.flow_runs import invert_methods
        from sjd2_lightning.evaluation.quality import QualityMeter, QualityMetrics
        from sjd2_lightning.evaluation.results import measure_methods
        from sjd2_lightning.evaluation.scene_judge import scene_reference
        from sjd2_lightning.metrics.alignment import load_clip_scorer
        from sjd2_lightning.models.tarflow import load_tarflow

    run_dir = Path(config.run_dir)
    with stage("loading the weights"):
        flow = load_tarflow(settings.weights).to(device)
        scorer = load_clip_scorer(shipped(settings.clip_dir))
    texts = [item.prompt for item in prompts]
    vectors = dict(zip(texts, scorer.embed_captions(texts), strict=True))
    save_config(config, run_dir / "evaluate.yaml")
    methods = flow_methods(settings, flow.sizes.num_blocks)
    if settings.auto:
        with stage("timing inversions of each block"):
            batch = prompts[: config.batch_size]
            methods["auto"] = fastest_method(flow, settings, batch, vectors)
    store = invert_methods(
        flow,
        vectors,
        methods,
        prompts,
        run_dir,
        batch_size=config.batch_size,
        denoise=settings.denoise,
        replace=config.replace_images,
    )
    number = max(settings.num_measured, len(prompts))
    reference = scene_reference(flow.sizes.image_size, number, config.seed, variety_of(config.data))
    result = measure_methods(store, methods, prompts, QualityMeter(QualityMetrics(), reference))
    with stage("measuring the blocks"):
        figures = figures_of_blocks(flow, scorer, reference.part(range(settings.num_measured)))
        write_whole(run_dir / "blocks.md", "\n".join(block_lines(figures, result)) + "\n")
        write_whole(run_dir / "blocks.json", json.dumps(block_objects(figures, result), indent=1) + "\n")
    found = write_task_report(
        config, result, flow, settings.weights, result.store.identity["weights"], hand_out
    )
    print(f"blocks:  {run_dir / 'blocks.md'}")
    return found | {"blocks": block_objects(figures, result)}


def flow_methods(settings: FlowEvaluation, num_blocks: int) -> dict[str, FlowMethod]:
    """The inversions that the configuration names, each with one schedule for all blocks."""
    return {
        name: FlowMethod((schedule,) * num_blocks, settings.guidance)
        for name, schedule in settings.inversions.items()
    }


def fastest_method(
    flow: TarFlow, settings: FlowEvaluation, batch: Sequence[PromptItem], vectors: Mapping[str, Any]
) -> FlowMethod:
    """The method of `auto`: for each block the schedule that was fastest for a batch of prompts."""
    import torch

    from sjd2_lightning.evaluation.flow_blocks import fastest_schedules
    from sjd2_lightning.evaluation.flow_runs import start_of

    device = flow.dropped_text.device
    text = torch.stack([vectors[item.prompt] for item in batch]).to(device)
    z = start_of(flow, batch).to(device)
    schedules = settings.inversions
    names = fastest_schedules(flow, z, text, schedules, settings.guidance, settings.repeats)
    return FlowMethod(tuple(schedules[name] for name in names), settings.guidance)


def figures_of_blocks(flow: TarFlow, scorer: CLIPScorer, pictures: ReferenceSet) -> list[BlockFigures]:
    """CRM, IGM and one-pass residual of each block, on held-out pictures."""
    import torch

    from sjd2_lightning.evaluation.flow_blocks import block_figures

    device = flow.dropped_text.device
    pixels = torch.stack(list(pictures.images)).permute(0, 3, 1, 2).to(device).float() / 255
    text = scorer.embed_captions(pictures.captions).to(device)
    return block_figures(flow, flow.noisy(pixels, torch.Generator(device).manual_seed(0)), text)


def block_objects(figures: Sequence[BlockFigures], result: EvaluationResult) -> list[dict[str, Any]]:
    """An object for each block, the first inverted first: its figures, and mean passes of each method."""
    return [
        asdict(own) | {"passes": {name: passes[turn] for name, passes in mean_passes(result).items()}}
        for turn, own in enumerate(reversed(figures))
    ]


def mean_passes(result: EvaluationResult) -> dict[str, list[float]]:
    """Passes of each block, in the order of inversion, in the mean over the pictures of each method."""
    import numpy as np

    rows: dict[str, list[Any]] = {name: list(method.records) for name, method in result.methods.items()}
    return {
        name: np.mean([record.block_passes for record in records], axis=0).tolist()
        for name, records in rows.items()
    }


def block_lines(figures: Sequence[BlockFigures], result: EvaluationResult) -> list[str]:
    """The same as a Markdown table, with the largest difference of a pixel from the loop below."""
    from sjd2_lightning.report.table import markdown_lines

    names = list(result.methods)
    headings = ["block", "CRM", "IGM, guess z", "IGM, guess 0", "one pass", *names]
    cells = [
        [
            str(own["block"]),
            *(f"{own[key]:.2f}" for key in ("crm", "igm_given", "igm_zero", "one_pass")),
            *(f"{own['passes'][name]:.1f}" for name in names),
        ]
        for own in block_objects(figures, result)
    ]
    rows: dict[str, list[Any]] = {name: list(method.records) for name, method in result.methods.items()}
    most = [f"{name} {max(record.difference for record in own):.1e}" for name, own in rows.items()]
    return [
        "# Blocks, the first inverted first",
        "",
        *markdown_lines(headings, cells, num_texts=1),
        "",
        f"Largest difference of a pixel in [-1, 1] from the loop: {', '.join(most)}.",
    ]
