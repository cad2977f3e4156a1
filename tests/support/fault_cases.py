"""Each fault with what must come of it, and how it is played: make it, wait for the verdict, wait for good health."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

import docker.errors

from tests.support import engine_faults as faults
from tests.support.engine_faults import Victim
from tests.support.waiting import eventually
from tests.support.watching import Watching

MARGIN_S = 5.0
"""Beyond the time of a start, the longest from a verdict to good health."""
SILENCE_S = 5.0
"""After this long without a sign of life the server itself takes a worker for hung (`Patience.silent_s`)."""
LOOP_S = 6.0
"""What the engine takes to start it three times, with its growing pauses."""
STARTING = ("live/starting", "ready/starting", "live/unreachable", "running/exited", "running/oom-killed")
# Between two looks at the clock on a machine whose two cores are busy starting things.
SLACK_S = 0.7

LOUD = frozenset({"gave-up", "heal-failed", "engine-unreachable", "warning"})

Make = Callable[[Victim], AbstractContextManager[Any] | None]


@dataclass(frozen=True)
class Case:
    """A fault of an instance in a container.

    Attributes:
        name: in words.
        make: makes it; where it returns a context, leaving that takes it back.
        codes: what the verdict may be, as layer/code: one, or two where a moment decides.
        action: what heals it; empty where it heals by itself and must be left alone.
        deep: only a picture shows it.
        restraint: kind of the event that says why nothing is done; the fault is taken back once it was said.
        outlasts_heals: it is no fault of the instance's, and is taken back once a heal has begun.
        resumes: it is healed without another start.
        notice_s: what the server itself needs to notice, before which no probe could.
        aged: it is done to one of which the engine knows that it was healthy: of one that has just been started nobody
            knows yet whether it will listen.
        in_suite: the suite plays it too; the benchmark plays all.
        fleeting: it may be over before two probes saw it.
    """

    name: str
    make: Make
    codes: tuple[str, ...]
    action: str = ""
    deep: bool = False
    restraint: str = ""
    outlasts_heals: bool = False
    resumes: bool = False
    notice_s: float = 0.0
    fleeting: bool = False
    aged: bool = False
    in_suite: bool = True


LOOK_EVERY_S = 5.0
"""So often a server looks at the snapshot on its disk and at its GPUs."""

CASES = (
    Case("HTTP process hung", lambda v: faults.halted(v.http_pid), ("live/hung",), "restart", aged=True),
    Case("paused", faults.paused, ("running/paused",), "restart", resumes=True),
    Case("worker killed", lambda v: faults.strike(v.worker_pid), ("ready/worker-down",), fleeting=True),
    Case("off its network", faults.disconnect, ("live/unreachable",), "recreate", aged=True, in_suite=False),
    Case("worker hung", lambda v: faults.halted(v.worker_pid), ("ready/worker-down",), notice_s=SILENCE_S),
    Case("port's proxy gone", faults.unpublish, ("live/unreachable",), "recreate", aged=True),
    Case("killed", faults.kill, ("running/exited",), "restart"),
    Case("out of memory", faults.starved, ("running/oom-killed",), "restart"),
    Case(
        "snapshot renamed on the host",
        lambda v: faults.moved_away(v.snapshot),
        ("cache/snapshot-gone",),
        restraint="held-off",
        in_suite=False,
        notice_s=LOOK_EVERY_S,
    ),
    Case(
        "another snapshot in its place",
        lambda v: faults.swapped(v.snapshot, seed=1),
        ("cache/manifest-differs",),
        restraint="held-off",
        notice_s=LOOK_EVERY_S,
    ),
    Case("cache unmounted inside", faults.unmount, ("cache/snapshot-gone",), "recreate", notice_s=LOOK_EVERY_S),
    Case(
        "cache lost and restored",
        faults.remake_cache,
        ("cache/snapshot-gone",),
        "recreate",
        notice_s=LOOK_EVERY_S,
        in_suite=False,
    ),
    Case("crashed, restarted by the engine", faults.crash, STARTING, fleeting=True),
    Case("out of memory, restarted by the engine", faults.exhausted, STARTING, fleeting=True, in_suite=False),
    Case("restart loop", faults.looping, ("running/restart-loop",), restraint="gave-up", notice_s=LOOP_S),
    Case("weights zeroed in memory", faults.zero_weights_in_memory, ("canary/canary-black",), "restart", deep=True),
    Case(
        "twenty times slower",
        lambda v: faults.throttled(v, 0.05),
        ("canary/canary-slow",),
        "restart",
        deep=True,
        outlasts_heals=True,
    ),
)


@dataclass(frozen=True)
class Outcome:
    """What came of a fault: what was said, what was done, and how many seconds that took."""

    case: str
    code: str
    verdict_s: float | None
    actions: tuple[str, ...]
    """What was done; of a fault that nothing helps against, until it was taken back."""
    served_s: float
    """From the verdict (or from the fault's being taken back) until it answered again that it is ready."""
    start_s: float
    """What this start took by the instance's own account, phase by phase."""
    healthy_s: float
    """The same as `served_s` until the watch said so."""
    replaced: bool
    """Whether there is another container now."""
    restarted: bool
    """Whether its first process is another one now."""
    loud: tuple[str, ...] = ()
    """Kinds of events that a person should look at."""


def play(case: Case, victim: Victim, watch: Watching, *, patience_s: float = 60.0) -> Outcome:
    """Make a fault of a healthy instance and wait until it is healthy again; the fault is taken back in any case."""
    if case.deep:
        # What is compared with must be there.
        watch.expect(0, "verdict", instance=victim.name, verdict="ok", timeout_s=patience_s)
    if case.aged:
        eventually(lambda: victim.instance.health == "healthy", "the engine's own health check")
    before, since = victim.container.attrs, time.time()
    with ExitStack() as undo:
        if context := case.make(victim):
            undo.enter_context(context)
        begins = made = time.time()
        if case.fleeting:
            eventually(lambda: not victim.is_ready(), "the fault")
            victim.wait_ready()
        verdict = _verdict(case, victim, watch, since, 0.0 if case.fleeting else patience_s)
        if verdict and not case.fleeting:
            begins = verdict["seconds_at"]
        if awaited := case.restraint or ("healing" if case.action else ""):
            watch.expect(since, awaited, instance=victim.name, timeout_s=patience_s)
        done = _actions(watch, victim, since)
        if case.restraint or case.outlasts_heals:
            undo.close()
            begins = time.time()
        if case.action and not case.resumes:
            eventually(lambda: _pid(victim) not in {0, before["State"]["Pid"]}, "another start", timeout_s=patience_s)
        victim.wait_ready()
        served = healthy = time.time()
        # One that was restarted many times is looked at askance for a while.
        if verdict and case.restraint != "gave-up":
            healthy = watch.expect(
                verdict["seconds_at"], "verdict", instance=victim.name, verdict="ok", timeout_s=patience_s
            )["seconds_at"]
    after = victim.container.attrs
    return Outcome(
        case=case.name,
        code=f"{verdict['layer']}/{verdict['code']}" if verdict else "",
        verdict_s=max(0.0, verdict["seconds_at"] - made) if verdict else None,
        actions=done if case.restraint else _actions(watch, victim, since),
        served_s=max(0.0, served - begins),
        start_s=sum(victim.client.ready().facts["phases"].values()),
        healthy_s=max(0.0, healthy - begins),
        replaced=after["Id"] != before["Id"],
        restarted=after["State"]["Pid"] != before["State"]["Pid"],
        loud=tuple(event["event"] for event in watch.events if event["event"] in LOUD and event["seconds_at"] >= since),
    )


def _actions(watch: Watching, victim: Victim, since: float) -> tuple[str, ...]:
    return tuple(event["action"] for event in watch.since(since, "healing", instance=victim.name))


def _pid(victim: Victim) -> int:
    try:
        return victim.init_pid
    except docker.errors.NotFound:
        # Between the old one and the new one.
        return 0


def _verdict(case: Case, victim: Victim, watch: Watching, since: float, patience_s: float) -> dict[str, Any] | None:
    """Return the first verdict that is one of the case's; None for a fleeting fault that was over before."""
    deadline = time.monotonic() + patience_s
    while True:
        verdicts = watch.since(since, "verdict", instance=victim.name)
        for event in verdicts:
            if f"{event['layer']}/{event['code']}" in case.codes:
                return event
        assert watch.process.poll() is None, watch.errors
        if time.monotonic() >= deadline:
            assert case.fleeting, f"no verdict of {case.codes}, but: {verdicts}"
            return None
        time.sleep(0.02)
