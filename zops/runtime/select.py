"""Which runtime a specification means; each is imported only when it is the one."""

from zops.runtime.base import Runtime
from zops.spec import Spec


def open_runtime(spec: Spec) -> Runtime:
    """Return the runtime of a specification; nothing is connected before it is first asked something."""
    if spec.runtime == "docker":
        from zops.runtime.docker import DockerRuntime  # noqa: PLC0415 - docker-py costs 100 ms

        return DockerRuntime(spec)
    if spec.runtime == "kubernetes":
        from zops.runtime.kubernetes import KubernetesRuntime  # noqa: PLC0415 - as the others

        return KubernetesRuntime(spec)
    from zops.runtime.process import ProcessRuntime  # noqa: PLC0415 - as the others

    return ProcessRuntime(spec)


def open_local_runtimes(spec: Spec) -> list[Runtime]:
    """Return the runtime of a specification and, beside it, processes of this host, which cost nothing to list."""
    from zops.runtime.process import ProcessRuntime  # noqa: PLC0415 - as above

    chosen = open_runtime(spec)
    return [chosen] if spec.runtime == "process" else [chosen, ProcessRuntime(spec)]


def is_remote(spec: Spec) -> bool:
    """Tell whether instances run on another host, so that loopback addresses and paths of theirs are not ours.

    Raises:
        RuntimeUnreachable: when the specification names a docker context that does not exist.
    """
    if spec.runtime != "docker":
        return False
    from zops.host.engine import resolve  # noqa: PLC0415 - as the others

    return not resolve(spec.engine).is_local
