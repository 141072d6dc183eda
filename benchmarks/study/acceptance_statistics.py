"""Which drafts are rejected, and what was wrong when they were drawn: a watcher of `replay_map`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.study.replay_map import Pass, ReplayMap

_ENTROPY = (0.0, 0.01, 0.1, 0.5, 1.0, 2.0, 3.0, 4.0)  # lower ends of the groups, in nats
_DISTANCE = (0, 1, 2, 3, 4, 8, 16, 32, 64)
CAUSES = ("never drawn", "left", "above", "left and above", "neither")


class Statistics:
    """Watcher of one map: notes every code whose draft was held against the image.

    Its draft was drawn in the pass before, from a law that saw drafts. `left` and `above` say whether the
    code to its left in its row, and the code above it, were wrong among those; `neither` leaves codes that
    are further away. A draft that entered the window with this pass is random: never drawn.
    """

    def __init__(self, replay: ReplayMap) -> None:
        self.replay = replay
        shape = replay.truth.shape
        self.true_laws = replay.log_laws("drafts", replay.truth)
        self.entropy = torch.special.entr(self.true_laws.exp()).sum(-1)
        above = torch.zeros(shape[1], dtype=torch.long)
        codes = replay.layout.code_slots
        above[codes[replay.layout.width :]] = codes[: -replay.layout.width]
        self.above = above
        self.has_above = replay.is_code & (replay.row > 0)
        self.cause = torch.zeros(shape, dtype=torch.long)  # index into CAUSES, by slot
        self.draft_laws = torch.full_like(self.true_laws, -float(np.log(self.true_laws.shape[-1])))
        self.noted: list[dict[str, Tensor]] = []
        self.committed: Counter[int] = Counter()

    def __call__(self, seen: Pass) -> None:
        """Notes a pass."""
        replay = self.replay
        self.committed.update(seen.committed[seen.committed > 0].tolist())
        wrong = seen.drafts != replay.truth
        image, slot = (seen.compared & replay.is_code).nonzero(as_tuple=True)
        draft, true = self.draft_laws[image, slot].exp(), self.true_laws[image, slot].exp()
        self.noted.append(
            {
                "rejected": wrong[image, slot],
                "entropy": self.entropy[image, slot],
                "distance": slot - seen.head[image],
                "row": replay.row[slot],
                "column": replay.column[slot],
                "cause": self.cause[image, slot],
                "maximal": torch.minimum(draft, true).sum(-1),
                "independent": (draft * true).sum(-1),
            }
        )
        left_wrong = F.pad(wrong[:, :-1], (1, 0))  # left of a row's first code stands a row end, never wrong
        above_wrong = wrong[:, self.above] & self.has_above
        cause = torch.full_like(self.cause, CAUSES.index("neither"))
        for name, where in {
            "left": left_wrong & ~above_wrong,
            "above": above_wrong & ~left_wrong,
            "left and above": left_wrong & above_wrong,
        }.items():
            cause[where] = CAUSES.index(name)
        self.cause = cause.where(seen.drawn, self.cause)
        self.draft_laws = seen.log_laws.where(seen.drawn[..., None], self.draft_laws)


def summary(watchers: Sequence[Statistics]) -> dict[str, Any]:
    """What all watchers noted; rates are of drafts that were held against the image.

    `coupling` is of drafts that were drawn: how often the true law gives the same token, by the shared noise
    of replay; by a maximal coupling of the same two laws (1 - total variation); by independent draws.
    """
    noted = [note for watcher in watchers for note in watcher.noted]
    all_of = {name: torch.cat([note[name] for note in noted]).numpy() for name in noted[0]}
    rejected, cause = all_of["rejected"], all_of["cause"]
    drawn = cause != CAUSES.index("never drawn")
    committed: Counter[int] = Counter()
    for watcher in watchers:
        committed.update(watcher.committed)
    by_cause = rates(np.array(CAUSES)[cause], rejected, CAUSES)
    for title, row in by_cause.items():
        share = (rejected & (np.array(CAUSES)[cause] == title)).sum() / max(1, rejected.sum())
        row["share_of_rejected"] = round(float(share), 4)
    return {
        "passes": sum(committed.values()),
        "passes_of_one": round(committed[1] / sum(committed.values()), 4),
        "compared": len(rejected),
        "rejected": round(float(rejected.mean()), 4),
        "by_cause": by_cause,
        "by_entropy": by_bin(all_of["entropy"], _ENTROPY, rejected),
        "by_distance": by_bin(all_of["distance"], _DISTANCE, rejected),
        "by_column": rates(all_of["column"], rejected, np.unique(all_of["column"]).tolist()),
        "by_row": rates(all_of["row"], rejected, np.unique(all_of["row"]).tolist()),
        "coupling": {
            "replay": round(float(1 - rejected[drawn].mean()), 4),
            "maximal": round(float(all_of["maximal"][drawn].mean()), 4),
            "independent": round(float(all_of["independent"][drawn].mean()), 4),
        },
    }


def by_bin(
    values: np.ndarray, lower_ends: Sequence[float], rejected: np.ndarray
) -> dict[str, dict[str, float]]:
    """Rates by groups of values, each named by its lower end."""
    ends = np.array(lower_ends)
    return rates(ends[np.searchsorted(ends, values, side="right") - 1], rejected, lower_ends)


def rates(labels: np.ndarray, rejected: np.ndarray, order: Sequence[Any]) -> dict[str, dict[str, float]]:
    """For each label that occurs: drafts compared, and the share of them that was rejected."""
    return {
        str(label): {
            "compared": int((labels == label).sum()),
            "rejected": round(float(rejected[labels == label].mean()), 4),
        }
        for label in order
        if (labels == label).any()
    }
