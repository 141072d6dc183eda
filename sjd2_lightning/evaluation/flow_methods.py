"""What is compared of a TarFlow: ways to invert its blocks, in place of a `DecodingConfig`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from sjd2_lightning.decoding.config import BASELINE
from sjd2_lightning.fixed_point import Schedule
from sjd2_lightning.run.values import Count, Within, wrong_values


@dataclass(frozen=True)
class FlowMethod:
    """One way to invert a flow.

    Attributes:
        schedules: one a block, in the order of inversion, the last block first.
        guidance: see `models.tarflow.BlockInverse`.
    """

    schedules: tuple[Schedule, ...]
    guidance: float = 0.0

    method: ClassVar[str] = "tarflow"
    num_levels: ClassVar[int] = 0
    window_shape: ClassVar[int] = 1
    invariant: ClassVar[bool] = False

    @property
    def is_loop(self) -> bool:
        """Whether every pass is fed one patch."""
        return all(schedule.window == 1 for schedule in self.schedules)

    @property
    def acceptance(self) -> str:
        """What a patch must show before it is final."""
        return "loop" if self.is_loop else "tolerance"

    @property
    def lossless(self) -> bool:
        """Whether nothing cuts the passes of a block short."""
        return not any(schedule.max_passes for schedule in self.schedules)

    @property
    def window(self) -> int:
        """Patches that a pass is fed at most, of the block with the widest passes; 0 is all."""
        windows = [schedule.window for schedule in self.schedules]
        return 0 if 0 in windows else max(windows)

    @property
    def size(self) -> int:
        """The same, as tables of costs call it."""
        return self.window


@dataclass(frozen=True)
class FlowEvaluation:
    """What of a flow is evaluated; the group `flow` of the configuration.

    Attributes:
        weights: folder of the flow.
        clip_dir: folder of the CLIP whose text vectors are its prompts.
        inversions: a schedule for all blocks by name; `ar`, the loop, is the baseline.
        auto: whether to compare also the schedules that were fastest here, measured for each block.
        repeats: timed inversions of each block and schedule behind `auto`; the least time counts.
        guidance: see `models.tarflow.BlockInverse`; 0 reads the prompt alone.
        denoise: whether pictures lose their gaussian noise in one step at the end.
        num_measured: held-out pictures behind CRM, IGM and the residual of one pass.
    """

    weights: str
    clip_dir: str
    inversions: dict[str, Schedule]
    auto: bool = True
    repeats: Count = 2
    guidance: Annotated[float, Within(0)] = 0.0
    denoise: bool = True
    num_measured: Count = 128

    def problems(self) -> list[str]:
        """What is wrong with the values, a line each, starting with the key."""
        found = wrong_values(self)
        for name, schedule in self.inversions.items():
            found += [f"inversions.{name}.{line}" for line in schedule.problems()]
            if not name.isidentifier():
                found.append(f"inversions.{name}: letters, digits and _ name a method")
        if self.inversions.get(BASELINE, Schedule()).window != 1:
            key = f"inversions.{BASELINE}.window"
            found.append(f"{key}: must be 1, {BASELINE} is the loop that all are compared with")
        return found
