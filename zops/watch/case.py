"""All that the watch knows of one instance: its last answers, its verdict, what was done about it, and what comes next.

No time passes in here and nothing is asked or changed: answers and moments come in, decisions go out.
"""

import math
from dataclasses import dataclass, field, replace

from zops.health.verdict import Verdict
from zops.watch.healing import TABLE, Action, Decision, Heal, Policy, Problem, decide
from zops.watch.latch import Answer, Latch

# While it recovers it is asked often; answers that are closer than this share of an interval are one bad answer.
APART = 0.45
CANARY = "canary"
# Codes of what is on its way back: the first good answer says that it has arrived.
PASSING = frozenset({"starting", "worker-down"})


@dataclass(frozen=True, slots=True)
class Rhythm:
    """How often an instance is asked, and how many bad answers make a verdict. Times in seconds."""

    interval_s: float = 10.0
    jitter: float = 0.1
    canary_every_s: float = 900.0
    failures: int = 2
    of: int = 3
    # How often an instance is asked that was just healed.
    recovery_s: float = 1.0


@dataclass(frozen=True, slots=True)
class Change:
    """A verdict that changed."""

    was: Verdict | None
    verdict: Verdict
    answer: Answer
    healed: Heal | None = None
    """The heal after which it is not failed any more."""


@dataclass(slots=True)
class Case:
    """One instance under watch.

    Attributes:
        name: of its deployment.
        runtime: where it runs.
        verdict: the one that stands, None before the first.
        code: why it is not ok.
        layer: where it is not.
        problem: what is wrong now, None where nothing is, or where it is not known whether a heal helped.
        heals: what was done, oldest first.
        gave_up: whether it was said that nothing more is done.
        canary_at: when the next canary is due.
    """

    name: str
    runtime: str
    rhythm: Rhythm
    policy: Policy
    heals: list[Heal] = field(default_factory=list)
    id: str = ""
    verdict: Verdict | None = None
    code: str = ""
    layer: str = ""
    problem: Problem | None = None
    gave_up: bool = False
    canary_at: float = 0.0
    _suspect: bool = False
    _bad_since: float | None = None
    _seen_at: float = -math.inf
    _latch: Latch = field(init=False)

    def __post_init__(self) -> None:
        """Make the latch of this rhythm."""
        self._latch = Latch(self.rhythm.failures, self.rhythm.of)

    def meet(self, instance_id: str) -> bool:
        """Take note of the very container or process; return whether somebody else replaced it.

        Whoever made a new one gave it a new chance: what was done about the old one counts no more.
        """
        replaced = bool(instance_id and self.id and instance_id != self.id)
        if replaced:
            self.heals.clear()
            self.gave_up = False
            self._forget()
        self.id = instance_id or self.id
        return replaced

    def see(self, answer: Answer, *, deep: bool = False, patience_s: float = 0.0) -> Change | None:
        """Take an answer and return the change of the verdict that it made, None when it made none.

        Args:
            answer: what the probe said.
            deep: whether a canary was asked for as well.
            patience_s: how long an instance of this deployment may take to start.
        """
        if not self._counts(answer, deep=deep):
            return None
        if answer.gravity == 0 and self.returning:
            self._latch.clear()
        self._latch.see(answer)
        self._seen_at = answer.at
        if answer.gravity == 0:
            self._bad_since = None
        elif self._bad_since is None:
            self._bad_since = answer.at
        standing = self._latch.standing
        self._plan_canary(answer, deep=deep)
        if standing is None:
            return None
        if standing.verdict != "failed" and TABLE.get(standing.code) != "give-up":
            self.gave_up = False
        if standing.gravity == 0:
            self.problem = None
        else:
            since = answer.at if self._bad_since is None else self._bad_since
            self.problem = Problem(
                standing.code, standing.verdict, standing.layer, standing.reason, since, patience_s=patience_s
            )
        return self._change(standing)

    def decide(self, now: float) -> Decision | None:
        """Return what is to be done now, None while nothing is wrong or it is not known yet."""
        return None if self.problem is None else decide(self.problem, self.heals, self.policy, now)

    def begin(self, action: Action, now: float) -> Heal:
        """Write down that a heal begins."""
        assert self.problem, "only what is unhealthy is healed"
        heal = Heal(now, action, self.problem.code, self.problem.since)
        self.heals.append(heal)
        self.gave_up = False
        return heal

    def finish(self, now: float, instance_id: str = "") -> None:
        """Write down that the runtime did it, or refused; what was seen before says nothing of the instance now."""
        self.heals[-1] = replace(self.heals[-1], done_at=now)
        was_canary = self.problem is not None and self.problem.layer == CANARY
        self.id = instance_id or self.id
        self._forget()
        self._suspect = was_canary
        if was_canary:
            self.canary_at = now

    def look_again(self) -> None:
        """Wait for new answers before anything is done: what the last ones were about has changed."""
        since = self._bad_since
        self._forget()
        self._bad_since = since

    @property
    def recovering(self) -> bool:
        """Whether a heal is done and it is not known yet whether it helped."""
        return bool(self.heals) and self.problem is None and self.verdict != "ok" and not self.interrupted

    @property
    def returning(self) -> bool:
        """Whether what is wrong is only that it is not back yet."""
        return self.problem is not None and self.problem.code in PASSING

    @property
    def interrupted(self) -> bool:
        """Whether the newest heal was begun and never done: the watch was ended in the middle of it."""
        return bool(self.heals) and self.heals[-1].done_at is None

    def wants_canary(self, now: float) -> bool:
        """Tell whether it is time for a canary."""
        return self.rhythm.canary_every_s > 0 and now >= self.canary_at

    def pause_s(self, answer: Answer | None, luck: float) -> float:
        """Return the seconds from the beginning of this probe to the next.

        Never more than the interval, and half of it after a bad answer that made no verdict yet: from a fault to the
        verdict it takes at most two.

        Args:
            answer: what this probe said, None when it said nothing.
            luck: a random number from 0 to 1.
        """
        interval_s = self.rhythm.interval_s
        if self.recovering or self.returning:
            return min(self.rhythm.recovery_s, interval_s / 2)
        if answer is not None and answer.gravity and self.problem is None:
            return interval_s / 2
        return interval_s * (1 - self.rhythm.jitter * luck)

    def _counts(self, answer: Answer, *, deep: bool) -> bool:
        if answer.gravity == 0:
            # An instance that makes black images answers every other question well.
            return deep or not self._suspect
        return deep or answer.at - self._seen_at >= APART * self.rhythm.interval_s

    def _plan_canary(self, answer: Answer, *, deep: bool) -> None:
        if not deep:
            return
        self._suspect = answer.gravity > 0 and answer.layer == CANARY
        standing = self._latch.standing
        known = not self._suspect or (standing is not None and standing.layer == CANARY)
        self.canary_at = answer.at + (self.rhythm.canary_every_s if known else 0.0)

    def _change(self, standing: Answer) -> Change | None:
        code = "" if standing.gravity == 0 else standing.code
        if (standing.verdict, code) == (self.verdict, self.code):
            return None
        was, self.verdict, self.code, self.layer = self.verdict, standing.verdict, code, standing.layer
        healed = None
        if standing.verdict != "failed" and self.heals and self.heals[-1].recovered_at is None:
            healed = self.heals[-1] = replace(
                self.heals[-1], done_at=self.heals[-1].done_at or standing.at, recovered_at=standing.at
            )
        return Change(was, standing.verdict, standing, healed)

    def _forget(self) -> None:
        self._latch.clear()
        self.problem = None
        self._suspect = False
        self._bad_since = None
        self._seen_at = -math.inf
