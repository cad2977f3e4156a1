"""What is done about an unhealthy instance, and when: a pure decision over what was done before.

The first heal comes at once. If it did not help, the next is the stronger one, each after twice the pause of the one
before. An instance that was healthy for long enough is forgiven; the number of heals within an hour is limited whatever
happened between them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from zops.health.verdict import Verdict

Action = Literal["restart", "recreate"]
Remedy = Literal["restart", "recreate", "report", "give-up"]
Do = Literal["restart", "recreate", "report", "wait", "give-up"]

WINDOW_S = 3600.0
"""What the budget is counted over."""
# A server that was just started has not bound its port yet; interpreters from a cold disk take seconds.
BIND_GRACE_S = 30.0

TABLE: dict[str, Remedy] = {
    "exited": "restart",
    "dead": "restart",
    "created": "restart",
    "oom-killed": "restart",
    "paused": "restart",
    "not-live": "restart",
    "hung": "restart",
    "start-overdue": "restart",
    "worker-down": "restart",
    "queue-stuck": "restart",
    "canary-failed": "restart",
    "canary-black": "restart",
    "canary-slow": "restart",
    "unreachable": "recreate",
    "gpu-lost": "recreate",
    "gpu-missing": "recreate",
    "snapshot-gone": "recreate",
    "manifest-differs": "recreate",
    # The engine starts it again already; more of the same helps nobody, but somebody must know.
    "restart-loop": "give-up",
    "stopped": "report",
    "starting": "report",
    "draining": "report",
    "stranger": "report",
    "gpu-unused": "report",
    # Where that is grave enough, the fence stops the instance.
    "gpu-errors": "report",
    "canary-differs": "report",
    "cache-writable": "report",
    "key-refused": "report",
    "engine-unreachable": "report",
    "instance-missing": "report",
}
"""What is done first about each code of a failed layer; a code that is not here is only reported."""

OF_THE_SNAPSHOT = frozenset({"snapshot-gone", "manifest-differs"})
"""Codes that are mended only where the host has the right snapshot: a new container would mount the same wrong one."""
PATIENT = frozenset({"worker-down"})
"""Codes of what heals by itself and gets the time of a start to do so."""


@dataclass(frozen=True, slots=True)
class Policy:
    """How eagerly instances are healed: pauses and quiet time in seconds, `budget` in heals of one instance an hour."""

    first_pause_s: float = 30.0
    longest_pause_s: float = 900.0
    quiet_s: float = 600.0
    budget: int = 6


@dataclass(frozen=True, slots=True)
class Problem:
    """A latched verdict that is not ok. `since` is when it was first seen, in seconds since the epoch."""

    code: str
    verdict: Verdict
    layer: str
    reason: str
    since: float
    patience_s: float = 0.0
    """How long an instance of this deployment may take to start."""

    @property
    def remedy(self) -> Remedy:
        """What the table says first; what merely works less well is never healed."""
        remedy = TABLE.get(self.code, "report")
        return "report" if self.verdict != "failed" and remedy in {"restart", "recreate"} else remedy


@dataclass(frozen=True, slots=True)
class Heal:
    """A heal that was begun. Times are in seconds since the epoch; what has not happened yet is None."""

    at: float
    action: Action
    code: str
    problem_since: float
    done_at: float | None = None
    """When the runtime had done it, or refused."""
    recovered_at: float | None = None
    """When the verdict was ok, or merely degraded, again."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do now. `until` is when it will be decided anew, where that is known; `why` is for people."""

    do: Do
    why: str
    until: float | None = None


def decide(problem: Problem, heals: Sequence[Heal], policy: Policy, now: float) -> Decision:
    """Decide what to do about a problem.

    Args:
        problem: what is wrong.
        heals: what was done to this instance before, oldest first.
        policy: pauses and budget.
        now: seconds since the epoch.
    """
    remedy = problem.remedy
    if remedy == "give-up":
        return Decision("give-up", "the engine starts it again and again, which did not help")
    if remedy == "report":
        return Decision("report", f"nothing that the watch could do helps against {problem.code or 'this'}")
    return _wait(problem, heals, policy, now) or _next(remedy, problem, _streak(problem, heals, policy))


def _next(remedy: Action, problem: Problem, streak: Sequence[Heal]) -> Decision:
    if not streak:
        return Decision(remedy, f"{problem.code} for the first time")
    return Decision("recreate", f"{len(streak)} heals did not last")


def _wait(problem: Problem, heals: Sequence[Heal], policy: Policy, now: float) -> Decision | None:
    """Tell to wait or to give up where it is too early to heal; None where it is not."""
    if problem.code in PATIENT and now < problem.since + problem.patience_s:
        return Decision("wait", "it heals by itself within the time of a start", problem.since + problem.patience_s)
    if spent := _budget_spent(heals, policy, now):
        return spent
    streak = _streak(problem, heals, policy)
    if not streak:
        return None
    pause_s = min(policy.first_pause_s * 2.0 ** min(len(streak) - 1, 60), policy.longest_pause_s)
    again = (streak[-1].done_at or streak[-1].at) + pause_s
    if now < again:
        return Decision("wait", f"the last heal did not last; the next comes after {pause_s:g} s", again)
    return None


def _budget_spent(heals: Sequence[Heal], policy: Policy, now: float) -> Decision | None:
    """Tell to give up where the newest heal was the last that the budget had, until an hour after it."""
    if not heals:
        return None
    newest = heals[-1].at
    recent = [heal for heal in heals if newest - heal.at < WINDOW_S]
    until = newest + WINDOW_S
    if len(recent) < policy.budget or now >= until:
        return None
    return Decision("give-up", f"{len(recent)} heals within an hour did not last", until)


def _streak(problem: Problem, heals: Sequence[Heal], policy: Policy) -> list[Heal]:
    """Return the heals since the instance was last in good health for the quiet time."""
    streak: list[Heal] = []
    trouble_since = problem.since
    for heal in reversed(heals):
        if heal.recovered_at is not None and trouble_since - heal.recovered_at >= policy.quiet_s:
            break
        streak.append(heal)
        trouble_since = heal.problem_since
    return streak[::-1]
