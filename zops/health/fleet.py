"""The instances of several hosts judged at once: what `zops health --all` does.

Each host has a thread of its own that nobody waits for longer than its time: a host that is dead, or that takes the
connection and says nothing, is a verdict like any other and hides no other host. Past a few hosts, Kubernetes.
"""

from functools import partial

from zops.errors import UsageError, ZopsError
from zops.events import Report, silent, task
from zops.health.apart import ask_apart
from zops.health.survey import SHALLOW, Manner, Survey, judge_all, new_survey
from zops.health.verdict import Health, failed
from zops.runtime.select import is_remote, open_local_runtimes, open_runtime
from zops.spec import Host, Spec

HOST_TIMEOUT_S = 15.0
"""What a host gets by default: logging in over ssh takes a second, a probe that hangs five."""


def survey_fleet(
    spec: Spec,
    *,
    name: str | None = None,
    manner: Manner = SHALLOW,
    host_timeout_s: float | None = None,
    report: Report = silent,
) -> Survey:
    """Judge the instances of every host in `hosts:`, all hosts at the same time.

    Args:
        spec: names the hosts, and the limits of time.
        name: the deployment to judge on each, all when empty.
        manner: how.
        host_timeout_s: longest time for one host; `HOST_TIMEOUT_S` when empty, and the time for an image on top where
            one is made.
        report: where progress goes.

    Raises:
        UsageError: `hosts-missing` when the specification lists none.
    """
    if not spec.hosts:
        raise UsageError(
            "zops.yaml lists no hosts",
            code="hosts-missing",
            hint="list them: hosts: [{name: gpu-1, engine: ssh://ops@gpu-1}, {name: here}]",
        )
    if host_timeout_s is None:
        host_timeout_s = HOST_TIMEOUT_S + (spec.serve.request_timeout_s if manner.deep else 0.0)
    judge = partial(judge_host, spec=spec, name=name, manner=manner)
    came: dict[int, list[Health]] = {}
    with task(report, "hosts", "judging hosts", total=len(spec.hosts), unit="hosts") as counter:
        for number, healths in ask_apart([partial(judge, host) for host in spec.hosts], timeout_s=host_timeout_s):
            came[number] = healths
            counter.advance(1)
    late = f"no answer within {host_timeout_s:g} s"
    return new_survey(
        [health for number, host in enumerate(spec.hosts) for health in came.get(number) or [unreachable(host, late)]]
    )


def judge_host(host: Host, *, spec: Spec, name: str | None = None, manner: Manner = SHALLOW) -> list[Health]:
    """Judge the instances of one host; one verdict tells where there are none, or where nobody can be asked."""
    there = spec.model_copy(update={"engine": host.engine, "runtime": _runtime_kind(host, spec)})
    healths: list[Health] = []
    try:
        remote = is_remote(there)
        for runtime in [open_runtime(there)] if remote else open_local_runtimes(there):
            instances = [one for one in runtime.instances() if name in {None, one.name}]
            healths += judge_all(
                instances,
                runtime=runtime,
                spec=there,
                manner=manner,
                is_remote=remote,
                host=host.name,
                url=host.url,
            )
    except ZopsError as error:
        healths.append(unreachable(host, error.message))
    if not healths:
        text = f"there is no instance{f' {name}' if name else ''} on it"
        start = f"zops up --engine {host.engine}{f' --name {name}' if name else ''}"
        probe = failed("running", "instance-missing", text, start)
        healths.append(Health(name or "", there.runtime, (probe,), host.name))
    return healths


def unreachable(host: Host, reason: str) -> Health:
    """Return the verdict on a host that cannot be asked."""
    remedy = f"see what it says: zops ps --engine {host.engine}; give it longer with: --host-timeout S"
    probe = failed("engine", "engine-unreachable", reason, remedy, engine=host.engine)
    return Health("", "docker", (probe,), host.name)


def _runtime_kind(host: Host, spec: Spec) -> str:
    return spec.runtime if host.engine == "local" and spec.runtime == "process" else "docker"
