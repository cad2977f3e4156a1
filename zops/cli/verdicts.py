"""How verdicts on instances look to people: a table, and below each row that is not ok why and what to do."""

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from zops.cli.diagnosis import Colours
from zops.cli.output import duration

if TYPE_CHECKING:
    from zops.health.verdict import Health, Probe

HEADS = ("NAME", "VERDICT", "LAYER", "REASON")
MARKS = {"ok": "32", "degraded": "33;1", "failed": "31;1"}
INDENT = "  "


def render_verdicts(healths: "Sequence[Health]", colours: Colours, *, verbose: bool = False) -> str:
    """Lay verdicts out: a row an instance with its first bad layer; `verbose` adds every layer that was asked."""
    rows = [(one.title, *_row(one)) for one in healths]
    widths = [max(len(row[column]) for row in (HEADS, *rows)) for column in range(3)]
    beside = not colours.width or _room(widths, colours) >= colours.width // 2
    lines = [_columns(HEADS if beside else (*HEADS[:3], ""), widths)]
    for one, row in zip(healths, rows, strict=True):
        lines += _broken(row, widths, colours)
        bad = one.first_bad
        if bad:
            lines += _remedy(bad, colours)
        if verbose:
            lines += [line for probe in one.probes for line in _layer(probe, colours)]
    return "\n".join(lines)


def _row(health: "Health") -> tuple[str, str, str]:
    bad = health.first_bad
    if bad:
        return health.verdict, bad.layer, bad.reason
    facts = [probe.reason for probe in health.probes if probe.layer in {"gpu", "queue", "canary"}]
    spent = sum(probe.seconds for probe in health.probes)
    return health.verdict, "-", f"{len(health.probes)} layers in {duration(spent)}: {'; '.join(facts)}"


def _broken(row: Sequence[str], widths: Sequence[int], colours: Colours) -> list[str]:
    """Break a row's last column at the terminal's width; below the row, where the first columns leave little room."""
    *cells, text = row
    room = _room(widths, colours)
    margin = colours.width - room
    if not colours.width:
        parts = [text]
    elif room >= len(text) or room >= colours.width // 2:
        parts = _wrap(text, room) or [""]
    else:
        margin, parts = len(INDENT), ["", *_wrap(text, colours.width - len(INDENT))]
    lines = [_columns((*cells, parts[0]), widths), *(" " * margin + part for part in parts[1:])]
    # Colours come last, since they take no room; the verdict stands behind the first column.
    place = widths[0] + 2
    verdict = row[1]
    lines[0] = lines[0][:place] + colours.paint(verdict, MARKS[verdict]) + lines[0][place + len(verdict) :]
    return lines


def _room(widths: Sequence[int], colours: Colours) -> int:
    """Return what the first columns leave of the terminal."""
    return colours.width - sum(widths) - 2 * len(widths)


def _columns(cells: Sequence[str], widths: Sequence[int]) -> str:
    *first, last = cells
    return ("".join(cell.ljust(width + 2) for cell, width in zip(first, widths, strict=True)) + last).rstrip()


def _remedy(probe: "Probe", colours: Colours) -> list[str]:
    """Return what to do: a command must survive being copied, so it is split between its parts and never within one."""
    parts = probe.remedy.split("; ") if probe.remedy else []
    return [
        f"{INDENT}{colours.paint('fix:', '36') if number == 0 else '    '} {part}" for number, part in enumerate(parts)
    ]


def _layer(probe: "Probe", colours: Colours) -> list[str]:
    mark = colours.paint(probe.verdict, MARKS[probe.verdict]) + " " * (9 - len(probe.verdict))
    text = f"{probe.code}: {probe.reason}" if probe.code else probe.reason
    text = f"{text} ({duration(probe.seconds)})"
    margin = len(INDENT) + 19
    first, *rest = _wrap(text, colours.width - margin) if colours.width else [text]
    return [f"{INDENT}{mark} {probe.layer:<8} {first}", *(" " * margin + line for line in rest)]


def _wrap(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)
