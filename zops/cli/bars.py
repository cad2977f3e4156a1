"""Events as a person at a terminal sees them: bars that vanish, and a line for what took a while."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from zops.cli.output import duration, size
from zops.cli.progress import WORTH_SAYING_S, amount
from zops.events import Event, Finished, Progressed, Started, Warned

if TYPE_CHECKING:
    from rich.progress import Task


class Bars:
    """Bars that vanish when their task ends; a line stays of a task that took a while."""

    def __init__(self, stream: IO[str]) -> None:
        self._bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            _KnownBar(bar_width=24),
            _Amount(),
            TimeElapsedColumn(),
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
                self._ids[event.task] = self._bars.add_task(event.text, total=event.total or None, unit=event.unit)
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
    """How much is done, how fast, and how long it will take, as far as that is known."""

    def render(self, task: "Task") -> Text:
        if not task.total:
            return Text("")
        unit = task.fields.get("unit", "bytes")
        parts = [amount(task.completed, task.total, unit)]
        if task.speed and unit == "bytes":
            parts.append(f"{size(task.speed)}/s")
        if task.time_remaining:
            parts.append(f"{duration(task.time_remaining)} left")
        return Text("  ".join(parts))
