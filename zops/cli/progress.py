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
        # When a task first told how far it was, and how far: what an earlier run had done says nothing of the rate.
        self._first: dict[str, tuple[float, int]] = {}

    def __call__(self, event: Event) -> None:
        """Write one event, or nothing."""
        match event:
            case Started():
                self._started[event.task] = event
                self._spoken[event.task] = time.monotonic()
                self._first.pop(event.task, None)
            case Progressed():
                started, now = self._started.get(event.task), time.monotonic()
                first = self._first.setdefault(event.task, (now, event.done))
                if started and event.total and now - self._spoken[event.task] >= LINE_INTERVAL_S:
                    self._spoken[event.task] = now
                    so_far = amount(event.done, event.total, started.unit)
                    pace = _pace(event, first, now) if started.unit == "bytes" else ""
                    self._out.note(f"{started.text}: {100 * event.done // event.total} %, {so_far}{pace}")
            case Finished() if event.seconds >= WORTH_SAYING_S:
                self._out.note(f"{event.text} ({duration(event.seconds)})")
            case Warned():
                self._out.warn(event.text)


def _pace(event: Progressed, first: tuple[float, int], now: float) -> str:
    """Render the rate since a task began, and the time that the rest takes at that rate."""
    seconds, moved = now - first[0], event.done - first[1]
    if seconds <= 0 or moved <= 0:
        return ""
    return f", {size(moved / seconds)}/s, {duration((event.total - event.done) * seconds / moved)} left"


def amount(done: float, total: float, unit: str) -> str:
    """Render how much of a task is done, in its own unit."""
    return f"{size(done)} of {size(total)}" if unit == "bytes" else f"{done:.0f} of {total:.0f} {unit}"
