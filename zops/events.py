"""Progress of long work as typed events; nothing here knows a terminal.

Work takes a `Report`, a callable that is given each event. The CLI turns events into bars, plain lines or JSON lines;
tests collect them; `silent` drops them.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Started:
    """A piece of work began. `total` is in `unit`s (usually bytes); 0 when it is not known."""

    task: str
    text: str
    total: int = 0
    unit: str = "bytes"


@dataclass(frozen=True, slots=True)
class Progressed:
    """A piece of work moved on: `done` of `total` so far (absolute, not a difference)."""

    task: str
    done: int
    total: int = 0


@dataclass(frozen=True, slots=True)
class Finished:
    """A piece of work ended well. `changed` is False when it found everything done already."""

    task: str
    text: str
    seconds: float
    changed: bool = True


@dataclass(frozen=True, slots=True)
class Warned:
    """Something that the operator should know and that stops nothing."""

    text: str


Event = Started | Progressed | Finished | Warned
Report = Callable[[Event], None]


def silent(_event: Event) -> None:
    """Drop the event."""


class Task:
    """A running piece of work that counts; `advance` may be called from several threads."""

    def __init__(self, report: Report, name: str, total: int) -> None:
        self.name = name
        self.total = total
        self.done = 0
        self._report = report
        self._lock = threading.Lock()

    def advance(self, amount: int) -> None:
        """Count `amount` more units as done."""
        with self._lock:
            self.done += amount
            self._report(Progressed(self.name, self.done, self.total))


@contextmanager
def task(report: Report, name: str, text: str, *, total: int = 0, unit: str = "bytes") -> Iterator[Task]:
    """Report the start of a piece of work, hand out its counter, and report its end unless it raised."""
    began = time.monotonic()
    report(Started(name, text, total, unit))
    running = Task(report, name, total)
    yield running
    report(Finished(name, text, time.monotonic() - began))
