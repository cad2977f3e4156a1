"""Two kinds of plots as inline SVG: bars and lines. Both start at zero.

Places across are percentages and places down are pixels, so a plot is as wide as what it stands in while its text
keeps its size: there is no viewBox that would shrink it on a phone. Colours are classes of the page's style.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import Literal

Kind = Literal["own", "own2", "other", "claim"]
"""What zops does, a second shade of it, what else was measured here, what somebody claims of another machine."""

BAR_ROOM = 70.0
"""Percent of the width that the longest bar takes; the rest is for its number."""
LINE_ROOM = 62.0
"""Percent of the width in which lines run; the rest is for their names."""
_ROW, _BAR, _AXIS = 42, 16, 26
_GUTTER = 14.0
_LINE_HEIGHT = 240
_TEXT_STEP = 15


@dataclass(frozen=True)
class Bar:
    """One bar: its name above it, its number at its end.

    Attributes:
        name: what it is.
        value: how long it is.
        text: the number as it is written.
        kind: whose it is.
        least, most: range of the measurements, drawn as a thin line; None for a single one.
        floor: where a mark is drawn: what is possible at best.
        parts: lengths of its parts, when it is divided; they are shaded in turn.
    """

    name: str
    value: float
    text: str
    kind: Kind = "other"
    least: float | None = None
    most: float | None = None
    floor: float | None = None
    parts: tuple[float, ...] = ()


@dataclass(frozen=True)
class Line:
    """One line through points (place across from 0 to 1, value), named at its end."""

    name: str
    points: tuple[tuple[float, float], ...]
    kind: Kind = "other"
    texts: tuple[str, ...] = ()
    """Numbers at the points; none where it is empty."""


def ticks(most: float, count: int = 4) -> list[float]:
    """Return round numbers from 0 on, about `count` of them, of which none is above `most`."""
    if not 1e-12 < most < math.inf:
        return [0.0]
    rough = most / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    return [index * step for index in range(int(most / step * 1.000001) + 1)]


def number(value: float) -> str:
    """Write a number with three digits, without trailing zeros and exponents; ∞ for infinity."""
    if math.isinf(value):
        return "∞"
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{min(digits, 6)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def bars(rows: Sequence[Bar], unit: str, title: str) -> str:
    """Return bars one below the other over an axis in `unit`; `title` is for who cannot see it."""
    most = max((value for row in rows for value in (row.value, row.most or 0, row.floor or 0)), default=0) or 1.0
    height = _ROW * len(rows) + _AXIS
    body = [_axis(ticks(most), most, unit, _ROW * len(rows))]
    body += [_bar(row, index * _ROW, most) for index, row in enumerate(rows)]
    return _svg(body, height, title)


def lines(series: Sequence[Line], places: Sequence[tuple[float, str]], unit: str, title: str) -> str:
    """Return lines over `places` (from 0 to 1, with names) against `unit`; `title` is for who cannot see it."""
    values = [value for line in series for _, value in line.points]
    most = max(values, default=0) or 1.0
    top, bottom = 22, _LINE_HEIGHT
    body = []
    for index, tick in enumerate(steps := ticks(most)):
        y = _down(tick, most, top, bottom)
        label = f"{number(tick)} {unit}" if index == len(steps) - 1 else number(tick)
        body.append(f'<line class="grid" x1="0" x2="100%" y1="{y}" y2="{y}"/>')
        body.append(f'<text class="tick" x="0" y="{y - 4}">{escape(label)}</text>')
    for place, name in places:
        body.append(f'<text class="tick middle" x="{_across(place)}" y="{bottom + 18}">{escape(name)}</text>')
    ends = _apart([(_down(line.points[-1][1], most, top, bottom) + 4) for line in series if line.points])
    for line, end in zip([line for line in series if line.points], ends, strict=True):
        body.append(_line(line, most, top, bottom, end))
    return _svg(body, bottom + _AXIS, title)


def _svg(body: Sequence[str], height: float, title: str) -> str:
    return f'<svg role="img" width="100%" height="{height:g}"><title>{escape(title)}</title>{"".join(body)}</svg>'


def _axis(steps: Sequence[float], most: float, unit: str, bottom: float) -> str:
    parts = []
    for index, tick in enumerate(steps):
        x = f"{tick / most * BAR_ROOM:.2f}%"
        label = f"{number(tick)} {unit}" if index == len(steps) - 1 else number(tick)
        side = "" if index == 0 else " middle"
        parts.append(f'<line class="grid" x1="{x}" x2="{x}" y1="0" y2="{bottom}"/>')
        parts.append(f'<text class="tick{side}" x="{x}" y="{bottom + 18}">{escape(label)}</text>')
    return "".join(parts)


def _bar(row: Bar, top: float, most: float) -> str:
    def x(value: float) -> str:
        return f"{value / most * BAR_ROOM:.2f}%"

    y, middle = top + 19, top + 19 + _BAR / 2
    parts = [f'<text class="name" x="0" y="{top + 14}">{escape(row.name)}</text>']
    if row.parts:
        start = 0.0
        for index, part in enumerate(row.parts):
            shade = f"part{index}"
            parts.append(f'<rect class="{row.kind} {shade}" x="{x(start)}" y="{y}" width="{x(part)}" height="{_BAR}"/>')
            start += part
    else:
        parts.append(f'<rect class="{row.kind}" x="0" y="{y}" width="{x(row.value)}" height="{_BAR}"/>')
    if row.least is not None and row.most is not None and row.most > row.least:
        ends = f'x1="{x(row.least)}" x2="{x(row.most)}"'
        parts.append(f'<line class="range" {ends} y1="{middle}" y2="{middle}"/>')
    if row.floor is not None:
        at = x(row.floor)
        parts.append(f'<line class="floor" x1="{at}" x2="{at}" y1="{y - 3}" y2="{y + _BAR + 3}"/>')
    end = x(max(row.value, row.most or 0))
    parts.append(f'<text class="value" x="{end}" dx="7" y="{y + _BAR - 3.5}">{escape(row.text)}</text>')
    return "".join(parts)


def _line(line: Line, most: float, top: float, bottom: float, end: float) -> str:
    places = [(_across(place), _down(value, most, top, bottom)) for place, value in line.points]
    parts = [
        f'<line class="stroke {line.kind}" x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}"/>'
        for (x1, y1), (x2, y2) in pairwise(places)
    ]
    parts += [f'<circle class="dot {line.kind}" cx="{x}" cy="{y}" r="4"/>' for x, y in places]
    for (x, y), text in zip(places, line.texts, strict=False):
        parts.append(f'<text class="point middle" x="{x}" y="{y - 9}">{escape(text)}</text>')
    parts.append(f'<text class="end {line.kind}" x="{places[-1][0]}" dx="11" y="{end:.1f}">{escape(line.name)}</text>')
    return "".join(parts)


def _across(place: float) -> str:
    # The left is kept free for the numbers of the axis.
    return f"{_GUTTER + place * (LINE_ROOM - _GUTTER):.2f}%"


def _down(value: float, most: float, top: float, bottom: float) -> float:
    return round(bottom - value / most * (bottom - top), 1)


def _apart(wanted: Sequence[float]) -> list[float]:
    """Return places for lines of text, each as near as it can be to where it is wanted, none over another."""
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    given = [0.0] * len(wanted)
    last = -math.inf
    for index in order:
        last = given[index] = max(wanted[index], last + _TEXT_STEP)
    # What was pushed below the plot pushes back up.
    limit = _LINE_HEIGHT + 4.0
    for index in reversed(order):
        given[index] = limit = min(given[index], limit)
        limit -= _TEXT_STEP
    return given
