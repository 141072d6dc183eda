"""The tables and the figure of benchmarks/study/study.py: seeds of a variant pooled, paired by prompt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sjd2_lightning.decoding import DecodingConfig
from sjd2_lightning.decoding.config import BASELINE
from sjd2_lightning.metrics.bootstrap import MetricResult, mean_result, paired_difference, ratio_of_totals
from sjd2_lightning.report.html import method_colour

COLUMNS = (
    "variant", "clean loss", "- plain", "entropy", "- plain", "training-free", "with noise",
    "/ own training-free", "/ plain's", "passes of one", "equal to ar",
)  # fmt: skip
_BINS = ((1, 1), (2, 2), (3, 3), (4, 4), (5, 8), (9, 16), (17, 32), (33, None))  # tokens that a pass commits
Interval = dict[str, Any]  # a value and its interval


@dataclass
class Run:
    """One trained variant and the results of its settings.

    Attributes:
        folder: folder that train.py wrote.
        variant, seed: name of the variant and seed of its training.
        base: weights that training started from; None for random ones.
        is_plain: whether it was trained without noise; variants of the same base are compared with it.
        family, pixels: family of the model and (height, width) of its images.
        method: the method sjd2 as train.yaml configures it.
        losses: first ("start") and last ("end") value of each validation loss by name.
        found: result of each setting by its name, see `study.decoded`.
        times: seconds of single prompts by setting, one dictionary a prompt.
    """

    folder: Path
    variant: str
    seed: int
    base: str | None
    is_plain: bool
    family: str
    pixels: tuple[int, int]
    method: DecodingConfig
    losses: dict[str, dict[str, float]]
    found: dict[str, dict[str, Any]] = field(default_factory=dict)
    times: list[dict[str, float]] = field(default_factory=list)

    def nfe(self, setting: str) -> list[int]:
        """Forward passes of each prompt."""
        return self.found[setting]["nfe"]

    def entropy(self) -> list[float]:
        """Mean entropy of the clean law on each image, in nats a code."""
        return self.found[BASELINE]["entropy"]

    def clean_loss(self) -> list[float]:
        """Clean validation loss at the end of training; nothing if it was not logged."""
        return [value for name, value in self.losses["end"].items() if name == "val/loss_clean"]


def is_training_free(setting: str) -> bool:
    """Whether a setting decodes without noise."""
    return not setting.startswith("replay-l") or setting.startswith(("replay-l0-", "replay-l0+"))


def window_of(setting: str) -> int:
    """The window that a setting's name ends in."""
    return int(setting.rpartition("-w")[2])


def tabulate(runs: Sequence[Run]) -> dict[str, Any]:
    """Every variant, its seeds pooled: a prompt's passes are summed over them."""
    names = dict.fromkeys(run.variant for run in runs)
    return {"variants": {name: summary([run for run in runs if run.variant == name], runs) for name in names}}


def summary(own: list[Run], runs: Sequence[Run]) -> dict[str, Any]:
    """One variant against what needs no training, on its own weights and on the plain ones of its base."""
    plain = [run for run in runs if run.is_plain and run.base == own[0].base]
    names = [name for name in dict.fromkeys(n for run in own for n in run.found) if name != BASELINE]
    free = [name for name in names if is_training_free(name)]
    rivals = (best(own, free), best(plain, free))
    losses = {end: [_round(run.losses[end].get("val/loss_clean")) for run in own] for end in ("start", "end")}
    return {
        "seeds": [run.seed for run in own],
        "plain": plain[0].variant if plain else None,
        "loss_clean_start": losses["start"],
        "loss_clean": losses["end"],
        "loss_clean_minus_plain": difference(own, plain, Run.clean_loss),
        "entropy": rounded(mean_result("entropy", _sums(own, Run.entropy) / len(own), "nats a code")),
        "entropy_minus_plain": difference(own, plain, Run.entropy),
        "nll": _round(np.mean([run.found[BASELINE]["nll"] for run in own])),
        "best_training_free": rivals[0],
        "best_training_free_of_plain": rivals[1],
        "best_noisy": best(own, [name for name in names if name not in free]),
        "settings": {name: setting(name, own, plain, free, rivals) for name in names},
    }


def setting(
    name: str, own: list[Run], plain: list[Run], free: list[str], rivals: tuple[str | None, str | None]
) -> dict[str, Any]:
    """One setting of a variant: tokens a pass, and their ratio to the rivals' on own and on plain weights.

    `over_same_window` is the ratio to the best of the own training-free settings `free` of that window.
    """
    have = [run for run in own if name in run.found]
    nfe = _sums(have, lambda run: run.nfe(name))
    num_slots = have[0].found[name]["num_slots"]
    tokens = ratio_of_totals("tokens a pass", np.full(len(nfe), num_slots * len(have)), nfe, "slots / passes")
    accepted: Counter[int] = Counter()
    for run in have:
        accepted.update({int(num): count for num, count in run.found[name]["accepted"].items()})
    equal = [same for run in have for same in run.found[name]["equal_to_ar"]]
    alike = best(own, [other for other in free if window_of(other) == window_of(name)])
    return {
        "tokens_a_pass": rounded(tokens),
        "by_seed": {run.seed: _round(num_slots / np.mean(run.nfe(name))) for run in have},
        "nfe": _round(nfe.mean() / len(have)),
        "share_of_passes": _histogram(accepted),
        "equal_to_ar": [sum(equal), len(equal)],
        "over_training_free": ratio(have, own, name, rivals[0]),
        "over_same_window": ratio(have, own, name, alike),
        "over_plain": ratio(have, plain, name, rivals[1]),
        "speedup": wall_clock_ratio(have, name),
    }


def best(runs: list[Run], names: Iterable[str]) -> str | None:
    """The setting of fewest passes among those that all runs have."""
    passes = {
        name: np.mean([run.nfe(name) for run in runs])
        for name in names
        if runs and all(name in run.found for run in runs)
    }
    return min(passes, key=lambda name: passes[name], default=None)


def ratio(own: list[Run], others: list[Run], name: str, rival: str | None) -> Interval | None:
    """Tokens a pass of a setting over those of the rival, over the seeds that both sides have."""
    if rival is None:
        return None
    above, below = _common(others, [run for run in own if name in run.found])
    if not above:
        return None
    rival_nfe, own_nfe = _sums(above, lambda run: run.nfe(rival)), _sums(below, lambda run: run.nfe(name))
    return rounded(ratio_of_totals("ratio", rival_nfe, own_nfe, "tokens a pass, paired by prompt"))


def wall_clock_ratio(runs: list[Run], name: str) -> Interval | None:
    """Wall clock of the baseline over that of the setting, for the prompts that all runs have timed."""
    num = min(len(run.times) for run in runs)
    if num == 0:
        return None
    pairs = [[(one[BASELINE], one[name]) for one in run.times[:num]] for run in runs]
    baseline, seconds = np.sum(pairs, axis=0).T
    return rounded(ratio_of_totals("speedup", baseline, seconds, "wall clock, paired by prompt"))


def difference(own: list[Run], plain: list[Run], values: Callable[[Run], list[float]]) -> Interval | None:
    """Mean of own minus plain, over the seeds that both have."""
    own, plain = ([run for run in side if values(run)] for side in _common(own, plain))
    if not own or len(own) != len(plain):
        return None
    first, second = _sums(own, values) / len(own), _sums(plain, values) / len(plain)
    return rounded(paired_difference("difference", first, second, "paired by prompt"))


def _common(first: list[Run], second: list[Run]) -> tuple[list[Run], list[Run]]:
    """Runs of the seeds that both sides have."""
    seeds = {run.seed for run in first} & {run.seed for run in second}
    return [run for run in first if run.seed in seeds], [run for run in second if run.seed in seeds]


def _sums(runs: list[Run], values: Callable[[Run], Sequence[float]]) -> np.ndarray:
    """(prompts,) values summed over runs."""
    return np.sum([values(run) for run in runs], axis=0)


def _histogram(accepted: Counter[int]) -> dict[str, float]:
    """Share of passes by tokens committed."""
    total = sum(accepted.values())
    shares = {}
    for low, high in _BINS:
        count = sum(n for num, n in accepted.items() if num >= low and (high is None or num <= high))
        title = f"{low}+" if high is None else str(low) if low == high else f"{low}-{high}"
        shares[title] = round(count / total, 4)
    return shares


def _round(value: Any) -> float | None:
    return None if value is None else round(float(value), 4)


def rounded(result: MetricResult) -> Interval:
    """Value and interval of a metric, rounded."""
    interval = None if result.interval is None else [_round(end) for end in result.interval]
    return {"value": _round(result.value), "interval": interval}


def shown(result: Interval | None, digits: int = 2) -> str:
    """Value and interval as text; "" for None."""
    if result is None:
        return ""
    ends = "" if result["interval"] is None else ", ".join(f"{end:.{digits}f}" for end in result["interval"])
    return f"{result['value']:.{digits}f}" + (f" [{ends}]" if ends else "")


def lines(found: dict[str, Any]) -> Iterator[list[str]]:
    """Cells of the table of variants, in the order of `COLUMNS`."""
    for name, variant in found["variants"].items():
        free, noisy = variant["best_training_free"], variant["best_noisy"]
        rows = variant["settings"]
        one = rows.get(noisy) or rows[free]
        equal = [r["equal_to_ar"] for title, r in rows.items() if title.startswith(("replay", "gumbel"))]
        yield [
            f"{name}, seed {' '.join(map(str, variant['seeds']))}",
            " ".join("" if loss is None else f"{loss:.3f}" for loss in variant["loss_clean"]),
            shown(variant["loss_clean_minus_plain"], 3),
            shown(variant["entropy"], 3),
            shown(variant["entropy_minus_plain"], 3),
            *(
                "" if name is None else f"{name} {shown(rows[name]['tokens_a_pass'])}"
                for name in (free, noisy)
            ),
            shown(one["over_training_free"]),
            shown(one["over_plain"]),
            f"{one['share_of_passes']['1']:.2f}",
            f"{sum(same for same, _ in equal)} of {sum(num for _, num in equal)}",
        ]


def markdown(found: dict[str, Any]) -> str:
    """The table of variants, then tokens a pass of every setting by window (and wall clock where timed)."""
    text = [_line(COLUMNS), _line(["---"] * len(COLUMNS)), *(_line(cells) for cells in lines(found))]
    for name, variant in found["variants"].items():
        rows = variant["settings"]
        windows = sorted({window_of(title) for title in rows})
        text += ["", f"{name}: tokens a pass", ""]
        text += [_line(["setting", *map(str, windows)]), _line(["---"] * (1 + len(windows)))]
        for kind in dict.fromkeys(title.rpartition("-w")[0] for title in rows):
            cells = [rows.get(f"{kind}-w{window}") for window in windows]
            text.append(_line([kind, *("" if row is None else _cell(row) for row in cells)]))
    return "\n".join(text) + "\n"


def _cell(row: dict[str, Any]) -> str:
    speed = row["speedup"]
    return shown(row["tokens_a_pass"]) + ("" if speed is None else f"; wall clock {shown(speed)}")


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def figure(found: dict[str, Any]) -> Figure:
    """Two panels, a colour a variant: what windows give, and what it costs the clean law."""
    drawn = Figure(figsize=(11, 4.6), dpi=120, layout="constrained")
    over_window, over_loss = drawn.subplots(1, 2)
    _over_window(over_window, found)
    _over_loss(over_loss, found)
    for axis in (over_window, over_loss):
        axis.set_ylabel("tokens a forward pass")
        axis.spines[["top", "right"]].set_visible(False)
    return drawn


def _over_window(axis: Axes, found: dict[str, Any]) -> None:
    """Each variant with as many levels as give it most; dotted: the best without noise, on plain weights."""
    for place, (name, variant) in enumerate(found["variants"].items()):
        for best_one, dashes in ((variant["best_noisy"], "-"), (variant["best_training_free"], ":")):
            if best_one is None or (dashes == ":" and variant["plain"] != name):
                continue
            kind = best_one.rpartition("-w")[0]
            points = sorted(
                (window_of(title), row["tokens_a_pass"]["value"])
                for title, row in variant["settings"].items()
                if title.rpartition("-w")[0] == kind
            )
            label = f"{name}, {kind.replace('replay-l', 'levels ')}"
            colour = method_colour(place)
            axis.plot(*zip(*points, strict=True), dashes, marker="o", markersize=3, color=colour, label=label)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set_xlabel("window")
    axis.legend(fontsize=7, frameon=False)


def _over_loss(axis: Axes, found: dict[str, Any]) -> None:
    """Best with noise (filled) and best without on the same weights (hollow), over the clean loss."""
    for place, (name, variant) in enumerate(found["variants"].items()):
        losses = [loss for loss in variant["loss_clean"] if loss is not None]
        if not losses:
            continue
        for best_one, filled in ((variant["best_noisy"], True), (variant["best_training_free"], False)):
            if best_one is not None:
                point = (np.mean(losses), variant["settings"][best_one]["tokens_a_pass"]["value"])
                colour = method_colour(place)
                axis.plot(*point, "o", color=colour, markerfacecolor=colour if filled else "none")
                axis.annotate(name if filled else "", point, (4, 4), textcoords="offset points", fontsize=7)
    axis.set_xlabel("clean validation loss, nats a code (hollow: best method without noise)")
