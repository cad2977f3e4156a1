"""`zops watch` as a process, with what it said."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from tests.support.host import ROOT
from tests.support.waiting import eventually

EAGER = {
    "interval_s": 2,
    "first_pause_s": 0.5,
    "longest_pause_s": 2,
    "quiet_s": 0.1,
    "budget": 1000,
    "canary_every_s": 0,
    "listen": "",
}
"""Settings with which one instance may be broken and healed again and again, with the shipped latch."""


class Watching:
    """A running watch and its events; a moment is `time.time()`, as in the events."""

    def __init__(self, directory: Path, *argv: str, state: Path | None = None, **spec: Any) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        environ = {"PYTHONPATH": str(ROOT), "ZOPS_STATE_DIR": str(state or directory / "state")}
        environ["ZOPS_LOCK_DIR"] = str(directory / "locks")
        (directory / "zops.yaml").write_text(json.dumps(spec))
        self._out, self._err = directory / "events.jsonl", directory / "stderr"
        with self._out.open("w") as out, self._err.open("w") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "zops", "watch", "--output", "json", *argv],
                cwd=directory,
                env=os.environ | environ,
                stdout=out,
                stderr=err,
            )

    @property
    def errors(self) -> str:
        """What it wrote besides events."""
        return self._err.read_text()

    @property
    def events(self) -> list[dict[str, Any]]:
        """All events, oldest first, each with its moment as `seconds_at`."""
        lines = self._out.read_text().split("\n")[:-1]
        return [event | {"seconds_at": _seconds(event["at"])} for event in map(json.loads, lines)]

    def since(self, moment: float, kind: str, **fields: Any) -> list[dict[str, Any]]:
        """Return the events of a kind since a moment whose fields have these values."""
        return [
            event
            for event in self.events
            if event["event"] == kind
            and event["seconds_at"] >= moment
            and all(event[name] == value for name, value in fields.items())
        ]

    def expect(self, since: float, kind: str, *, timeout_s: float = 60.0, **fields: Any) -> dict[str, Any]:
        """Wait for an event and return it."""

        def look() -> dict[str, Any] | None:
            assert self.process.poll() is None, self.errors
            return next(iter(self.since(since, kind, **fields)), None)

        deadline = time.monotonic() + timeout_s
        while not (found := look()):
            if time.monotonic() > deadline:
                told = "\n".join(json.dumps(event)[:600] for event in self.events if event["seconds_at"] >= since)
                raise AssertionError(f"no {kind} {fields} within {timeout_s} s, but:\n{told}\n{self.errors}")
            time.sleep(0.02)
        return found

    def stop(self) -> None:
        """End it as a service manager does."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(10)
        finally:
            self.process.kill()
            self.process.wait()


def _seconds(moment: str) -> float:
    return datetime.fromisoformat(moment).timestamp()


@contextmanager
def watching(directory: Path, *argv: str, state: Path | None = None, **spec: Any) -> Iterator[Watching]:
    """Run a watch in a directory while the block lasts; its state is there too, or in `state`; `spec` is zops.yaml."""
    watch = Watching(directory, *argv, state=state, **spec)
    try:
        eventually(lambda: watch.events or watch.process.poll() is not None, "the first event of the watch")
        assert watch.process.poll() is None, watch.errors
        yield watch
    finally:
        watch.stop()
