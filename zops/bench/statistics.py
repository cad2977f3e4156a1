"""What is said of repeated measurements. Small numbers of runs are the rule here, so nothing assumes a distribution."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Summary:
    """Repeated measurements of one thing, in that thing's unit."""

    n: int
    median: float
    least: float
    most: float
    p99: float
    """By nearest rank: the largest, below 100 measurements."""
    spread: float
    """How far a median may be off: half the middle half of the measurements, which below four is half of all."""


def summarise(samples: Sequence[float]) -> Summary:
    """Return the summary of at least one measurement."""
    ordered = sorted(samples)
    low, high = percentile(ordered, 25), percentile(ordered, 75)
    spread = 0.0 if low == high else (high - low) / 2  # equal infinities have no difference
    return Summary(
        n=len(ordered),
        median=statistics.median(ordered),
        least=ordered[0],
        most=ordered[-1],
        p99=percentile(ordered, 99),
        spread=spread,
    )


def percentile(ordered: Sequence[float], share: float) -> float:
    """Return the value that `share` percent of sorted values do not exceed, by nearest rank: one that was measured."""
    return ordered[max(0, math.ceil(len(ordered) * share / 100) - 1)]
