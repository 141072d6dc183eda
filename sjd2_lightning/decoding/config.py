"""What a decoding method is: a window, noise levels, a rule for drafts, and what becomes of the others."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from sjd2_lightning.decoding.law import Sampling
from sjd2_lightning.noise import TIED, NoiseProcess
from sjd2_lightning.run.values import Natural, Within, wrong_values

BASELINE = "ar"  # the method that others are compared with
NOISY = ("sjd2", "sjd2_pure")  # methods with levels
WITH_TREE = ("replay", "exact")  # rules that know what becomes of a draft's siblings
LOSSLESS = ("replay", "exact", "match")
# fields that are groups of values
_PARTS = ("sampling", "tree", "groups", "pairs", "corrector", "drafter", "noise")
REPEATED = ("repeat_left", "repeat_above")  # first drafts that repeat a neighbour
OWN = "own"  # in the place of a file: the corrector that the model holds itself, if it has one
MOST_SLOTS = 2**16  # of a window: more than any known image has


@dataclass(frozen=True)
class TreeShape:
    """Branches that are fed beside the window, see `variants.tree`; width 1 is no tree.

    Attributes:
        width: number of candidates of a slot, its draft included.
        depth: number of slots, counted from the head, that have candidates.
        length: number of tokens of a branch: a sibling of the draft and `length - 1` drafts behind it.
    """

    width: Annotated[int, Within(1, 1024)] = 1
    depth: Annotated[int, Within(1, 1024)] = 1
    length: Annotated[int, Within(1, 1024)] = 1

    def problems(self) -> list[str]:
        """What is wrong with the values, a line each, starting with the key."""
        return wrong_values(self)


@dataclass(frozen=True)
class PairSweeps:
    """How drafts are corrected by their left neighbours, see `variants.pairs`.

    Attributes:
        table: file of `PairTable.save`; None leaves drafts alone.
        strength: share of the table's correction, > 0.
        sweeps: number of sweeps over the window, >= 1.
    """

    table: str | None = None
    strength: Annotated[float, Within(0, 100, without="least")] = 0.7
    sweeps: Annotated[int, Within(1, 1000)] = 2

    def problems(self) -> list[str]:
        """What is wrong with the values, a line each, starting with the key."""
        found = wrong_values(self)
        if self.table is not None and not Path(self.table).is_file():
            found.append(f"table={self.table}: there is no such file; make it by `sjd2 pairs`")
        return found


@dataclass(frozen=True)
class Correction:
    """How drafts are corrected by a small network, see `variants.corrector`.

    Attributes:
        weights: file of `DraftCorrector.save`; "own" is what the model itself holds, if it does and the
            method can use it; None leaves drafts alone.
        rounds: number of times that drafts are corrected, each by those of the time before: first the whole
            window, then a few slots whose left neighbour has changed.
    """

    weights: str | None = None
    rounds: Annotated[int, Within(1, 1000)] = 8

    def problems(self) -> list[str]:
        """What is wrong with the values, a line each, starting with the key."""
        found = wrong_values(self)
        if self.is_file and not Path(str(self.weights)).is_file():
            found.append(f"weights={self.weights}: there is no such file; make it by `sjd2 corrector`")
        return found

    @property
    def is_file(self) -> bool:
        """Whether a file was named."""
        return self.weights not in (None, OWN)


@dataclass(frozen=True)
class Drafting:
    """How slots that enter the window are guessed by a small network, see `variants.drafter`.

    Attributes:
        weights: file of `BlockDrafter.save`; None guesses nothing.
        rounds: number of times that all guesses are fitted to those on their left.
        candidates: number of codes of a slot that these rounds choose among, the best under its own noise.
    """

    weights: str | None = None
    rounds: Annotated[int, Within(0, 1000)] = 4
    candidates: Annotated[int, Within(1, 2**20)] = 64

    def problems(self) -> list[str]:
        """What is wrong with the values, a line each, starting with the key."""
        found = wrong_values(self)
        if self.weights is not None and not Path(self.weights).is_file():
            found.append(f"weights={self.weights}: there is no such file; make it by `sjd2 drafter`")
        return found


@dataclass(frozen=True)
class Grouping:
    """Which codes count as the draft, see `variants.grouped`.

    Attributes:
        size: number of codes of a group, the draft included: its neighbours in the order of probability; 1 is
            the exact rule.
        gap: greatest difference between a member's probability and the draft's.
        distance: greatest mean squared difference, over dimensions, of the normalised embeddings.
    """

    size: Annotated[int, Within(1, 2**20)] = 1
    gap: Annotated[float, Within(0, 1)] = 0.15
    distance: Annotated[float, Within(0, 1e6)] = 2.0

    def problems(self) -> list[str]:
        """What is wrong with the values, a line each, starting with the key."""
        return wrong_values(self)


@dataclass(frozen=True)
class DecodingConfig:
    """One decoding method; every field is a plain value and may change at inference without retraining.

    Attributes:
        method: kind of the method, for reports.
        window: number of slots drafted ahead, the head included; 1 is plain autoregression; "auto" is
            chosen by `evaluation.auto_window` before decoding.
        num_levels: number of noisy levels of a new slot; 0 is plain Jacobi decoding.
        acceptance: rule that drafts are judged by: "replay" (same seed, same image as autoregression),
            "exact" (same law), "paper" (the rules as printed; not exact), "match" (Jacobi: a draft stands if
            it is drawn again; same law), "pure" (a slot stands as soon as it is clean; not exact) or
            "grouped" (GSD: by the mass of a group of similar codes; not exact).
        refiner: what becomes of drafts that were not reached, for "exact", "paper" and "grouped": "resample"
            (SJD: fresh independent draws), "couple" (MC-SJD: what verification drew), "keep" (paper: keep
            clean drafts whose probability ratio is at least one half), "reuse" (SJD++: the same, its law
            recorded). The other rules take what verification drew.
        draft_init: first draft of a clean slot: "random", "gumbel" (the maximum of the slot's own noise),
            "repeat_left" or "repeat_above" (SJD: the token of a neighbour).
        noise: how noise comes and goes, as in training; tied sources with "replay" only.
        level_rule: which slots are clean at once (ours): none ("age": one level cleaner each iteration,
            paper); those whose token is the draft of the iteration before ("stable"; new slots have none);
            or those whose law gives their token at least `confidence` ("confident").
        confidence: probability in (0, 1], for level_rule "confident".
        tree: siblings of the drafts at the head, "exact" and "replay" only.
        groups: codes that are alike, "grouped" only.
        pairs: correction of drafts by their left neighbours, "replay" only.
        corrector: the same by a small network, and by the neighbours above, "replay" only.
        max_passes: passes after which what stands of an image is taken as it is (CEED-VLA), see
            `variants.early_exit`; 0 is no limit. Not exact, and neither is the next one.
        max_changed: the same after the first pass that changes no more drafts of an image than this (ours); 0
            waits until all stand.
        drafter: first drafts of slots that enter the window by a network that reads it, "replay" only.
        engine: how passes are run, see `engine`: "eager", "compiled" (the trunk's layers), "graphs" (compiled
            and captured, CUDA only) or "auto", which is graphs on CUDA and eager elsewhere.
        attention: how compiled layers attend: "dense" (under a dense mask, as everything else does), "flex"
            (by FlexAttention, which reads a few integers in its place) or "auto", which is flex on CUDA.
        invariant: whether a token's numbers depend on its prefix alone, bit for bit in any precision, and
            not on window, batch or method, see `models.invariant`.
        window_shape: number of slots that every pass of a method is shaped for, with one length of the cache
            and no row leaving; those beyond `window` are fed and never committed together. Methods of one
            shape agree bit for bit. 0 is the window itself, in whatever shapes are fastest.
        sampling: temperature, top-k, top-p, guidance.
    """

    method: Literal[
        "ar", "jacobi", "sjd", "mc_sjd", "gumbel", "sjd_pp", "sjd_pac", "gsd", "sjd2", "sjd2_pure"
    ]
    window: Annotated[int, Within(1, MOST_SLOTS)] | Literal["auto"] = 32
    num_levels: Annotated[int, Within(0, 1000)] = 0
    acceptance: Literal["replay", "exact", "paper", "match", "pure", "grouped"] = "replay"
    refiner: Literal["resample", "couple", "keep", "reuse"] = "couple"
    draft_init: Literal["random", "gumbel", "repeat_left", "repeat_above"] = "random"
    noise: NoiseProcess = field(default_factory=NoiseProcess)
    level_rule: Literal["age", "stable", "confident"] = "age"
    confidence: Annotated[float, Within(0, 1, without="least")] = 0.9
    tree: TreeShape = field(default_factory=TreeShape)
    groups: Grouping = field(default_factory=Grouping)
    pairs: PairSweeps = field(default_factory=PairSweeps)
    corrector: Correction = field(default_factory=Correction)
    max_passes: Natural = 0
    max_changed: Natural = 0
    drafter: Drafting = field(default_factory=Drafting)
    engine: Literal["auto", "eager", "compiled", "graphs"] = "auto"
    attention: Literal["auto", "dense", "flex"] = "auto"
    invariant: bool = False
    window_shape: Annotated[int, Within(0, MOST_SLOTS)] = 0
    sampling: Sampling = field(default_factory=Sampling)

    @property
    def size(self) -> int:
        """W, the slots that a pass looks at; raises ValueError while the window is "auto"."""
        return max(self.num_drafted, self.window_shape)

    @property
    def num_drafted(self) -> int:
        """The window as a number: the most slots that a pass commits. Raises ValueError for "auto"."""
        if self.window == "auto":
            raise ValueError("window=auto: choose a window first, see evaluation.auto_window.resolve_windows")
        return self.window

    @property
    def lossless(self) -> bool:
        """Whether samples follow the law of autoregression with the loaded weights."""
        return self.acceptance in LOSSLESS and not self.exits_early

    @property
    def exits_early(self) -> bool:
        """Whether an image may end before its drafts stand."""
        return self.max_passes > 0 or self.max_changed > 0

    @property
    def corrects(self) -> bool:
        """Whether a network corrects drafts, if weights "own" find one."""
        can = self.acceptance == "replay" and self.sampling.temperature > 0 and self.pairs.table is None
        return can and self.window != 1 and self.corrector.weights is not None

    def out_of_bounds(self) -> list[str]:
        """Values that no method can have, a line each, starting with the key."""
        found = [f"{part}.{line}" for part in _PARTS for line in wrong_values(getattr(self, part))]
        return found + wrong_values(self)

    def problems(self) -> list[str]:
        """What is wrong with the values, a line each, starting with the key."""
        found = [f"{part}.{line}" for part in _PARTS for line in getattr(self, part).problems()]
        found += wrong_values(self)
        if self.window != "auto" and 0 != self.window_shape < self.window:
            found.append(
                f"window_shape={self.window_shape}: must be at least the window, {self.window}, or 0 (none)"
            )
        return found + self._problems_of_the_kind() + self._problems_of_the_rule()

    def _problems_of_the_kind(self) -> list[str]:
        """Values that the kind of the method cannot have."""
        found = []
        if self.method == "ar" and self.window != 1:
            found.append(f"window={self.window}: method=ar needs window 1, one slot a pass")
        if self.method == "ar" and self.num_levels != 0:
            found.append(f"num_levels={self.num_levels}: method=ar needs num_levels 0, it has no noise")
        if self.method not in ("ar", *NOISY) and self.num_levels > 0:
            found.append(f"method={self.method}: has no noise; set num_levels to 0 or use sjd2")
        if self.method == "sjd_pac" and self.tree.width == 1:
            found.append("method=sjd_pac: needs tree.width >= 2; without a tree it is mc_sjd")
        for name in ("max_passes", "max_changed"):
            if getattr(self, name) and (self.method == "ar" or self.tree.width > 1):
                found.append(f"{name}={getattr(self, name)}: set it to 0 with method=ar and with a tree")
        if self.method == "gsd" and self.acceptance != "grouped":
            found.append("method=gsd: needs acceptance=grouped")
        return found

    def _problems_of_the_rule(self) -> list[str]:
        """Values that the acceptance rule cannot serve."""
        found = []
        if self.refiner == "keep" and self.acceptance != "paper":
            found.append("refiner=keep: is not exact; use it with acceptance=paper only")
        if self.refiner == "reuse" and (self.acceptance != "exact" or self.num_levels != 0):
            found.append("refiner=reuse: needs acceptance=exact and num_levels=0")
        if self.acceptance == "pure" and self.num_levels == 0:
            found.append("acceptance=pure: accepts what was denoised; set num_levels to at least 1")
        if self.tree.width > 1 and self.acceptance not in WITH_TREE:
            found.append(f"tree.width={self.tree.width}: needs acceptance exact or replay; 1 is no tree")
        if self.groups.size > 1 and self.acceptance != "grouped":
            found.append(f"groups.size={self.groups.size}: needs acceptance=grouped; 1 is no group")
        if self.pairs.table is not None and self.acceptance != "replay":
            found.append(f"pairs.table={self.pairs.table}: needs acceptance=replay; set it to null")
        if self.corrector.is_file:
            key = f"corrector.weights={self.corrector.weights}"
            if self.acceptance != "replay":
                found.append(f"{key}: needs acceptance=replay; set it to null")
            if self.sampling.temperature == 0:
                found.append(f"{key}: needs a temperature above 0, where drafts are drawn; set it to null")
            if self.pairs.table is not None:
                found.append(f"{key}: corrects in place of pairs.table; set one of them to null")
        if self.drafter.weights is not None:
            key = f"drafter.weights={self.drafter.weights}"
            if self.acceptance != "replay":
                found.append(f"{key}: needs acceptance=replay; set it to null")
            if self.sampling.temperature == 0:
                found.append(f"{key}: needs a temperature above 0, where drafts are drawn; set it to null")
            if self.draft_init in REPEATED:
                found.append(f"{key}: guesses in place of draft_init={self.draft_init}; use random")
            if self.num_levels > 0 and self.noise.source == "above":
                found.append(f"{key}: guesses in place of noise.source=above; use gaussian")
        if self.draft_init == "gumbel" and self.acceptance != "replay":
            found.append("draft_init=gumbel: needs acceptance=replay")
        if self.num_levels > 0 and self.noise.source in TIED and self.acceptance != "replay":
            found.append(f"noise.source={self.noise.source}: needs acceptance=replay; use gaussian")
        return found

    def check(self) -> None:
        """Raises ValueError with all problems at once, each key behind `decoding.`."""
        if found := self.problems():
            raise ValueError("; ".join(f"decoding.{line}" for line in found))
