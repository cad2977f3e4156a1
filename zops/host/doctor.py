"""The doctor: runs checks over the facts of this host and says what to do about what is wrong.

A check is a small object that reads one thing from a `Context` (host/context.py) and judges it. It never changes
anything, it never needs a GPU, an engine or root to run, and where it cannot see it says so instead of guessing.
"""

import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from zops.errors import HostShort, UsageError, ZopsError
from zops.events import Report, silent, task
from zops.host.context import Context

Verdict = Literal["ok", "warn", "fail", "skipped"]
ELSEWHERE = "instances run on another machine, which cannot be seen from here"
PAGE = "docs/reference/doctor.md"


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check concludes.

    Attributes:
        verdict: ok, warn, fail or skipped.
        reason: why, in one sentence.
        remedy: what to do, a command wherever there is one.
        evidence: what was seen.
        fix: the command that `zops doctor --fix` may run; empty where mending is not safe to do for somebody.
        unseen: whether it was skipped because the answer cannot be seen from here, and not because nobody needs it.
    """

    verdict: Verdict
    reason: str
    remedy: str = ""
    evidence: Mapping[str, Any] = field(default_factory=dict)
    fix: tuple[str, ...] = ()
    unseen: bool = False

    def fixed_by(self, *argv: str) -> "Finding":
        """Return the finding with the command that mends it: one that loses nothing and stops nobody."""
        return replace(self, fix=argv)


def ok(reason: str, **evidence: Any) -> Finding:
    """Conclude that all is well."""
    return Finding("ok", reason, evidence=evidence)


def warn(reason: str, remedy: str, **evidence: Any) -> Finding:
    """Conclude that it works, and that the operator should know something."""
    return Finding("warn", reason, remedy, evidence)


def fail(reason: str, remedy: str, **evidence: Any) -> Finding:
    """Conclude that the deployment will not work like this."""
    return Finding("fail", reason, remedy, evidence)


def skipped(reason: str) -> Finding:
    """Conclude nothing, because the question does not arise."""
    return Finding("skipped", reason)


def unseen(reason: str) -> Finding:
    """Conclude nothing, because the answer cannot be seen from here."""
    return Finding("skipped", reason, unseen=True)


@dataclass(frozen=True, slots=True)
class Check:
    """One question to a host. `id` is stable: it is the name in `--only`, in JSON and the anchor in the docs.

    A check that is `here` judges this very machine, and is skipped when instances run on another one. `error` is what
    a command raises that needs the check to pass.
    """

    id: str
    title: str
    judge: Callable[[Context], Finding]
    here: bool = False
    error: type[ZopsError] = HostShort
    code: str = ""
    """Code of the error with which a command stops because of it, where that is not the common one."""

    @property
    def looks_at(self) -> str:
        """What the check reads, in one sentence."""
        return (self.judge.__doc__ or "").strip().splitlines()[0]

    def run(self, context: Context) -> "CheckResult":
        """Judge; what the operating system refuses to show is skipped with its reason, not an error."""
        if self.here and not context.on_this_host:
            return CheckResult(self, unseen(ELSEWHERE))
        try:
            finding = self.judge(context)
        except OSError as error:
            finding = unseen(f"cannot be seen from here: {error}")
        return CheckResult(self, finding)


@dataclass(frozen=True, slots=True)
class CheckResult:
    """A judged check. `fixed` tells whether its fix was run just before."""

    check: Check
    finding: Finding
    fixed: bool = False

    @property
    def id(self) -> str:
        """The name of the check."""
        return self.check.id

    @property
    def verdict(self) -> Verdict:
        """What the check concluded."""
        return self.finding.verdict

    @property
    def anchor(self) -> str:
        """Where the documentation explains the check."""
        return f"{PAGE}#{self.id}"

    def after_fix(self) -> "CheckResult":
        """Return the result with the note that its fix was run before."""
        return replace(self, fixed=True)

    def as_json(self) -> dict[str, Any]:
        """Return the result as documented in docs/reference/json.md."""
        return {
            "id": self.id,
            "title": self.check.title,
            "verdict": self.finding.verdict,
            "reason": self.finding.reason,
            "remedy": self.finding.remedy,
            "fix": shlex.join(self.finding.fix),
            "fixed": self.fixed,
            "unseen": self.finding.unseen,
            "evidence": dict(self.finding.evidence),
            "documentation": self.anchor,
        }


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Every check that was made, in its order, and how long it took."""

    results: tuple[CheckResult, ...]
    seconds: float = 0.0

    def having(self, verdict: Verdict) -> tuple[CheckResult, ...]:
        """Return the results with one verdict."""
        return tuple(result for result in self.results if result.verdict == verdict)

    @property
    def sound(self) -> bool:
        """Whether nothing failed; warnings are allowed."""
        return not self.having("fail")

    @property
    def fixable(self) -> tuple[CheckResult, ...]:
        """The results that `zops doctor --fix` can mend."""
        return tuple(result for result in self.results if result.finding.fix)

    @property
    def summary(self) -> str:
        """The counts, in one line."""
        failed, warned, fine, unseen = (len(self.having(v)) for v in ("fail", "warn", "ok", "skipped"))
        return f"{failed} failed, {warned} to look at, {fine} ok, {unseen} skipped"

    def with_results(self, results: Sequence[CheckResult]) -> "Diagnosis":
        """Return the diagnosis with some results in place of the older ones of the same checks."""
        newer = {result.id: result for result in results}
        return replace(self, results=tuple(newer.get(result.id, result) for result in self.results))

    def as_json(self) -> dict[str, Any]:
        """Return the diagnosis as documented in docs/reference/json.md."""
        counts = {verdict: len(self.having(verdict)) for verdict in ("ok", "warn", "fail", "skipped")}
        return {
            "sound": self.sound,
            "counts": counts,
            "seconds": round(self.seconds, 3),
            "checks": [result.as_json() for result in self.results],
        }


def diagnose(
    context: Context, checks: Sequence[Check], *, only: Sequence[str] = (), report: Report = silent
) -> Diagnosis:
    """Run the checks side by side, since most wait for somebody: an engine, a hub, a library, a disk.

    Args:
        context: what to judge.
        checks: the registry, usually `zops.host.checks.CHECKS`.
        only: ids of the checks to run, all when empty.
        report: where progress goes.

    Raises:
        UsageError: when `only` names a check that does not exist.
    """
    known = {check.id for check in checks}
    unknown = [name for name in only if name not in known]
    if unknown:
        raise UsageError(
            f"there is no check {unknown[0]}", code="check-unknown", hint=f"one of: {', '.join(sorted(known))}"
        )
    chosen = [check for check in checks if not only or check.id in only]
    began = time.monotonic()
    with task(report, "doctor", "examining this host", total=len(chosen), unit="checks") as counter:

        def run(check: Check) -> CheckResult:
            result = check.run(context)
            counter.advance(1)
            return result

        # A thread a check: with fewer, those that wait for one fact would keep another from being read.
        with ThreadPoolExecutor(len(chosen), "check") as pool:
            results = tuple(pool.map(run, chosen))
    return Diagnosis(results, time.monotonic() - began)


def refusal(diagnosis: Diagnosis) -> ZopsError | None:
    """Return the error with which a command stops that needs a sound host; None when the host is sound."""
    failed = diagnosis.having("fail")
    if not failed:
        return None
    first = failed[0]
    more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
    error = first.check.error(
        f"this host is not fit: {first.check.title}: {first.finding.reason}{more}",
        code="host-unfit",
        hint=f"{first.finding.remedy}; see everything with: zops doctor",
        checks=[result.as_json() for result in failed],
    )
    error.code = first.check.code or error.code
    return error


def gigabytes(count: float) -> str:
    """Return a number of bytes as findings tell it."""
    return f"{count / 1e9:.1f} GB"
