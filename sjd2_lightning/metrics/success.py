"""Share of episodes that succeeded, with its interval."""

from __future__ import annotations

from collections.abc import Sequence

from scipy import stats

from sjd2_lightning.metrics.bootstrap import CONFIDENCE, MetricResult


def success_result(outcomes: Sequence[bool]) -> MetricResult:
    """Share of successes among outcomes (N,) with Wilson's interval, which holds near 0 and 1 too.

    Source: Wilson 1927, by scipy.

    Raises:
        ValueError: there are no outcomes.
    """
    if not outcomes:
        raise ValueError("success: needs at least one episode")
    found = stats.binomtest(sum(outcomes), len(outcomes))
    low, high = found.proportion_ci(CONFIDENCE, method="wilson")
    protocol = "share of episodes with the cube on the goal at their end; Wilson's interval"
    return MetricResult(
        "success", sum(outcomes) / len(outcomes), (float(low), float(high)), len(outcomes), protocol
    )
