"""Two results, figure by figure: what became worse, by a rule that knows how noisy each figure is."""

import math
from dataclasses import dataclass
from typing import Any, Literal

from zops.bench.machine import differences
from zops.bench.result import Figure, Result

Verdict = Literal["same", "better", "worse", "unclear", "gone", "new"]
TOLERANCE = 0.05
RULE = (
    "A figure is worse (or better) when its median is so by more than the tolerance, and by more than both spreads "
    "together; within them it is unclear. The spread is half of the middle half of the measurements, half of their "
    "range below four, nothing for a single one."
)


@dataclass(frozen=True)
class Pair:
    """A figure before and after; one of them is None where only one result has it."""

    before: Figure | None
    after: Figure | None
    verdict: Verdict

    @property
    def id(self) -> str:
        """Its name."""
        figure = self.before or self.after
        assert figure, "one of them is there"
        return figure.id

    @property
    def ratio(self) -> float | None:
        """The median after, divided by that before; None where there is none."""
        if self.before is None or self.after is None or self.before.value == 0:
            return None
        if math.isinf(self.before.value) or math.isinf(self.after.value):
            return 1.0 if self.before.value == self.after.value else None
        return self.after.value / self.before.value

    def as_json(self) -> dict[str, Any]:
        """Return it as documented in docs/reference/json.md."""

        def value(figure: Figure | None) -> float | None:
            return figure.as_json()["value"] if figure else None

        figure = self.before or self.after
        assert figure, "one of them is there"
        return {
            "id": self.id,
            "unit": figure.unit,
            "before": value(self.before),
            "after": value(self.after),
            "ratio": None if self.ratio is None else round(self.ratio, 4),
            "verdict": self.verdict,
        }


@dataclass(frozen=True)
class Comparison:
    """Every figure of two results, and in what their machines differ."""

    pairs: tuple[Pair, ...]
    machines: tuple[str, ...]
    models: tuple[str, ...]
    tolerance: float

    @property
    def regressions(self) -> tuple[Pair, ...]:
        """The figures that became worse."""
        return tuple(pair for pair in self.pairs if pair.verdict == "worse")

    def as_json(self) -> dict[str, Any]:
        """Return it as documented in docs/reference/json.md."""
        return {
            "tolerance": self.tolerance,
            "rule": RULE,
            "regressions": len(self.regressions),
            "machines_differ": list(self.machines),
            "models_differ": list(self.models),
            "figures": [pair.as_json() for pair in self.pairs],
        }


def compare(before: Result, after: Result, tolerance: float = TOLERANCE) -> Comparison:
    """Compare two results by the names of their figures; the rule is `RULE`."""
    old, new = ({figure.id: figure for figure in result.figures} for result in (before, after))
    pairs = [_pair(old.get(name), new.get(name), tolerance) for name in dict.fromkeys([*old, *new])]
    models = [
        f"{key}: {before.model.get(key) or 'none'} -> {after.model.get(key) or 'none'}"
        for key in ("model", "manifest_digest")
        if before.model.get(key) != after.model.get(key)
    ]
    return Comparison(tuple(pairs), tuple(differences(before.machine, after.machine)), tuple(models), tolerance)


def _pair(before: Figure | None, after: Figure | None, tolerance: float) -> Pair:
    if before is None or after is None:
        return Pair(before, after, "new" if before is None else "gone")
    return Pair(before, after, judge(before, after, tolerance))


def judge(before: Figure, after: Figure, tolerance: float) -> Verdict:
    """Return the verdict on a figure that both results have."""
    a, b = before.value, after.value
    if before.better == "neither" or a == b:
        return "same"
    worsening = b - a if before.better == "less" else a - b
    # Of a single failed request after none, no share can be told: any change from 0 is beyond every tolerance.
    if math.isfinite(worsening) and abs(worsening) <= tolerance * abs(a):
        return "same"
    if math.isfinite(worsening) and abs(worsening) <= before.summary.spread + after.summary.spread:
        return "unclear"
    return "worse" if worsening > 0 else "better"
