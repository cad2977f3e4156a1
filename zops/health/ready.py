"""Waiting for an instance to become ready: phase by phase, and no longer than there is hope."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from zops.errors import NotReady, RuntimeUnreachable
from zops.events import Finished, Report, Started
from zops.health.client import Client, Readiness

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 1.0
# One question must not eat the time of the whole wait; /readyz answers from memory.
ASK_TIMEOUT_S = 5.0
SILENT = "starting"
"""Phase of an instance that does not answer yet."""


@dataclass(frozen=True, slots=True)
class ReadyInfo:
    """An instance that became ready: how long that took, and how long it was seen in each phase."""

    url: str
    seconds: float
    phases: tuple[tuple[str, float], ...]


def wait_ready(url: str, *, timeout_s: float, alive: Callable[[], str | None], report: Report) -> ReadyInfo:
    """Poll /readyz until the instance is ready, reporting each phase as a task of its own.

    Args:
        url: address of the instance.
        timeout_s: longest wait in seconds.
        alive: returns why the instance is gone (crashed, exited), None as long as it may still become ready;
            `zops.runtime.deployment.end_of` makes one.
        report: where phases go.

    Raises:
        NotReady: when it is gone, gave up, or the time is over; names the phase in which it stopped.
    """
    began = time.monotonic()
    client = Client(url, timeout_s=min(ASK_TIMEOUT_S, timeout_s))
    phases = Phases(report)
    pause = FIRST_PAUSE_S
    while True:
        seen = _ask(client)
        if seen.ready:
            return ReadyInfo(url, time.monotonic() - began, phases.close())
        phases.enter(seen.phase)
        waited = time.monotonic() - began
        gone = alive()
        if gone is not None:
            raise _not_ready(url, f"{gone} after {waited:.1f} s", phases.current, seen)
        if waited >= timeout_s:
            raise _not_ready(url, f"not ready after {waited:.0f} s", phases.current, seen)
        time.sleep(min(pause, max(timeout_s - waited, 0.01)))
        pause = min(pause * 1.5, LONGEST_PAUSE_S)


def _ask(client: Client) -> Readiness:
    try:
        return client.ready()
    except RuntimeUnreachable as error:
        return Readiness(ready=False, phase=SILENT, reason=error.message)


def _not_ready(url: str, why: str, phase: str, seen: Readiness) -> NotReady:
    detail = f" ({seen.reason})" if seen.reason and seen.reason not in why else ""
    return NotReady(
        f"the instance at {url} is not ready: {why}, in phase {phase}{detail}",
        hint="see why with: zops logs; give it longer with: --set serve.startup_timeout_s=SECONDS",
        phase=phase,
        url=url,
    )


class Phases:
    """Turns the phase that each poll sees into one started and one finished event a phase."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._since = time.monotonic()
        self._done: list[tuple[str, float]] = []
        self.current = ""

    def enter(self, phase: str) -> None:
        """Begin a phase; the one before ends, and nothing happens while it is the same."""
        if phase == self.current:
            return
        self.close()
        self.current, self._since = phase, time.monotonic()
        self._report(Started(f"ready:{phase}", f"instance: {phase}", unit=""))

    def close(self) -> tuple[tuple[str, float], ...]:
        """End the present phase and return all of them with their seconds."""
        if self.current:
            seconds = time.monotonic() - self._since
            self._done.append((self.current, seconds))
            self._report(Finished(f"ready:{self.current}", f"instance: {self.current}", seconds))
            self.current = ""
        return tuple(self._done)
