"""`evaluate.py`: decoding methods side by side on the same prompts and seeds."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from sjd2_lightning.cli.check import check_evaluate
from sjd2_lightning.cli.launch import launch
from sjd2_lightning.config.reading import save_config
from sjd2_lightning.config.runs import RANDOM_TAG, EvaluateConfig
from sjd2_lightning.run.harmless import harmless
from sjd2_lightning.run.owner import owned
from sjd2_lightning.run.stages import stage

if TYPE_CHECKING:
    from sjd2_lightning.decoding.config import DecodingConfig
    from sjd2_lightning.evaluation.auto_window import WindowChoice
    from sjd2_lightning.evaluation.prompts import PromptItem
    from sjd2_lightning.evaluation.results import EvaluationResult
    from sjd2_lightning.models.backbone import Backbone, ImageLayout
    from sjd2_lightning.report.write import ReportFiles

log = logging.getLogger(__name__)

SHIPPED_MODEL = "weights/tiny"
EXPORTS = "outputs/train/*/model/backbone.json"  # what plain `python train.py` leaves; sweeps lie deeper


def main() -> None:
    """Entry point of `evaluate.py` and `sjd2-evaluate`."""
    launch("evaluate", evaluate, refuse)


def refuse(cfg: DictConfig) -> str | None:
    """Whether an evaluation can begin, before anything is written; raises as `check_evaluate` does.

    Returns:
        "" where a plan was printed and nothing is to be decoded; None where the evaluation may begin.
    """
    if cfg.print_plan:
        evaluate(cfg)
        return ""
    check_mode(check_evaluate(cfg))
    return None


def evaluate(cfg: DictConfig) -> dict[str, Any]:
    """Decodes the prompts by every method of `compare`, measures the images and writes the report.

    Args:
        cfg: composed from `conf/evaluate.yaml`.

    Returns:
        What report.json holds; with `print_plan` the figures of the plan, and nothing is decoded.

    Raises:
        ConfigError: the configuration has problems (all of them, before anything is loaded).
        ValueError: weights, prompts or the folder of images cannot be used, or another process evaluates
            in `run_dir`.
    """
    if cfg.print_plan:
        with stage("making the plan"):
            from sjd2_lightning.cli.plan import show_decoding_plan

            return show_decoding_plan(cfg)
    config = check_evaluate(cfg)
    check_mode(config)
    with owned(Path(config.run_dir), "evaluate"):
        if config.flow is not None:
            from sjd2_lightning.cli.inversions import evaluate_flow

            prompts, device = chosen_prompts(config), pick_device(config.device)
            return evaluate_flow(config, config.flow, prompts, device, hand_out)
        if config.thoughts is not None:
            from sjd2_lightning.cli.reasoning import evaluate_thoughts

            return evaluate_thoughts(config, config.thoughts, pick_device(config.device), hand_out)
        if config.policies is not None:
            from sjd2_lightning.cli.policies import evaluate_policies

            return evaluate_policies(config, config.policies, pick_device(config.device), hand_out)
        return evaluate_owned(config)


def evaluate_owned(config: EvaluateConfig) -> dict[str, Any]:
    """See `evaluate`: no other evaluation writes in the run's folder."""
    run_dir = Path(config.run_dir)
    weights = weights_folder(config)

    with stage("loading libraries"):
        import torch

        from sjd2_lightning.cli.build import build_reference, decoding_backbone, image_tokenizer_of
        from sjd2_lightning.cli.scorers import build_metrics, left_out
        from sjd2_lightning.evaluation.compare import evaluate_methods
        from sjd2_lightning.evaluation.judged import with_judged
        from sjd2_lightning.report.observe import observe
        from sjd2_lightning.report.write import report_object, write_report
        from sjd2_lightning.run.provenance import collect_provenance, redact, trainings_of

    device = pick_device(config.device)
    torch.manual_seed(config.seed)
    with stage("reading the prompts and real images"):
        prompts = chosen_prompts(config)
        reference = build_reference(config, len(prompts))
    backbone = decoding_backbone(config.model, weights, config.ckpt_path, device)
    layout = backbone.layout(*config.model.image_size)
    methods, windows = chosen_methods(config, backbone, prompts, layout)
    with stage("loading what measures"):
        metrics = build_metrics(config, reference, len(prompts), device)
    result = evaluate_methods(
        backbone,
        methods,
        prompts,
        layout,
        run_dir,
        batch_size=config.batch_size,
        metrics=metrics,
        reference=reference,
        image_tokenizer=image_tokenizer_of(backbone),
        warm_up=config.warm_up,
        replace=config.replace_images,
        baseline_from=other_runs_of_sweep(run_dir),
        on_start=lambda: save_config(config, run_dir / "evaluate.yaml"),
    )
    if result is None:  # rank 0 reports
        return {}
    if config.report.judged is not None and config.benchmark is not None and config.benchmark_prompts:
        file, source = config.report.judged, config.benchmark_prompts
        result = with_judged(result, config.benchmark, source, file, config.metrics.num_resamples)
    result = with_word_of_noise(with_word_of_random_weights(result, config, weights), config, weights)
    said = tuple(left_out(config, reference, len(prompts)))
    result = replace(result, warnings=(*result.warnings, *said))
    provenance = collect_provenance(
        backbone,
        redact(config.model_dump(mode="json")),
        {item.key: item.seed for item in prompts},
        {
            "weights": weights_name(config, weights),
            "trainings": trainings_of(weights) if config.ckpt_path is None else None,
            "auto_window": {name: choice.summary() for name, choice in windows.items()},
        },
        result.store.identity["weights"],
    )
    wanted = config.report.model_dump(include={"num_trajectories", "num_frames", "cost_windows"})
    observations = observe(backbone, result, layout, **wanted)
    with stage("writing the report"):
        files = write_report(
            result,
            provenance,
            observations,
            page_prompts=config.report.num_images,
            page_megabytes=config.report.page_megabytes,
        )
    hand_out(config, result, weights, provenance, files)
    return report_object(result, provenance, observations)


def other_runs_of_sweep(run_dir: Path) -> list[Path]:
    """Folders of a sweep's other runs, whose baseline need not be decoded again; none outside of a sweep."""
    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return []
    return sorted(path.parent for path in run_dir.parent.glob("*/run.json") if path.parent != run_dir)


def chosen_methods(
    config: EvaluateConfig, backbone: Backbone, prompts: Sequence[PromptItem], layout: ImageLayout
) -> tuple[dict[str, DecodingConfig], dict[str, WindowChoice]]:
    """The methods to compare, a window of `auto` replaced by the one that is fastest here, and why it is."""
    from sjd2_lightning.evaluation.auto_window import resolve_windows
    from sjd2_lightning.evaluation.compare import check_run
    from sjd2_lightning.models.backbone import evaluation_mode

    methods = {name: config.methods[name] for name in config.compare}
    # windows are chosen by decoding: what cannot be decoded is refused before
    check_run(backbone, methods, prompts, layout, config.batch_size)
    with evaluation_mode(backbone):
        return resolve_windows(
            backbone,
            methods,
            prompts[: config.batch_size],
            layout,
            windows=config.auto_window.windows,
            repeats=config.auto_window.repeats,
            folder=Path(config.run_dir),
        )


def chosen_prompts(config: EvaluateConfig) -> list[PromptItem]:
    """The prompts to decode, each with all its samples."""
    from sjd2_lightning.cli.build import build_prompts
    from sjd2_lightning.evaluation.geneval_dpg import benchmark_prompts
    from sjd2_lightning.evaluation.prompts import repeat_prompts

    if config.benchmark is not None and config.benchmark_prompts is not None:
        found = benchmark_prompts(config.benchmark, config.benchmark_prompts, config.seed)
        found = found[: config.num_prompts]
    else:
        found = build_prompts(config, config.num_prompts)
    return repeat_prompts(found, config.samples_per_prompt)


def hand_out(
    config: EvaluateConfig,
    result: EvaluationResult,
    weights: Path,
    provenance: dict[str, Any],
    files: ReportFiles,
) -> None:
    """Everything behind the report: folders of the benchmark, W&B, the table on the screen."""
    with stage("laying out images for the benchmark"):
        export(config, result)
    with stage("logging to W&B"), harmless("logging to W&B"):
        publish(config, result, weights, provenance, files)
    show(config, result, weights, files)


def export(config: EvaluateConfig, result: EvaluationResult) -> None:
    """Lays every method's images out in the folders of the benchmark, if there is one."""
    from sjd2_lightning.evaluation.geneval_dpg import export_benchmark

    if config.benchmark is None or config.benchmark_prompts is None:
        return
    for name, method in result.methods.items():
        folder = Path(config.run_dir) / config.benchmark / name
        export_benchmark(config.benchmark, config.benchmark_prompts, result.store, method.records, folder)
    log.info("images for %s: %s", config.benchmark, Path(config.run_dir) / config.benchmark)


def weights_folder(config: EvaluateConfig) -> Path:
    """The folder whose weights are measured; see `weights` in conf/evaluate.yaml."""
    if config.weights not in ("auto", "model"):
        return Path(config.weights)
    exports = sorted(Path().glob(EXPORTS), key=lambda path: path.stat().st_mtime)
    if config.weights == "auto" and config.model.path == SHIPPED_MODEL and exports:
        return exports[-1].parent
    return config.model.folder


def weights_name(config: EvaluateConfig, weights: Path) -> str:
    """What the measured weights are called: their place, or that they are random."""
    from sjd2_lightning.run.provenance import random_origin

    own, is_asked = config.model.random_name, weights == config.model.folder
    if own and config.ckpt_path is None and is_asked:
        return own
    place = str(config.ckpt_path or (config.model.path if is_asked else weights))  # not where a package lies
    name = own or random_origin(weights)
    return f"{place}, trained from {name}" if name else place


def with_word_of_random_weights(
    result: EvaluationResult, config: EvaluateConfig, weights: Path
) -> EvaluationResult:
    """The result, with a warning in front where no training made the weights."""
    from sjd2_lightning.run.provenance import random_origin

    if not (config.model.random_name or random_origin(weights)):
        return result
    warning = f"{weights_name(config, weights)}: a dry run, nothing here is a figure of a release"
    return replace(result, warnings=(warning, *result.warnings))


def with_word_of_noise(result: EvaluationResult, config: EvaluateConfig, weights: Path) -> EvaluationResult:
    """The result, with a warning in front where methods feed noise to weights that never saw any."""
    from sjd2_lightning.run.provenance import never_saw_noise, trainings_of

    noisy = [name for name, method in result.methods.items() if method.config.num_levels]
    is_own = config.ckpt_path is None and not config.model.random_name
    if not noisy or not is_own or not never_saw_noise(trainings_of(weights)):
        return result
    warning = (
        f"{', '.join(noisy)}: noise levels on weights that never saw noise, which may cost passes where they "
        "should save some; fine-tune first (python train.py), or set decoding.num_levels=0"
    )
    return replace(result, warnings=(warning, *result.warnings))


def pick_device(device: str) -> str:
    """The device by name; `auto` is the best there is."""
    import torch

    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def check_mode(config: EvaluateConfig) -> None:
    """Refuses a `WANDB_MODE` that is none before anything is decoded."""
    from sjd2_lightning.report.wandb_log import wandb_mode

    if config.logger.wandb is not None:
        wandb_mode(config.logger.wandb.mode)


def publish(
    config: EvaluateConfig,
    result: EvaluationResult,
    weights: Path,
    provenance: dict[str, Any],
    files: ReportFiles,
) -> None:
    """Logs the evaluation to W&B, and publishes it as a W&B Report, if that is asked for."""
    from sjd2_lightning.report.wandb_log import log_to_wandb
    from sjd2_lightning.run.provenance import random_origin

    if config.logger.wandb is None:
        return
    settings = config.logger.wandb.model_dump(include={"mode", "project", "entity", "name", "group"})
    is_random = random_origin(weights) and RANDOM_TAG not in config.wandb_tags
    settings["tags"] = (*config.wandb_tags, RANDOM_TAG) if is_random else config.wandb_tags
    pictures = {"cost": files.cost} | ({"settling": files.settling} if files.settling else {})
    folder = log_to_wandb(result, provenance, config.run_dir, **settings, pictures=pictures)
    if config.report.publish == "wandb":
        publish_to_wandb(config, folder)
    elif folder is not None and Path(folder).name.startswith("offline"):
        log.info("W&B run kept offline; send it with: wandb sync %s", folder)


def publish_to_wandb(config: EvaluateConfig, run_folder: str | None) -> None:
    """A W&B Report of an online run; of any other, one line that says how to get it."""
    from sjd2_lightning.report.wandb_report import later_command, publish_report, run_id_of

    assert config.logger.wandb is not None
    if run_folder is None:
        log.warning("W&B Report not published: W&B is disabled; run again with logger.wandb.mode=online")
        return
    project, entity = config.logger.wandb.project, config.logger.wandb.entity
    reason = "the run was kept offline"
    if not Path(run_folder).name.startswith("offline"):
        try:
            url = publish_report(config.run_dir, project=project, entity=entity, run_id=run_id_of(run_folder))
        except ValueError as error:
            reason = str(error)
        else:
            log.info("W&B Report: %s", url)
            return
    later = later_command(config.run_dir, run_folder, project=project, entity=entity)
    log.warning("W&B Report not published: %s; publish it later with: %s", reason, later)


def show(config: EvaluateConfig, result: EvaluationResult, weights: Path, files: ReportFiles) -> None:
    """Prints the table and where things lie."""
    from rich.console import Console

    from sjd2_lightning.report.table import console_table

    console = Console()
    console.print(console_table(result, console.width))
    for warning in result.warnings:
        console.print(f"[yellow]{warning}[/yellow]")
    for name, place in {
        "weights": weights_name(config, weights),
        "images": result.store.folder / "images",
        "grid": files.grid,
        "report": files.json,
        "page": files.html,
    }.items():
        console.print(f"{name + ':':<9}{place}", soft_wrap=True, highlight=False)
