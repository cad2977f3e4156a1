"""Events as a log or a program reads them: a line now and then, or one JSON object a line."""

import json
import time
from typing import IO, TYPE_CHECKING

from zops.cli.output import duration, size
from zops.events import Event, Finished, Progressed, Started, Warned

if TYPE_CHECKING:
    from zops.cli.output import Output

# Work that took less leaves no trace: nobody waited for it.
WORTH_SAYING_S = 1.0
LINE_INTERVAL_S = 10.0
JSON_INTERVAL_S = 1.0


class JsonLines:
    """One JSON object a line for every event; progress of a task at most once a second."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._spoken: dict[str, float] = {}

    def __call__(self, event: Event) -> None:
        """Write one event."""
        if isinstance(event, Progressed):
            now = time.monotonic()
            if now - self._spoken.get(event.task, 0) < JSON_INTERVAL_S and event.done != event.total:
                return
            self._spoken[event.task] = now
        body = {"event": type(event).__name__.lower()} | {slot: getattr(event, slot) for slot in event.__slots__}
        self._stream.write(json.dumps(body, default=str) + "\n")
        self._stream.flush()


class Lines:
    """A line when a task ends that took a while, and one now and then while it runs; for logs."""

    def __init__(self, out: "Output") -> None:
        self._out = out
        self._started: dict[str, Started] = {}
        self._spoken: dict[str, float] = {}

    def __call__(self, event: Event) -> None:
        """Write one event, or nothing."""
        match event:
            case Started():
                self._started[event.task] = event
                self._spoken[event.task] = time.monotonic()
            case Progressed():
                started, now = self._started.get(event.task), time.monotonic()
                if started and event.total and now - self._spoken[event.task] >= LINE_INTERVAL_S:
                    self._spoken[event.task] = now
                    so_far = amount(event.done, event.total, started.unit)
                    self._out.note(f"{started.text}: {100 * event.done // event.total} %, {so_far}")
            case Finished() if event.seconds >= WORTH_SAYING_S:
                self._out.note(f"{event.text} ({duration(event.seconds)})")
            case Warned():
                self._out.warn(event.text)


def amount(done: float, total: float, unit: str) -> str:
    """Render how much of a task is done, in its own unit."""
    return f"{size(done)} of {size(total)}" if unit == "bytes" else f"{done:.0f} of {total:.0f} {unit}"
