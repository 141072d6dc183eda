"""What a report shows beyond the records: trajectories, replays and the cost of a pass.

Source: ours. All of it is taken after the comparison and never timed with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sjd2_lightning.comparison import EvaluationResult
from sjd2_lightning.evaluation import evaluation_mode
from sjd2_lightning.models.backbone import Backbone, ImageLayout
from sjd2_lightning.report.cost import PassCost, measure_pass_costs
from sjd2_lightning.report.replay import Replay, replay
from sjd2_lightning.report.trajectory import Trajectory, trace


@dataclass(frozen=True)
class Observations:
    """Trajectories of the first prompts by every method, their replays, and the cost of a pass by window."""

    trajectories: tuple[Trajectory, ...] = ()
    replays: tuple[Replay, ...] = ()
    pass_costs: tuple[PassCost, ...] = ()


def observe(
    backbone: Backbone,
    result: EvaluationResult,
    layout: ImageLayout,
    *,
    num_trajectories: int,
    num_frames: int,
    cost_windows: Sequence[int],
) -> Observations:
    """Decodes the first prompts again with an observer, draws partial images, times single passes.

    Args:
        backbone: model that the result is of; put into eval mode here, and back.
        result: of `evaluate_methods`.
        layout: of its images.
        num_trajectories: prompts decoded again by every method; 0 leaves trajectories and replays out.
        num_frames: partial images of each replay, 2 or more.
        cost_windows: windows at which a pass is timed; none leaves it out.
    """
    methods = {name: method.config for name, method in result.methods.items()}
    guided = any(config.sampling.guidance_scale != 1 for config in methods.values())
    rows = (2 if guided else 1) * max(
        record.batch_size for m in result.methods.values() for record in m.records
    )
    with evaluation_mode(backbone):
        traced = trace(backbone, methods, result.prompts[:num_trajectories], layout)
        replays = [replay(backbone, trajectory, num_frames) for trajectory in traced]
        costs = measure_pass_costs(backbone, layout, cost_windows, rows)
    return Observations(tuple(traced), tuple(replays), costs)
