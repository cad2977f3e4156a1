"""Every instance of a runtime judged at once: what `zops health` does."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from zops.cache.manifest import write_json
from zops.errors import ZopsError
from zops.events import Report, silent, task
from zops.health.apart import ask_apart
from zops.health.client import Ask
from zops.health.probes import check_instance
from zops.health.ready import FIRST_PAUSE_S, LONGEST_PAUSE_S, Phases
from zops.health.verdict import Health, Verdict, failed, worst
from zops.runtime.base import Instance, Runtime
from zops.spec import Spec
from zops.spec.keys import is_loopback

# What may be well by itself if one only waits; the rest needs somebody to do something.
PASSING = frozenset({
    "starting", "start-overdue", "worker-down", "unreachable", "hung", "not-live", "queue-stuck", "engine-unreachable",
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class Manner:
    """How instances are judged, the same for all of them."""

    deep: bool = False
    """Make a real image with each."""
    record: bool = False
    """Take that image as the one to compare later ones with."""


SHALLOW = Manner()


@dataclass(frozen=True, slots=True)
class Survey:
    """The health of every instance that was asked for, and when it was judged (ISO 8601 in UTC)."""

    judged_at: str
    healths: tuple[Health, ...]

    @property
    def verdict(self) -> Verdict:
        """The worst of all; failed when there is no instance, for nothing serves then."""
        return worst(one.verdict for one in self.healths) if self.healths else "failed"

    def as_json(self) -> dict[str, Any]:
        """Return the survey as documented in docs/reference/json.md."""
        return {
            "verdict": self.verdict,
            "judged_at": self.judged_at,
            "instances": [one.as_json() for one in self.healths],
        }

    def write(self, file: Path) -> None:
        """Write the survey as JSON, whole or not at all.

        Raises:
            ZopsError: when the file cannot be written.
        """
        try:
            write_json(file, self.as_json())
        except OSError as error:
            raise ZopsError(f"{file} cannot be written: {error.strerror}", code="file-not-written") from error


def new_survey(healths: Sequence[Health]) -> Survey:
    """Return a survey that was finished just now."""
    return Survey(datetime.now(UTC).isoformat(timespec="seconds"), tuple(healths))


def unasked(error: ZopsError) -> Survey:
    """Return the survey of an engine that could not be asked."""
    probe = failed("engine", "engine-unreachable", error.message, error.hint, cause=error.code)
    return new_survey([Health("", "docker", (probe,))])


def survey(
    runtime: Runtime,
    spec: Spec,
    *,
    name: str | None = None,
    manner: Manner = SHALLOW,
    is_remote: bool = False,
    report: Report = silent,
) -> Survey:
    """Judge the instances of a runtime, all at the same time.

    Args:
        runtime: where they run.
        spec: whose limits of time apply.
        name: the deployment to judge, all when empty.
        manner: how.
        is_remote: whether loopback addresses of instances are another host's, so that they are asked from inside.
        report: where progress goes.

    Raises:
        RuntimeUnreachable: when the runtime cannot be talked to.
    """
    instances = [instance for instance in runtime.instances() if name is None or instance.name == name]
    with task(report, "health", "judging instances", total=len(instances), unit="instances") as counter:
        return new_survey(
            judge_all(
                instances,
                runtime=runtime,
                spec=spec,
                manner=manner,
                is_remote=is_remote,
                judged=lambda: counter.advance(1),
            )
        )


def judge_all(
    instances: Sequence[Instance],
    *,
    runtime: Runtime,
    spec: Spec,
    manner: Manner = SHALLOW,
    is_remote: bool = False,
    host: str = "",
    url: str | None = None,
    judged: Callable[[], None] = lambda: None,
) -> list[Health]:
    """Judge instances at the same time and return their verdicts in order; `judged` is called after each.

    The other arguments are those of `judge_one`.
    """
    judge = partial(judge_one, runtime=runtime, spec=spec, manner=manner, is_remote=is_remote, host=host, url=url)
    healths: dict[int, Health] = {}
    for number, health in ask_apart([partial(judge, instance) for instance in instances]):
        healths[number] = health
        judged()
    return [healths[number] for number in sorted(healths)]


def judge_one(
    instance: Instance,
    *,
    runtime: Runtime,
    spec: Spec,
    manner: Manner = SHALLOW,
    is_remote: bool = False,
    host: str = "",
    url: str | None = None,
) -> Health:
    """Judge one instance, asking it in the way that reaches it.

    Args:
        instance: what is judged.
        runtime: where it runs.
        spec: whose limits of time apply where the instance does not have its own.
        manner: how.
        is_remote: whether its loopback address is another host's.
        host: name of its host.
        url: where its host's published ports are reached, where that is known.
    """
    reached, ask = _way(instance, runtime, url=url, is_remote=is_remote)
    serve = instance.traits.get("serve")
    limit = serve.get("request_timeout_s") if isinstance(serve, Mapping) else None
    return check_instance(
        reached,
        runtime=runtime,
        deep=manner.deep,
        record=manner.record,
        canary_timeout_s=float(limit or spec.serve.request_timeout_s),
        startup_timeout_s=spec.serve.startup_timeout_s,
        ask=ask,
        host=host,
        engine=spec.engine if host else "",
    )


def _way(instance: Instance, runtime: Runtime, *, url: str | None, is_remote: bool) -> tuple[Instance, Ask | None]:
    """Return the instance with the address that reaches it from here, or the way to ask it from inside."""
    address = urlsplit(instance.url)
    if url:
        other = urlsplit(url)
        host = f"[{other.hostname}]" if ":" in (other.hostname or "") else other.hostname
        return replace(instance, url=f"{other.scheme}://{host}:{other.port or address.port or 80}"), None
    if is_remote and is_loopback(address.hostname or ""):
        return instance, partial(runtime.ask, instance.name)
    return instance, None


def wait_healthy(look: Callable[[], Survey], *, timeout_s: float, report: Report) -> None:
    """Look again and again until all is well, the time is over, or something is wrong that no waiting mends.

    Args:
        look: judges all that is waited for.
        timeout_s: longest wait in seconds.
        report: where phases go, each as a task of its own.
    """
    deadline = time.monotonic() + timeout_s
    phases = Phases(report)
    pause = FIRST_PAUSE_S
    while True:
        found = look()
        waiting = [one for one in found.healths if _may_pass(one)]
        left = deadline - time.monotonic()
        if not waiting or left <= 0:
            break
        phases.enter(_phase(waiting[0]))
        time.sleep(min(pause, left))
        pause = min(pause * 1.5, LONGEST_PAUSE_S)
    phases.close()


def _may_pass(health: Health) -> bool:
    """Tell whether what is wrong may be well by itself."""
    bad = health.first_bad
    return bad is not None and (
        bad.code in PASSING or (bad.code == "exited" and bad.evidence.get("state") == "restarting")
    )


def _phase(health: Health) -> str:
    """Return what an instance is busy with: the phase of its start where it tells one."""
    bad = health.first_bad
    return str(bad.evidence.get("phase") or bad.code) if bad else ""
