"""`evaluate.py` with the group `policies`: decoding methods on policies of actions, in the shared report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from sjd2_lightning.cli.task_report import write_task_report
from sjd2_lightning.config.reading import save_config
from sjd2_lightning.config.runs import EvaluateConfig
from sjd2_lightning.evaluation.policy_methods import PolicyEvaluation, policy_methods
from sjd2_lightning.run.stages import stage


def evaluate_policies(
    config: EvaluateConfig, settings: PolicyEvaluation, device: str, hand_out: Callable[..., None]
) -> dict[str, Any]:
    """Acts held-out episodes by every method on every policy, and writes the report.

    Args:
        config: the evaluation.
        settings: its group `policies`.
        device: name of the device.
        hand_out: does what stands behind every report.

    Returns:
        What report.json holds.

    Raises:
        ValueError: a method, a policy or the folder of records cannot be used.
    """
    with stage("loading libraries"):
        from sjd2_lightning.evaluation.episodes import act_methods, episode_prompts, with_success
        from sjd2_lightning.evaluation.quality import QualityMeter, QualityMetrics
        from sjd2_lightning.evaluation.results import measure_methods
        from sjd2_lightning.models.policy import load_policy

    run_dir = Path(config.run_dir)
    with stage("loading the weights"):
        policies = {name: load_policy(folder).to(device) for name, folder in settings.weights.items()}
    save_config(config, run_dir / "evaluate.yaml")
    episodes = episode_prompts(config.num_prompts or settings.num_episodes, config.seed)
    methods = policy_methods(settings, {name: config.methods[name] for name in config.compare})
    store = act_methods(
        policies,
        methods,
        episodes,
        run_dir,
        batch_size=config.batch_size,
        replace_other=config.replace_images,
    )
    result = with_success(measure_methods(store, methods, episodes, QualityMeter(QualityMetrics(), None)))
    found = write_task_report(
        config,
        result,
        policies[settings.baseline],
        settings.weights[settings.baseline],
        result.store.identity["weights"][settings.baseline],
        hand_out,
    )
    return found
