"""What is compared of a model that thinks: ways to come to an answer, in place of a `DecodingConfig`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from sjd2_lightning.data.sources.arithmetic import ProblemSource
from sjd2_lightning.decoding.config import BASELINE
from sjd2_lightning.fixed_point import Schedule
from sjd2_lightning.run.values import Count, wrong_values


@dataclass(frozen=True)
class ThoughtMethod:
    """One way to come to an answer.

    Attributes:
        kind: what stands between question and answer: latents that a schedule finds; pause, the same places
            without a pass over them; steps, explicit ones in words; or none, nothing.
        schedule: how latents are found: a window of 1 is the chain, `max_passes` the passes of PCCoT.
        weights: folder of weights that were trained to think this way; None takes those of the evaluation.
    """

    kind: Literal["latents", "pause", "steps", "none"] = "latents"
    schedule: Schedule = field(default_factory=Schedule)
    weights: str | None = None

    method: ClassVar[str] = "thoughts"
    num_levels: ClassVar[int] = 0
    window_shape: ClassVar[int] = 1
    invariant: ClassVar[bool] = False

    def problems(self) -> list[str]:
        """What is wrong with the values, a line each, starting with the key."""
        return [*wrong_values(self), *(f"schedule.{line}" for line in self.schedule.problems())]

    @property
    def acceptance(self) -> str:
        """What stands between question and answer, and when a latent is final."""
        if self.kind != "latents":
            return self.kind
        if self.schedule.window == 1:
            return "loop"
        return "passes" if self.schedule.max_passes else "tolerance"

    @property
    def lossless(self) -> bool:
        """Whether the latents are the chain's."""
        return self.kind == "latents" and not self.schedule.max_passes and self.weights is None

    @property
    def window(self) -> int:
        """Latents that a pass is fed at most; 0 is all."""
        return self.schedule.window if self.kind == "latents" else 0

    @property
    def size(self) -> int:
        """The same, as tables of costs call it."""
        return self.window


@dataclass(frozen=True)
class ThoughtEvaluation:
    """What of a model that thinks is evaluated; the group `thoughts` of the configuration.

    Attributes:
        weights: folder of the model.
        ways: ways to come to an answer by name; `ar`, the chain, is the baseline.
        compare: names of those that are compared.
        source: where held-out problems come from.
        answer_tokens: tokens of an answer at most.
        chain_tokens: tokens of an explicit chain, answer included, at most.
    """

    weights: str
    ways: dict[str, ThoughtMethod]
    compare: tuple[str, ...]
    source: ProblemSource
    answer_tokens: Count = 8
    chain_tokens: Count = 128

    def problems(self) -> list[str]:
        """What is wrong with the values, a line each, starting with the key."""
        found = [*wrong_values(self), *(f"source.{line}" for line in self.source.problems())]
        for name, way in self.ways.items():
            found += [f"ways.{name}.{line}" for line in way.problems()]
            if not name.isidentifier():
                found.append(f"ways.{name}: letters, digits and _ name a method")
        found += [
            f"compare: unknown way {name!r}; there are {', '.join(self.ways)}"
            for name in self.compare
            if name not in self.ways
        ]
        if BASELINE not in self.compare:
            found.append(f"compare={list(self.compare)}: leave {BASELINE} in; all are compared with it")
        baseline = self.ways.get(BASELINE)
        why = "others are compared with the chain"
        if baseline is None:
            found.append(f"ways: leave {BASELINE} in; {why}")
        elif baseline.kind != "latents":
            found.append(f"ways.{BASELINE}.kind={baseline.kind}: must be latents; {why}")
        elif baseline.schedule.window != 1:
            found.append(f"ways.{BASELINE}.schedule.window={baseline.schedule.window}: must be 1; {why}")
        return found
