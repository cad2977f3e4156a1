"""What the soak sees from outside: readiness every 0.2 s, the processes, memory and descriptors; and the strikes."""

import contextlib
import http.client
import json
import os
import random
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.serving.clients import Ending

LOOK_EVERY_S = 0.2
SEEN_WITHIN_S = {signal.SIGKILL: 1.0, signal.SIGSTOP: 7.0}
"""How long /readyz may still count on a worker that was struck: a death is seen at once, silence after 5 s."""
NEAR_S = 0.8
"""Looks so far from a refusal may tell its reason."""
PROBE_S = 1.0
"""What a probe of Kubernetes waits for an answer by default; all but one look in a hundred must be as quick."""


@dataclass(frozen=True)
class Look:
    """One answer of /readyz, and which of the workers it knew of really ran just after."""

    asked: float
    answered: float
    status: int
    ready: frozenset[int]
    """Processes that /readyz calls ready."""
    lively: frozenset[int]
    """Of those that it ever called ready: neither gone nor stopped."""


@dataclass(frozen=True)
class Strike:
    """A signal that a worker got."""

    at: float
    pid: int
    number: signal.Signals


@dataclass
class Watch:
    """Looks at a server from a thread of its own until `stop`."""

    port: int
    pid: int
    stop: threading.Event = field(default_factory=threading.Event)
    looks: list[Look] = field(default_factory=list)
    memory: list[tuple[float, int]] = field(default_factory=list)
    """Moments and resident bytes of the HTTP process."""
    workers: set[int] = field(default_factory=set)
    """Every worker process that there ever was."""
    restarts: int = 0
    faults: list[str] = field(default_factory=list)
    _known_ready: set[int] = field(default_factory=set)

    def run(self) -> None:
        """Look again and again."""
        while not self.stop.is_set():
            began = time.monotonic()
            try:
                self.look()
            except (OSError, http.client.HTTPException, ValueError) as error:
                self.faults.append(f"/readyz was not answered: {error!r}")
            self.memory.append((time.monotonic(), resident_bytes(self.pid)))
            self.stop.wait(max(0.0, LOOK_EVERY_S - (time.monotonic() - began)))

    def look(self) -> Look:
        """Ask /readyz once."""
        asked = time.monotonic()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        with contextlib.closing(connection):
            connection.request("GET", "/readyz")
            answer = connection.getresponse()
            state = json.loads(answer.read())
        answered = time.monotonic()
        ready = frozenset(worker["pid"] for worker in state["workers"] if worker["phase"] == "ready")
        self.workers |= {worker["pid"] for worker in state["workers"] if worker["pid"]}
        self.restarts = sum(worker["restarts"] for worker in state["workers"])
        self._known_ready |= ready
        lively = frozenset(pid for pid in self._known_ready if is_lively(pid))
        look = Look(asked, answered, answer.status, ready, lively)
        self.looks.append(look)
        return look

    # --- judging

    def judge(self, strikes: Sequence[Strike], endings: Sequence[Ending]) -> list[str]:
        """Return every promise about readiness that was broken."""
        return [*self.faults, *self._judge_looks(), *self._judge_strikes(strikes), *self._judge_endings(endings)]

    def _judge_looks(self) -> list[str]:
        faults = [
            f"/readyz answered {look.status} while it called {len(look.ready)} workers ready"
            for look in self.looks
            if (look.status == 200) != bool(look.ready)
        ]
        for before, look in zip(self.looks, self.looks[1:], strict=False):
            if look.status != 200 and (spared := before.ready & look.lively):
                faults.append(f"/readyz answered {look.status} although {sorted(spared)} was ready and lives")
        return faults

    def _judge_strikes(self, strikes: Sequence[Strike]) -> list[str]:
        faults = []
        for strike in strikes:
            last = max((look.asked for look in self.looks if strike.pid in look.ready), default=strike.at)
            if last - strike.at > SEEN_WITHIN_S[strike.number]:
                faults.append(f"/readyz counted on a worker {last - strike.at:.1f} s after {strike.number.name}")
        if self.restarts != len(strikes):
            faults.append(f"{len(strikes)} workers were struck, {self.restarts} were replaced")
        slow = sorted(look.answered - look.asked for look in self.looks)[-max(1, len(self.looks) // 100) - 1]
        if slow > PROBE_S:
            faults.append(f"one look at /readyz in a hundred took {slow:.2f} s")
        return faults

    def _judge_endings(self, endings: Sequence[Ending]) -> list[str]:
        faults = []
        for ending in endings:
            if ending.code == "not_ready" and self._all_were(200, ending.ended - NEAR_S, ending.ended + NEAR_S):
                faults.append("a request was refused as not_ready while /readyz answered 200")
        for began, ended in self._stretches(503):
            for ending in endings:
                if ending.pictures and began < ending.began and ending.ended < ended:
                    faults.append("a picture was made while /readyz answered 503")
        return faults

    def _all_were(self, status: int, since: float, until: float) -> bool:
        near = [look.status for look in self.looks if since <= look.answered and look.asked <= until]
        return bool(near) and all(found == status for found in near)

    def _stretches(self, status: int) -> list[tuple[float, float]]:
        """Return first and last moment of each row of equal looks."""
        found: list[tuple[float, float]] = []
        previous = None
        for look in self.looks:
            if look.status == status:
                began = found.pop()[0] if previous == status else look.answered
                found.append((began, look.asked))
            previous = look.status
        return found


def strike(watch: Watch, number: signal.Signals, dice: random.Random, *, every: bool = False) -> list[Strike]:
    """Send a signal to a ready worker, or to all; only to children of the server that /readyz named just now."""
    ready = sorted(pid for pid in watch.look().ready if is_lively(pid))
    chosen = ready if every else dice.sample(ready, min(1, len(ready)))
    struck = []
    for pid in chosen:
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):
            handle = os.pidfd_open(pid)  # from here on the number cannot be another process's
            try:
                if parent_of(pid) == watch.pid:
                    signal.pidfd_send_signal(handle, number)
                    struck.append(Strike(time.monotonic(), pid, number))
            finally:
                os.close(handle)
    return struck


def is_lively(pid: int) -> bool:
    """Tell whether a process is there and neither stopped nor dead."""
    return _stat(pid)[:1] not in (["T"], ["t"], ["Z"], ["X"], [])


def parent_of(pid: int) -> int:
    """Return the number of a process's parent."""
    return int(_stat(pid)[1])


def children_of(pid: int) -> set[int]:
    """Return the processes that a process started and that are still there."""
    return {
        int(child)
        for task in Path(f"/proc/{pid}/task").iterdir()
        for child in (task / "children").read_text(encoding="ascii").split()
    }


def resident_bytes(pid: int) -> int:
    """Return the memory of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def descriptors(pid: int) -> int:
    """Return how many descriptors a process has open."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def _stat(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []
