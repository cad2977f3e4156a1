"""What the watch has to say, as events: one JSON object each, on stdout, in a file, and for a webhook.

Every kind has exactly the fields that are listed here; docs/reference/json.md explains them (a test holds it to this).
"""

import json
import queue
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from zops.cache.redact import redacted

_OF_AN_INSTANCE = ("instance", "runtime", "id")
COMMON = ("event", "at", "host")
"""Fields of every event."""
KINDS: dict[str, tuple[str, ...]] = {
    "watch-started": ("interval_s", "heal", "dry_run", "runtimes"),
    "watch-stopped": ("seconds",),
    "instance-found": (*_OF_AN_INSTANCE, "state", "url"),
    "instance-replaced": (*_OF_AN_INSTANCE, "was"),
    "instance-gone": _OF_AN_INSTANCE,
    "verdict": (*_OF_AN_INSTANCE, "verdict", "was", "layer", "code", "reason", "remedy", "evidence"),
    "healing": (*_OF_AN_INSTANCE, "action", "code", "layer", "reason", "because", "evidence", "attempt"),
    "would-heal": (*_OF_AN_INSTANCE, "action", "code", "layer", "reason", "because", "evidence", "attempt"),
    "heal-failed": (*_OF_AN_INSTANCE, "action", "code", "error_code", "error", "hint", "seconds"),
    "healed": (*_OF_AN_INSTANCE, "action", "code", "heals", "seconds", "fault_seconds"),
    "held-off": (*_OF_AN_INSTANCE, "action", "code", "because"),
    "gave-up": (*_OF_AN_INSTANCE, "code", "reason", "because", "heals", "retry_at"),
    "gpu-fenced": ("gpu", "pci", "index", "because", "action"),
    "instance-fenced": (*_OF_AN_INSTANCE, "gpu", "because", "result"),
    "fence-lifted": ("gpu", "pci", "because"),
    "engine-unreachable": ("runtime", "error_code", "error", "hint"),
    "engine-reachable": ("runtime", "seconds"),
    "warning": ("text",),
}
"""Kinds of events and the fields that each has besides `COMMON`."""
LOUD = frozenset({"gave-up", "gpu-fenced", "heal-failed", "engine-unreachable", "instance-fenced", "warning"})
"""Kinds that a person should look at."""
# Log lines of an instance may hold prompts, and tell a receiver nothing that the reason does not.
_PRIVATE = frozenset({"log"})


@dataclass(frozen=True, slots=True)
class Occurrence:
    """Something that happened. `at` is in seconds since the epoch."""

    kind: str
    at: float
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Hold every event to its documented fields."""
        assert set(self.facts) == set(KINDS[self.kind]), f"{self.kind} has other fields: {sorted(self.facts)}"

    def as_json(self) -> dict[str, Any]:
        """Return it as documented in docs/reference/json.md."""
        moment = datetime.fromtimestamp(self.at, UTC).isoformat(timespec="milliseconds")
        return {"event": self.kind, "at": moment, "host": socket.gethostname()} | {
            name: _clean(self.facts[name]) for name in KINDS[self.kind]
        }

    def as_line(self) -> str:
        """Return it as one line of JSON."""
        return json.dumps(self.as_json(), default=str, ensure_ascii=False)

    def as_text(self) -> str:
        """Return it as one line for people."""
        facts = {name: value for name, value in self.as_json().items() if name not in {*COMMON, "evidence", "id"}}
        who = f" {facts.pop('instance')} ({facts.pop('runtime')})" if "instance" in facts else ""
        rest = ", ".join(f"{name} {_told(value)}" for name, value in facts.items() if value not in ("", None, []))
        return f"{self.as_json()['at']} {self.kind}{who}{': ' if rest else ''}{rest}"


Tell = Callable[[Occurrence], None]


class Mailbox:
    """A bounded queue before a sink, and a thread that empties it: a sink that is slow holds nobody up.

    Where the queue is full the newest event is dropped; where the sink fails, that event is. Both are counted.

    Args:
        sink: where events go.
        name: of the thread.
        size: how many events may wait.
    """

    def __init__(self, sink: Tell, name: str, *, size: int = 1000) -> None:
        self._sink = sink
        self._queue: queue.Queue[Occurrence] = queue.Queue(size)
        self.counts = dict.fromkeys(("sent", "failed", "dropped"), 0)
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def __call__(self, occurrence: Occurrence) -> None:
        """Leave an event to be sent; never waits."""
        try:
            self._queue.put_nowait(occurrence)
        except queue.Full:
            self.counts["dropped"] += 1

    def drain(self, timeout_s: float) -> bool:
        """Wait until everything was sent, but no longer than that; return whether it was."""
        deadline = time.monotonic() + timeout_s
        with self._queue.all_tasks_done:
            while self._queue.unfinished_tasks and (left_s := deadline - time.monotonic()) > 0:
                self._queue.all_tasks_done.wait(left_s)
            return not self._queue.unfinished_tasks

    def _run(self) -> None:
        while True:
            occurrence = self._queue.get()
            try:
                self._sink(occurrence)
                self.counts["sent"] += 1
            except Exception:  # noqa: BLE001 - a sink of any kind must not end the thread that serves it
                self.counts["failed"] += 1
            finally:
                self._queue.task_done()


class EventFile:
    """Appends each event as a line of JSON; opened anew each time, so that logrotate may move it away."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __call__(self, occurrence: Occurrence) -> None:
        """Append one event.

        Raises:
            OSError: when it cannot be written.
        """
        with self._path.open("ab", buffering=0) as stream:
            stream.write(f"{occurrence.as_line()}\n".encode())


def _clean(value: Any) -> Any:
    """Return a value without secrets and without what is the instance's own business."""
    if isinstance(value, Mapping):
        return {str(name): _clean(one) for name, one in value.items() if name not in _PRIVATE}
    if isinstance(value, list | tuple):
        return [_clean(one) for one in value]
    return redacted(value) if isinstance(value, str) else value


def _told(value: Any) -> str:
    return f"{value:.1f}" if isinstance(value, float) else str(value)
