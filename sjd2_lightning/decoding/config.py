"""What a decoding method is: a window, noise levels, an acceptance mode and a refiner."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from sjd2_lightning.decoding.law import Sampling
from sjd2_lightning.decoding.rules import REFINERS
from sjd2_lightning.noise import TIED, NoiseProcess

METHODS = ("ar", "jacobi", "sjd", "mc_sjd", "gumbel", "sjd_pp", "sjd_pac", "gsd", "sjd2", "sjd2_pure")
BASELINE = "ar"  # the method that others are compared with
NOISY = ("sjd2", "sjd2_pure")  # methods with levels
ACCEPTANCE = ("replay", "exact", "paper", "match", "pure", "grouped")
BY_LAWS = ("exact", "paper", "grouped")  # acceptance by the law that a draft was drawn from: it is recorded
WITH_TREE = ("replay", "exact")  # acceptance that knows what becomes of a draft's siblings
LOSSLESS = ("replay", "exact", "match")
LEVEL_RULES = ("age", "stable", "confident")
REPEATED = ("repeat_left", "repeat_above")  # first drafts that repeat a neighbour
DRAFT_INITS = ("random", "gumbel", *REPEATED)


@dataclass(frozen=True)
class TreeShape:
    """Branches that are fed beside the window, see `decoding/tree.py`; width 1 is no tree.

    Attributes:
        width: candidates of a slot, its draft included.
        depth: slots, counted from the head, that have candidates.
        length: tokens of a branch: a sibling of the draft and `length - 1` drafts behind it.
    """

    width: int = 1
    depth: int = 1
    length: int = 1

    def problems(self) -> list[str]:
        """What is wrong with the values, a sentence each."""
        return [
            f"tree.{name} must be >= 1 (width 1 is no tree), got {getattr(self, name)}"
            for name in ("width", "depth", "length")
            if getattr(self, name) < 1
        ]


@dataclass(frozen=True)
class PairSweeps:
    """How drafts are corrected.

    Attributes:
        table: file of `PairTable.save`; None = drafts are left alone.
        strength: share of the table's correction, > 0.
        sweeps: over the window, >= 1.
    """

    table: str | None = None
    strength: float = 0.7
    sweeps: int = 2

    def problems(self) -> list[str]:
        """What is wrong with the values, a sentence each."""
        found = []
        if self.strength <= 0:
            found.append(
                f"pairs.strength must be > 0 (without a table nothing is corrected), got {self.strength}"
            )
        if self.sweeps < 1:
            found.append(
                f"pairs.sweeps must be >= 1 (without a table nothing is corrected), got {self.sweeps}"
            )
        if self.table is not None and not Path(self.table).is_file():
            found.append(
                f"pairs.table: there is no file {self.table}; make it by python -m sjd2_lightning.cli.pairs"
            )
        return found


@dataclass(frozen=True)
class Grouping:
    """Which codes count as the draft.

    Attributes:
        size: codes of a group, the draft included: its neighbours in the order of probability; 1 is the exact
            rule.
        gap: greatest difference between a member's probability and the draft's.
        distance: greatest mean squared difference, over dimensions, of the normalised embeddings.
    """

    size: int = 1
    gap: float = 0.15
    distance: float = 2.0

    def problems(self) -> list[str]:
        """What is wrong with the values, a sentence each."""
        found = []
        if self.size < 1:
            found.append(f"groups.size must be >= 1 (1 is the exact rule), got {self.size}")
        for name in ("gap", "distance"):
            if not getattr(self, name) >= 0:
                found.append(f"groups.{name} must be >= 0, got {getattr(self, name)}")
        return found


@dataclass(frozen=True)
class DecodingConfig:
    """One decoding method; every field is a plain value and may change at inference without retraining.

    Attributes:
        method: name, for reports: one of `METHODS`.
        window: slots drafted ahead, the head included; 1 is plain autoregression.
        num_levels: noisy levels of a new slot; 0 is plain Jacobi decoding.
        acceptance: "replay" (same seed, same image as autoregression), "exact" (same law), "paper" (the
            rules as printed; not exact), "match" (Jacobi: a draft stands if it is drawn again; same law),
            "pure" (a slot stands as soon as it is clean; not exact) or "grouped" (GSD: by the mass of a group
            of similar codes; not exact).
        refiner: what becomes of drafts that were not reached, for "exact", "paper" and "grouped": "resample"
            (SJD: fresh independent draws), "couple" (MC-SJD: what verification drew), "keep" (paper: keep
            clean drafts whose probability ratio is at least one half), "reuse" (SJD++: the same, its law
            recorded). The other modes take what verification drew.
        draft_init: first draft of a clean slot: "random", "gumbel" (the maximum of the slot's own noise),
            "repeat_left" or "repeat_above" (SJD: the token of a neighbour).
        noise: how noise comes and goes, as in training; tied sources with "replay" only.
        level_rule: which slots are clean at once (ours): none ("age": one level cleaner each iteration,
            paper); those whose token is the draft of the iteration before ("stable"; new slots have none);
            or those whose law gives their token at least `confidence` ("confident").
        confidence: in (0, 1], for level_rule "confident".
        tree: siblings of the drafts at the head, "exact" and "replay" only.
        groups: which codes are alike, "grouped" only.
        pairs: correction of drafts by their left neighbours, "replay" only.
        compile: run the trunk through `torch.compile`, on shapes that stay the same between iterations.
        sampling: temperature, top-k, top-p, guidance.
    """

    method: str
    window: int = 32
    num_levels: int = 0
    acceptance: str = "replay"
    refiner: str = "couple"
    draft_init: str = "random"
    noise: NoiseProcess = field(default_factory=NoiseProcess)
    level_rule: str = "age"
    confidence: float = 0.9
    tree: TreeShape = field(default_factory=TreeShape)
    groups: Grouping = field(default_factory=Grouping)
    pairs: PairSweeps = field(default_factory=PairSweeps)
    compile: bool = False
    sampling: Sampling = field(default_factory=Sampling)

    @property
    def lossless(self) -> bool:
        """Whether samples follow the law of autoregression with the loaded weights."""
        return self.acceptance in LOSSLESS

    @property
    def reads_law(self) -> bool:
        """Whether slots get cleaner by their law, not by the token drawn from it alone."""
        return self.num_levels > 1 and (self.noise.reads_mean or self.level_rule == "confident")

    def problems(self) -> list[str]:
        """What is wrong with the values, a sentence each."""
        found = [
            problem
            for part in (self.sampling, self.tree, self.groups, self.pairs)
            for problem in part.problems()
        ]
        choices = {
            "method": (self.method, METHODS),
            "acceptance": (self.acceptance, ACCEPTANCE),
            "refiner": (self.refiner, tuple(REFINERS)),
            "draft_init": (self.draft_init, DRAFT_INITS),
            "level_rule": (self.level_rule, LEVEL_RULES),
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
        if self.method in METHODS and self.method not in ("ar", *NOISY) and self.num_levels != 0:
            found.append(f"decoding.method {self.method!r} has no noise: set num_levels to 0 or use sjd2")
        if self.refiner == "keep" and self.acceptance != "paper":
            found.append("decoding.refiner 'keep' is not exact: use it with acceptance 'paper' only")
        if self.refiner == "reuse" and (self.acceptance != "exact" or self.num_levels != 0):
            found.append("decoding.refiner 'reuse' needs acceptance 'exact' and num_levels 0")
        if self.acceptance == "pure" and self.num_levels == 0:
            found.append("decoding.acceptance 'pure' accepts what was denoised: set num_levels to at least 1")
        found += self._problems_beside_the_window()
        if self.draft_init == "gumbel" and self.acceptance != "replay":
            found.append("decoding.draft_init 'gumbel' needs acceptance 'replay'")
        found += [f"decoding.noise.{line}" for line in self.noise.problems()]
        if self.noise.source in TIED and self.acceptance != "replay":
            found.append(
                f"decoding.noise.source {self.noise.source!r} needs acceptance 'replay': use gaussian"
            )
        if not 0 < self.confidence <= 1:
            found.append(f"decoding.confidence must lie in (0, 1], got {self.confidence}")
        return found

    def _problems_beside_the_window(self) -> list[str]:
        found = []
        if self.tree.width > 1 and self.acceptance not in WITH_TREE:
            found.append("decoding.tree needs acceptance 'exact' or 'replay': set tree.width to 1 (no tree)")
        if self.method == "sjd_pac" and self.tree.width == 1:
            found.append("decoding.method 'sjd_pac' needs tree.width >= 2; without a tree it is mc_sjd")
        if self.method == "gsd" and self.acceptance != "grouped":
            found.append("decoding.method 'gsd' needs acceptance 'grouped'")
        if self.groups.size > 1 and self.acceptance != "grouped":
            found.append("decoding.groups needs acceptance 'grouped': set groups.size to 1 (no groups)")
        if self.pairs.table is not None and self.acceptance != "replay":
            found.append("decoding.pairs.table needs acceptance 'replay': set it to null")
        return found

    def check(self) -> None:
        """Raises ValueError with all problems at once."""
        if found := self.problems():
            raise ValueError("; ".join(found))
