"""What was measured beside what was promised."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.measure import print_table


@dataclass(frozen=True)
class Row:
    """A figure of the table.

    Attributes:
        figure: what is measured, and against what.
        measured: the figures themselves, in words.
        value: what is held against the bar.
        bar: None for what is only reported.
        at_most: whether the value must be at most the bar; else at least.
        unit: behind both.
    """

    figure: str
    measured: str
    value: float
    bar: float | None = None
    at_most: bool = False
    unit: str = "x"

    @property
    def verdict(self) -> str:
        if self.bar is None:
            return ""
        return "PASS" if (self.value <= self.bar if self.at_most else self.value >= self.bar) else "missed"

    @property
    def promised(self) -> str:
        return "" if self.bar is None else f"{'<=' if self.at_most else '>='} {self.bar:g}{self.unit}"


def show(rows: Sequence[Row], target: Path | None) -> int:
    """Print the table, write it as JSON where asked to, and return 1 when a bar was missed."""
    print()
    print_table(("figure", "bar", "value", "measured", ""), _cells(rows))
    if target:
        target.write_text(json.dumps([{**asdict(row), "verdict": row.verdict} for row in rows], indent=1) + "\n")
    return int(any(row.verdict == "missed" for row in rows))


def _cells(rows: Iterable[Row]) -> Iterable[Sequence[object]]:
    for row in rows:
        yield row.figure, row.promised, f"{row.value:.3g}{row.unit}", row.measured, row.verdict
