"""Events as a person at a terminal sees them: bars that vanish, and a line for what took a while."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, TextColumn
from rich.table import Column
from rich.text import Text

from zops.cli.output import duration, size
from zops.cli.progress import WORTH_SAYING_S, amount
from zops.events import Event, Finished, Progressed, Started, Warned

if TYPE_CHECKING:
    from rich.progress import Task


# What spinner, bar, amount, rate and times take of a line at most; the rest is for the text.
OTHER_COLUMNS = 56
LEAST_TEXT = 16


class Bars:
    """Bars that vanish when their task ends; a line stays of a task that took a while."""

    def __init__(self, stream: IO[str]) -> None:
        self._bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
            _KnownBar(bar_width=12, table_column=Column(no_wrap=True)),
            _Amount(table_column=Column(no_wrap=True)),
            console=Console(file=stream),
            transient=True,
            refresh_per_second=8,
            # The command's own output stays where it was sent.
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._ids: dict[str, Any] = {}

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._bars.stop()

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """Take the bars off the terminal for a moment."""
        self._bars.stop()
        yield
        self._bars.start()

    def __call__(self, event: Event) -> None:
        """Show one event."""
        match event:
            case Started():
                text = shortened(event.text, self._bars.console.width - OTHER_COLUMNS)
                self._ids[event.task] = self._bars.add_task(text, total=event.total or None, unit=event.unit)
            case Progressed() if event.task in self._ids:
                self._bars.update(self._ids[event.task], completed=event.done, total=event.total or None)
            case Finished():
                if event.task in self._ids:
                    self._bars.remove_task(self._ids.pop(event.task))
                if event.seconds >= WORTH_SAYING_S:
                    self._say(f"{event.text} ({duration(event.seconds)})")
            case Warned():
                self._say(f"warning: {event.text}", style="yellow")

    def _say(self, text: str, style: str | None = None) -> None:
        self._bars.console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)


class _KnownBar(BarColumn):
    """A bar for tasks whose size is known; the spinner says enough of the others."""

    def render(self, task: "Task") -> Any:
        return super().render(task) if task.total else Text("")


class _Amount(ProgressColumn):
    """How much is done, how fast, and how long the rest will take; where that is not known, how long it took so far."""

    def render(self, task: "Task") -> Text:
        if not task.total:
            return Text(clock(task.elapsed or 0))
        unit = task.fields.get("unit", "bytes")
        if unit != "bytes":
            return Text(amount(task.completed, task.total, unit))
        parts = [share_of(task.completed, task.total)]
        if task.speed and not task.finished:
            parts.append(f"{size(task.speed)}/s")
        if task.time_remaining:
            parts.append(f"{clock(task.time_remaining)} left")
        return Text("  ".join(parts))


def shortened(text: str, width: int) -> str:
    """Cut a text at its front, where paths say least, so that a line of the terminal holds it with its numbers."""
    width = max(width, LEAST_TEXT)
    return text if len(text) <= width else f"…{text[1 - width :]}"


def share_of(done: float, total: float) -> str:
    """Render both numbers in the unit of the larger: 0.23 / 9.97 GB."""
    unit, step = next(((u, s) for u, s in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if total >= s), ("B", 1.0))
    digits = 0 if unit == "B" or total >= 100 * step else 2
    return f"{done / step:.{digits}f} / {total / step:.{digits}f} {unit}"


def clock(seconds: float) -> str:
    """Render a time that shrinks while one looks at it: 0:07, 12:34, 1:02:03."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
