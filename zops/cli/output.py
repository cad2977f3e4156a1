"""The one sink of everything a command says: data on stdout, all else on stderr, in the form that was asked for.

`human` renders for a terminal (bars, colours, tables), `plain` is the same without control characters, and `json` puts
one JSON document on stdout and events and errors as JSON lines on stderr. Resolved once, before a command runs.
"""

import itertools
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import IO, TYPE_CHECKING, Any, Literal, Self

from zops.errors import UsageError, ZopsError
from zops.events import Report

if TYPE_CHECKING:
    from zops.cli.bars import Bars

Mode = Literal["human", "plain", "json"]
MODES = ("human", "plain", "json")


def size(count: float) -> str:
    """Render a number of bytes in decimal units, as disks and hubs count them."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    raise AssertionError


def duration(seconds: float) -> str:
    """Render a duration for people: 0.31 s, 12.4 s, 3 min 05 s."""
    if seconds < 10:
        return f"{seconds:.2f} s"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s"


class Output:
    """Where a command writes to; made once per command line."""

    def __init__(self, mode: Mode, *, stdout: IO[str] | None = None, stderr: IO[str] | None = None) -> None:
        self.mode = mode
        self.stdout = stdout or sys.stdout
        self.stderr = stderr or sys.stderr
        self._bars: Bars | None = None

    @classmethod
    def resolve(cls, asked: str | None, environ: Mapping[str, str]) -> Self:
        """Pick the mode: what was asked for, else `ZOPS_OUTPUT`, else human on a terminal and plain elsewhere."""
        mode = asked or environ.get("ZOPS_OUTPUT") or ("human" if sys.stderr.isatty() else "plain")
        if mode not in MODES:
            raise UsageError(f"ZOPS_OUTPUT is {mode!r}, it must be one of {', '.join(MODES)}")
        return cls(mode)  # type: ignore[arg-type] # membership was just checked

    @classmethod
    def early(cls, argv: Sequence[str], environ: Mapping[str, str]) -> Self:
        """Pick the mode for errors that come before any command has parsed its options."""
        asked = next((b for a, b in itertools.pairwise(argv) if a == "--output"), None)
        asked = next((a.partition("=")[2] for a in argv if a.startswith("--output=")), asked)
        if asked not in MODES:
            asked = environ.get("ZOPS_OUTPUT") if environ.get("ZOPS_OUTPUT") in MODES else None
        return cls.resolve(asked, {})

    @property
    def interactive(self) -> bool:
        """Whether a person can be asked."""
        return self.mode == "human" and sys.stdin.isatty()

    # --- data, on stdout

    def data(self, body: Any, human: str | None = None) -> None:
        """Write the result: the JSON document, or the text for people (nothing when it is empty)."""
        with self._aside():
            if self.mode == "json":
                self.stdout.write(json.dumps(body, indent=1, default=str, ensure_ascii=False) + "\n")
            elif human:
                self.stdout.write(human.rstrip("\n") + "\n")
            self.stdout.flush()

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[str]], body: Any, *, empty: str = "") -> None:
        """Write rows as a table for people, `body` as JSON; `empty` is said on stderr when there are no rows."""
        rows = [tuple(row) for row in rows]
        if self.mode == "json":
            self.data(body)
        elif not rows:
            self.note(empty or "nothing to list")
        else:
            self.data(None, format_table(columns, rows))

    def line(self, text: str) -> None:
        """Write one line of a stream whose end is not known; a JSON document a line for programs."""
        self.stdout.write((json.dumps({"line": text}, ensure_ascii=False) if self.mode == "json" else text) + "\n")
        self.stdout.flush()

    def raw_line(self, text: str) -> None:
        """Write one line of a stream as it is, in every mode: its writer knows in which one it speaks."""
        self.stdout.write(f"{text}\n")
        self.stdout.flush()

    # --- everything else, on stderr

    def note(self, text: str) -> None:
        """Say something that is not the result."""
        self._say("note", text)

    def warn(self, text: str) -> None:
        """Say something that the operator should know and that stops nothing."""
        self._say("warning", text)

    def error(self, error: ZopsError) -> None:
        """Render an error: one line what and why, and one what to do."""
        if self.mode == "json":
            self.stderr.write(json.dumps(error.as_json(), default=str) + "\n")
        else:
            self.stderr.write(f"{self._mark('error', '31;1')}: {error.message}\n")
            if error.hint:
                self.stderr.write(f"{self._mark('  fix', '36')}: {error.hint}\n")
        self.stderr.flush()

    def _say(self, kind: str, text: str) -> None:
        with self._aside():
            if self.mode == "json":
                self.stderr.write(json.dumps({kind: text}) + "\n")
            else:
                self.stderr.write(f"{self._mark('warning', '33')}: {text}\n" if kind == "warning" else f"{text}\n")
            self.stderr.flush()

    def _mark(self, word: str, colour: str) -> str:
        coloured = self.mode == "human" and self.stderr.isatty() and not os.environ.get("NO_COLOR")
        return f"\x1b[{colour}m{word}\x1b[0m" if coloured else word

    # --- progress

    @contextmanager
    def progress(self) -> Iterator[Report]:
        """Hand out a `Report` that renders events: bars on a terminal, lines in a log, JSON lines for programs."""
        from zops.cli.progress import JsonLines, Lines  # noqa: PLC0415 - only long work needs it

        if self.mode == "json":
            yield JsonLines(self.stderr)
        elif self.mode == "human" and self.stderr.isatty():
            from zops.cli.bars import Bars  # noqa: PLC0415 - rich costs 60 ms, and a log needs none of it

            with Bars(self.stderr) as bars:
                self._bars = bars
                try:
                    yield bars
                finally:
                    self._bars = None
        else:
            yield Lines(self)

    def _aside(self) -> AbstractContextManager[object]:
        """Take the bars away while something else is written; on a terminal both go to the same place."""
        return self._bars.hidden() if self._bars else nullcontext()


def format_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay rows out under their heads, columns two spaces apart, nothing cut."""
    table = [tuple(columns), *rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(columns))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in table)
