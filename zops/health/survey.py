"""Every instance of a runtime judged at once: what `zops health` does."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from zops.cache.manifest import write_json
from zops.errors import NotReady, ZopsError
from zops.events import Report, task
from zops.health.probes import check_instance
from zops.health.ready import wait_ready
from zops.health.verdict import Health, Verdict, worst
from zops.runtime.base import Instance, Runtime, address
from zops.runtime.deployment import end_of
from zops.spec import Spec


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


def survey(
    runtime: Runtime,
    spec: Spec,
    *,
    name: str | None = None,
    deep: bool = False,
    wait_s: float | None = None,
    report: Report,
) -> Survey:
    """Judge the instances of a runtime.

    Args:
        runtime: where they run.
        spec: whose limits of time apply.
        name: the deployment to judge, all when empty.
        deep: make a real image with each.
        wait_s: first wait so many seconds for the deployment to be ready; do not wait when empty.
        report: where progress goes.

    Raises:
        RuntimeUnreachable: when the runtime cannot be talked to.
    """
    if wait_s is not None:
        _wait(runtime, spec, wait_s, report)
    instances = [instance for instance in runtime.instances() if name is None or instance.name == name]
    healths = []
    with task(report, "health", "judging instances", total=len(instances), unit="instances") as counter:
        for instance in instances:
            healths.append(_judge(instance, runtime, spec, deep=deep))
            counter.advance(1)
    return Survey(datetime.now(UTC).isoformat(timespec="seconds"), tuple(healths))


def _judge(instance: Instance, runtime: Runtime, spec: Spec, *, deep: bool) -> Health:
    serve = instance.traits.get("serve")
    limit = serve.get("request_timeout_s") if isinstance(serve, Mapping) else None
    return check_instance(
        instance, runtime=runtime, deep=deep, canary_timeout_s=float(limit or spec.serve.request_timeout_s)
    )


def _wait(runtime: Runtime, spec: Spec, timeout_s: float, report: Report) -> None:
    instance = runtime.find(spec.name)
    if instance is None:
        return
    try:
        wait_ready(instance.url or address(spec), timeout_s=timeout_s, alive=end_of(runtime, spec.name), report=report)
    except NotReady:
        # The probes that follow name the layer; one error about the same thing is enough.
        return
