"""Pieces of a page: figures with captions, tables, tiles. Whatever comes out of a result is escaped here."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from zops.bench.report.svg import Bar, Kind, number
from zops.bench.result import Figure, Result, Table
from zops.bench.run import SMALL_MODEL

CLAIMED = "Dashed: claimed by the recipe for one RTX 4090D, not measured here."


@dataclass(frozen=True)
class Tile:
    """A number that matters, in large, with what it is and what it stands beside."""

    value: str
    unit: str
    label: str
    beside: str = ""

    def as_html(self) -> str:
        """Return it."""
        beside = f'<span class="soft">{escape(self.beside)}</span>' if self.beside else ""
        large = f"<b>{escape(self.value)} <small>{escape(self.unit)}</small></b>"
        return f'<div class="tile">{large}<span>{escape(self.label)}</span>{beside}</div>'


def plot(title: str, unit: str, drawing: str, caption: str) -> str:
    """Return a plot with its title, what its axis counts, and how to read it."""
    head = f'<h3>{escape(title)}</h3><p class="unit">{escape(unit)}</p>'
    return f"<figure>{head}{drawing}<figcaption>{escape(caption)}</figcaption></figure>"


def plots(found: Iterable[str]) -> str:
    """Return plots side by side where there is room."""
    kept = [each for each in found if each]
    return f'<div class="plots">{"".join(kept)}</div>' if kept else ""


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """Return a table; `numbers` are the columns that are aligned as numbers."""

    def cell(index: int, text: str) -> str:
        kind = "number" if index in numbers else text if text in {"worse", "better"} else ""
        return f'<td class="{kind}">{escape(text)}</td>' if kind else f"<td>{escape(text)}</td>"

    head = "".join(
        f'<th class="number">{escape(h)}</th>' if i in numbers else f"<th>{escape(h)}</th>" for i, h in enumerate(heads)
    )
    body = "".join(f"<tr>{''.join(cell(i, text) for i, text in enumerate(row))}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def paragraph(text: str, kind: str = "") -> str:
    """Return a paragraph, nothing for an empty text."""
    return f"<p{f' class={chr(34)}{kind}{chr(34)}' if kind else ''}>{escape(text)}</p>" if text else ""


def measured(figure: Figure, name: str, kind: Kind = "other", *, floor: float | None = None) -> Bar:
    """Return the bar of a figure: its median, and the range that was seen."""
    found = figure.summary
    least, most = (found.least, found.most) if found.n > 1 else (None, None)
    return Bar(name, found.median, with_unit(found.median, figure.unit), kind, least, most, floor)


def with_unit(value: float, unit: str) -> str:
    """Write a number with its unit; small times and sizes in the next smaller unit."""
    smaller = {"s": ("ms", 1e3), "GB": ("MB", 1e3), "GB/s": ("MB/s", 1e3), "TFLOP/s": ("GFLOP/s", 1e3)}
    if unit in smaller and 0 < abs(value) < 0.1:
        unit, factor = smaller[unit]
        value *= factor
    return f"{number(value)} {unit}".strip()


def times(slower: float, faster: float) -> str:
    """Write how many times as fast something is."""
    return f"{number(round(slower / faster, 2))}\u00d7" if faster > 0 else "?"


def runs_of(figures: Sequence[Figure]) -> str:
    """Write how many runs are behind figures."""
    counts = sorted({figure.summary.n for figure in figures})
    if not counts:
        return ""
    many = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"Median of {many} runs, thin line: least to most." if counts[-1] > 1 else "One run each."


def memory_of(result: Result, table_name: Table) -> str:
    """Return which memory a table tells of: the GPU's, or the host's where there is no GPU."""
    return "GPU memory" if result.of(table_name, "GPU memory") else "host memory"


def kind_of(preset: str) -> Kind:
    """Return how a preset is drawn."""
    kinds: dict[str, Kind] = {"bf16": "own2", "fp8": "own"}
    return kinds.get(preset, "other")


def is_small(result: Result) -> bool:
    """Tell whether the model is a tiny one, beside which claims for the real one mean nothing."""
    return int(result.model.get("parameters", 0)) < SMALL_MODEL


def claims_note(result: Result) -> str:
    """Return what claims in a plot are, where there are any."""
    return "" if is_small(result) else CLAIMED


def section(title: str, text: str, body: str) -> str:
    """Return a section of the page."""
    return f"<section><h2>{title}</h2>{paragraph(text)}{body}</section>"
