"""The doctor: runs checks over the facts of this host and says what to do about what is wrong.

A check is a small object that reads one thing from a `Context` and judges it. It never changes anything, it never
needs a GPU, an engine or root to run, and where it cannot see it says so instead of guessing.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from zops.errors import HostShort, RuntimeUnreachable, UsageError, ZopsError
from zops.events import Report, silent, task
from zops.host.disk import Disk, disk_of
from zops.host.engine import EngineFacts, inspect, resolve
from zops.host.gpu import Gpu, GpuFacts, read_gpus
from zops.host.memory import Memory, read_memory
from zops.host.ports import Listener, find_listener, why_not_bindable
from zops.spec import Spec

Verdict = Literal["ok", "warn", "fail", "skipped"]
ELSEWHERE = "instances run on another machine, which cannot be seen from here"
PAGE = "docs/reference/doctor.md"


@dataclass(frozen=True, slots=True)
class Need:
    """What the deployment will ask of this host, as far as it is known; the model's numbers come from the catalog.

    Attributes:
        gpu_weights_bytes: GPU memory for the weights, 0 when it is not known.
        gpu_activation_bytes: GPU memory on top of that while the largest allowed image is made.
        load_bytes: host memory that loading takes at its peak, 0 when it is not known.
        disk_bytes: bytes that the cache still lacks, None when it is not known.
        files: files that it still lacks.
    """

    gpu_weights_bytes: int = 0
    gpu_activation_bytes: int = 0
    load_bytes: int = 0
    disk_bytes: int | None = None
    files: int = 0


@dataclass(frozen=True, slots=True)
class Senses:
    """How facts are read; a test puts its own in place of the ones that need hardware."""

    gpus: Callable[[], GpuFacts] = read_gpus
    memory: Callable[[], Memory] = read_memory
    disk: Callable[[Path], Disk] = disk_of
    engine: Callable[[str], EngineFacts] = inspect
    why_not_bindable: Callable[[str, int], str] = why_not_bindable
    listener: Callable[[int], Listener | None] = find_listener


@dataclass(frozen=True)
class Context:
    """What the checks judge: the specification, what it needs, and the facts, each read once and only when asked for.

    Attributes:
        spec: the deployment.
        file: where it was read from, None when everything is default.
        need: what it will ask of the host.
        own_ports: ports on which an instance of ours serves already.
        senses: how facts are read.
    """

    spec: Spec
    file: Path | None = None
    need: Need = Need()
    own_ports: frozenset[int] = frozenset()
    senses: Senses = field(default_factory=Senses)

    @cached_property
    def gpus(self) -> GpuFacts:
        """GPUs of this host."""
        return self.senses.gpus()

    @cached_property
    def memory(self) -> Memory:
        """Memory of this host."""
        return self.senses.memory()

    @cached_property
    def disk(self) -> Disk:
        """The file system in which the cache lies."""
        return self.senses.disk(self.spec.cache.dir)

    @cached_property
    def engine(self) -> EngineFacts | RuntimeUnreachable:
        """The container engine, or why it cannot be talked to."""
        try:
            return self.senses.engine(self.spec.engine)
        except RuntimeUnreachable as error:
            return error

    @cached_property
    def on_this_host(self) -> bool:
        """Whether instances run on this machine, so that its disks, memory, ports and GPUs are the ones that matter."""
        if self.spec.runtime != "docker":
            return self.spec.runtime == "process"
        try:
            return resolve(self.spec.engine).is_local
        except RuntimeUnreachable:
            # The engine check says what is wrong with it; whose host it would be on is not known.
            return False

    @property
    def wanted_gpus(self) -> tuple[Gpu, ...]:
        """The GPUs of this host that the specification asks for."""
        if self.spec.gpus == "none":
            return ()
        if self.spec.gpus == "all":
            return self.gpus.gpus
        return tuple(gpu for gpu in self.gpus.gpus if gpu.index in self.spec.gpus or gpu.uuid in self.spec.gpus)


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check concludes. `remedy` is a command wherever there is one; `evidence` is what was seen."""

    verdict: Verdict
    reason: str
    remedy: str = ""
    evidence: Mapping[str, Any] = field(default_factory=dict)


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
    """Conclude nothing, because the question does not arise or the answer cannot be seen from here."""
    return Finding("skipped", reason)


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

    @property
    def looks_at(self) -> str:
        """What the check reads, in one sentence."""
        return (self.judge.__doc__ or "").strip().splitlines()[0]

    def run(self, context: Context) -> "CheckResult":
        """Judge; what the operating system refuses to show is skipped with its reason, not an error."""
        if self.here and not context.on_this_host:
            return CheckResult(self.id, self.title, skipped(ELSEWHERE), self.error)
        try:
            finding = self.judge(context)
        except OSError as error:
            finding = skipped(f"cannot be seen from here: {error}")
        return CheckResult(self.id, self.title, finding, self.error)


@dataclass(frozen=True, slots=True)
class CheckResult:
    """A judged check. `error` is what a command raises that needs it to pass."""

    id: str
    title: str
    finding: Finding
    error: type[ZopsError] = HostShort

    @property
    def verdict(self) -> Verdict:
        """What the check concluded."""
        return self.finding.verdict

    @property
    def anchor(self) -> str:
        """Where the documentation explains the check."""
        return f"{PAGE}#{self.id}"

    def as_json(self) -> dict[str, Any]:
        """Return the result as documented in docs/reference/json.md."""
        return {
            "id": self.id,
            "title": self.title,
            "verdict": self.finding.verdict,
            "reason": self.finding.reason,
            "remedy": self.finding.remedy,
            "evidence": dict(self.finding.evidence),
            "documentation": self.anchor,
        }


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Every check that was made, in its order."""

    results: tuple[CheckResult, ...]

    def having(self, verdict: Verdict) -> tuple[CheckResult, ...]:
        """Return the results with one verdict."""
        return tuple(result for result in self.results if result.verdict == verdict)

    @property
    def sound(self) -> bool:
        """Whether nothing failed; warnings are allowed."""
        return not self.having("fail")

    @property
    def summary(self) -> str:
        """The counts, in one line."""
        failed, warned, fine, unseen = (len(self.having(v)) for v in ("fail", "warn", "ok", "skipped"))
        return f"{failed} failed, {warned} to look at, {fine} ok, {unseen} skipped"

    def as_json(self) -> dict[str, Any]:
        """Return the diagnosis as documented in docs/reference/json.md."""
        counts = {verdict: len(self.having(verdict)) for verdict in ("ok", "warn", "fail", "skipped")}
        return {"sound": self.sound, "counts": counts, "checks": [result.as_json() for result in self.results]}


def diagnose(
    context: Context, checks: Sequence[Check], *, only: Sequence[str] = (), report: Report = silent
) -> Diagnosis:
    """Run the checks in their order.

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
    results = []
    with task(report, "doctor", "examining this host", total=len(chosen), unit="checks") as counter:
        for check in chosen:
            results.append(check.run(context))
            counter.advance(1)
    return Diagnosis(tuple(results))


def refusal(diagnosis: Diagnosis) -> ZopsError | None:
    """Return the error with which a command stops that needs a sound host; None when the host is sound."""
    failed = diagnosis.having("fail")
    if not failed:
        return None
    first = failed[0]
    more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
    return first.error(
        f"this host is not fit: {first.title}: {first.finding.reason}{more}",
        code="host-unfit",
        hint=f"{first.finding.remedy}; see everything with: zops doctor",
        checks=[result.as_json() for result in failed],
    )
