"""What is compared of policies of actions: decoding methods by the weights that they run on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sjd2_lightning.decoding.config import DecodingConfig
from sjd2_lightning.run.values import Count, wrong_values


@dataclass(frozen=True)
class PolicyEvaluation:
    """What of policies is evaluated; the group `policies` of the configuration.

    Attributes:
        weights: folder of each policy by name.
        baseline: name of the policy whose plain decoding all are compared with: `ar` and the other methods
            are its own, and those of the others are called by policy and method, as in `mixed_ar`.
        num_episodes: held-out episodes of each method.
    """

    weights: dict[str, str]
    baseline: str
    num_episodes: Count = 500

    def problems(self) -> list[str]:
        """What is wrong with the values, a line each, starting with the key."""
        found = wrong_values(self)
        if not self.weights:
            found.append("weights={}: give at least the folder of the baseline")
        elif self.baseline not in self.weights:
            found.append(f"baseline={self.baseline}: is none of weights, {', '.join(self.weights)}")
        for name, folder in self.weights.items():
            if not name.isidentifier():
                found.append(f"weights.{name}: letters, digits and _ name a policy")
            if not (Path(folder) / "policy.json").is_file():
                found.append(
                    f"weights.{name}={folder}: there is no policy.json; train it first, see docs/ceed.md, or "
                    f"leave it out with ~policies.weights.{name}"
                )
        return found


@dataclass(frozen=True)
class PolicyMethod:
    """A decoding method on the weights of a policy.

    Attributes:
        policy: name of the policy.
        decoding: how its chunks are drawn.
    """

    policy: str
    decoding: DecodingConfig

    @property
    def method(self) -> str:
        """Kind of the decoding method."""
        return self.decoding.method

    @property
    def num_levels(self) -> int:
        """Levels of noise of the decoding method."""
        return self.decoding.num_levels

    @property
    def window(self) -> int:
        """Codes of a chunk that a pass looks at."""
        return self.decoding.num_drafted

    @property
    def size(self) -> int:
        """The same, as tables of costs call it."""
        return self.decoding.size

    @property
    def window_shape(self) -> int:
        """See `DecodingConfig.window_shape`."""
        return self.decoding.window_shape

    @property
    def invariant(self) -> bool:
        """See `DecodingConfig.invariant`."""
        return self.decoding.invariant

    @property
    def acceptance(self) -> str:
        """What a code must show before it is final."""
        return self.decoding.acceptance

    @property
    def lossless(self) -> bool:
        """Whether chunks are those of plain decoding by the same weights."""
        return self.decoding.lossless


def policy_methods(
    settings: PolicyEvaluation, methods: Mapping[str, DecodingConfig]
) -> dict[str, PolicyMethod]:
    """Every method on every policy, the baseline's first."""
    others = [name for name in settings.weights if name != settings.baseline]
    found = {name: PolicyMethod(settings.baseline, method) for name, method in methods.items()}
    for policy in others:
        found |= {f"{policy}_{name}": PolicyMethod(policy, method) for name, method in methods.items()}
    return found
