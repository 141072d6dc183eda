"""What a decoding method is: a window, noise levels, an acceptance mode and a refiner."""

from __future__ import annotations

from dataclasses import dataclass, field

from sjd2_lightning.decoding.probs import Sampling
from sjd2_lightning.decoding.refine import REFINERS
from sjd2_lightning.noise import SCHEDULES

METHODS = ("ar", "sjd", "mc_sjd", "sjd2")
ACCEPTANCE = ("replay", "exact", "paper")
DRAFT_INITS = ("random", "gumbel")


@dataclass(frozen=True)
class DecodingConfig:
    """One decoding method; every field is a plain value and may change at inference without retraining.

    Attributes:
        method: name, for reports: "ar", "sjd", "mc_sjd" or "sjd2".
        window: slots drafted ahead, the head included; 1 is plain autoregression.
        num_levels: noisy levels of a new slot; 0 is plain Jacobi decoding.
        acceptance: "replay" (same seed, same image as autoregression), "exact" (same law), or "paper" (the
            rules as printed; not exact).
        refiner: what becomes of drafts that were not reached: "resample" (SJD: fresh independent draws),
            "couple" (MC-SJD: what verification drew), "keep" (paper: keep clean drafts whose probability
            ratio is at least one half). Replay always couples.
        draft_init: first draft of a clean slot: "random", or "gumbel", the maximum of the slot's own noise.
        schedule, t_min, rho: grid of noise, see `noise.timesteps`.
        sampling: temperature, top-k, top-p, guidance.
    """

    method: str
    window: int = 32
    num_levels: int = 0
    acceptance: str = "replay"
    refiner: str = "couple"
    draft_init: str = "random"
    schedule: str = "linear"
    t_min: float = 0.02
    rho: float = 7.0
    sampling: Sampling = field(default_factory=Sampling)

    @property
    def lossless(self) -> bool:
        """Whether samples follow the law of autoregression with the loaded weights."""
        return self.acceptance != "paper"

    def problems(self) -> list[str]:
        """What is wrong with the values, a sentence each."""
        found = self.sampling.problems()
        choices = {
            "method": (self.method, METHODS),
            "acceptance": (self.acceptance, ACCEPTANCE),
            "refiner": (self.refiner, tuple(REFINERS)),
            "draft_init": (self.draft_init, DRAFT_INITS),
            "schedule": (self.schedule, SCHEDULES),
        }
        for name, (value, known) in choices.items():
            if value not in known:
                found.append(f"decoding.{name} must be one of {', '.join(known)}; got {value!r}")
        if self.window < 1:
            found.append(f"decoding.window must be >= 1 (1 is plain autoregression), got {self.window}")
        if self.num_levels < 0:
            found.append(f"decoding.num_levels must be >= 0 (0 is plain Jacobi), got {self.num_levels}")
        if self.method == "ar" and (self.window != 1 or self.num_levels != 0):
            found.append("decoding.method 'ar' needs window 1 and num_levels 0")
        if self.method in ("sjd", "mc_sjd") and self.num_levels != 0:
            found.append(f"decoding.method {self.method!r} has no noise: set num_levels to 0 or use sjd2")
        if self.refiner == "keep" and self.acceptance != "paper":
            found.append("decoding.refiner 'keep' is not exact: use it with acceptance 'paper' only")
        if self.draft_init == "gumbel" and self.acceptance != "replay":
            found.append("decoding.draft_init 'gumbel' needs acceptance 'replay'")
        return found

    def check(self) -> None:
        """Raises ValueError with all problems at once."""
        if found := self.problems():
            raise ValueError("; ".join(found))
