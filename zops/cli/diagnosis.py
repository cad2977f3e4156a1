"""How a diagnosis and a capacity look to people: what is wrong stands last, next to the prompt, with its remedy."""

import os
import textwrap
from dataclasses import dataclass
from shutil import get_terminal_size
from typing import TYPE_CHECKING, Self

from zops.cli.output import Output, format_table

if TYPE_CHECKING:
    from zops.host.capacity import Capacity, Room
    from zops.host.doctor import CheckResult, Diagnosis, Verdict

# Wider than this a line is hard to follow.
WIDEST = 120
NARROWEST = 60
# So many checks are shown in full without being asked.
FEW = 3
ORDER: "tuple[Verdict, ...]" = ("ok", "skipped", "warn", "fail")
MARKS = {
    "ok": ("ok", "32"), "skipped": ("skipped", "2"), "unseen": ("unseen", "36"), "warn": ("warn", "33;1"),
    "fail": ("FAIL", "31;1"),
}  # fmt: skip
MARGIN = " " * 9
INDENT = "  "


@dataclass(frozen=True, slots=True)
class Colours:
    """Whether stdout takes colours, and how wide it is; `width` 0 never breaks a line."""

    on: bool = False
    width: int = 0

    @classmethod
    def of(cls, out: Output) -> Self:
        """Look at where the data goes: a terminal gets colours and lines of its width, a file neither."""
        if out.mode != "human" or not out.stdout.isatty():
            return cls()
        return cls(not os.environ.get("NO_COLOR"), max(NARROWEST, min(WIDEST, get_terminal_size().columns)))

    def paint(self, text: str, colour: str) -> str:
        """Return the text in a colour, or as it is."""
        return f"\x1b[{colour}m{text}\x1b[0m" if self.on else text


def render(found: "Diagnosis", colours: Colours, *, verbose: bool) -> str:
    """Lay a diagnosis out: what is fine in a line, what could not be seen by name, what is wrong with its remedy.

    A few checks, or `verbose`, are shown in full.
    """
    full = verbose or len(found.results) <= FEW
    width = max((len(result.id) for result in found.results if full or result.verdict in {"warn", "fail"}), default=0)
    lines: list[str] = []
    for verdict in ORDER:
        results = found.having(verdict)
        if full or verdict in {"warn", "fail"}:
            for result in results:
                block = _block(result, width, colours, verbose=verbose)
                lines += ["", *block] if len(block) > 1 else block
        elif verdict == "ok" and results:
            lines += _line("ok", " ".join(result.id for result in results), colours)
        elif results:
            lines += _skipped(results, colours)
    return "\n".join([*lines, "", _summary(found, colours)]).lstrip("\n")


def _summary(found: "Diagnosis", colours: Colours) -> str:
    worst: Verdict = "fail" if found.having("fail") else "warn" if found.having("warn") else "ok"
    fixable = len(found.fixable)
    hints = [f"{fixable} can be mended with: zops doctor --fix"] if fixable else []
    return "; ".join([colours.paint(found.summary, MARKS[worst][1]) + f", in {found.seconds:.1f} s", *hints])


def _skipped(results: "tuple[CheckResult, ...]", colours: Colours) -> list[str]:
    """Name what could not be seen, with its reason once; what does not apply here is only counted."""
    unasked = sum(not result.finding.unseen for result in results)
    lines = _line("skipped", f"{unasked} that do not apply here; why: zops doctor -v", colours) if unasked else []
    unseen: dict[str, list[str]] = {}
    for result in results:
        if result.finding.unseen:
            unseen.setdefault(result.finding.reason, []).append(result.id)
    for reason, names in unseen.items():
        lines += _line("unseen", f"{' '.join(names)}: {reason}", colours)
    return lines


def _block(result: "CheckResult", width: int, colours: Colours, *, verbose: bool) -> list[str]:
    finding = result.finding
    mark = "unseen" if finding.unseen else result.verdict
    reason = f"{finding.reason}{' (mended)' if result.fixed else ''}"
    lines = _line(mark, f"{result.id:<{width}}  {reason}", colours, indent=width + 2)
    # A command must survive being copied: a remedy is split between its parts and never within one.
    for number, part in enumerate(finding.remedy.split("; ") if finding.remedy else ()):
        lines.append(f"{MARGIN}{colours.paint('fix:', '36') if number == 0 else '    '} {part}")
    if verbose and result.verdict in {"warn", "fail"}:
        lines += [f"{MARGIN}     {line}" for key, value in finding.evidence.items() for line in _evidence(key, value)]
        lines.append(f"{MARGIN}     {result.anchor}")
    return lines


def _evidence(key: str, value: object) -> list[str]:
    """Return what was seen in lines: one for each GPU where it is told by GPU."""
    if not isinstance(value, dict):
        return [f"{key}: {value}"]
    return [f"{key}: {name}: {_words(seen)}" for name, seen in value.items()]


def _words(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_words(seen)}" for key, seen in value.items())
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _line(mark: str, text: str, colours: Colours, *, indent: int = 0) -> list[str]:
    """Return a mark and a text, broken at the terminal's width; colours come last, since they take no room."""
    word, colour = MARKS[mark]
    lines = [text]
    if colours.width:
        room, hanging = colours.width - len(MARGIN), " " * indent
        lines = textwrap.wrap(text, room, subsequent_indent=hanging, break_long_words=False, break_on_hyphens=False)
    first, *rest = lines
    return [f"{colours.paint(word, colour)}{MARGIN[len(word) :]}{first}", *(f"{MARGIN}{line}" for line in rest)]


def render_capacity(found: "Capacity") -> str:
    """Lay a capacity out as a table: a row a size, a column a kind of GPU."""
    from zops.host.capacity import LARGEST_EDGE  # noqa: PLC0415 - `zops doctor` without --capacity needs none of it

    rooms = {(room.gpu.name, room.gpu.memory_total_bytes): room for room in found.rooms}
    heads = [f"{room.gpu.name}, {room.gpu.memory_total_bytes / 1e9:.1f} GB" for room in rooms.values()]
    rows = []
    for number, demand in enumerate(found.demands):
        cells = [_cell(room, number) for room in rooms.values()]
        size = f"{demand.edge}x{demand.edge}"
        rows.append((demand.dtype, size, f"{demand.total_bytes / 1e9:.1f} GB", *cells))
    lines = [format_table(("precision", "size", "needs", *heads), rows), ""]
    for room, head in zip(rooms.values(), heads, strict=True):
        most = ", ".join(
            f"{edge}x{edge}{' or more' * (edge == LARGEST_EDGE)}" if edge else "none" for edge in room.largest_edges
        )
        lines.append(f"{head}: largest square image in bfloat16, float32: {most}")
        speed = f"images a second: measured {room.measured}" if room.measured else "images a second: never measured"
        lines.append(f"{INDENT}{speed}")
    if not rooms:
        lines.append("no GPU is seen from here that is asked for: this is only what each size needs")
    asked = found.asked
    lines.append(
        f"zops.yaml allows {asked.edge}x{asked.edge} in {asked.dtype}, which needs {asked.total_bytes / 1e9:.1f} GB"
        + ("" if found.sound else ": it does NOT fit; lower serve.max_pixels")
    )
    return "\n".join(lines)


def _cell(room: "Room", number: int) -> str:
    if not room.fits[number]:
        return "no"
    speed = room.images_per_second[number]
    return f"fits, {speed:.2f}/s" if speed else "fits"
