"""Which snapshots instances use, as every runtime that can be asked from here tells it."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from zops.errors import RuntimeUnreachable
from zops.runtime.base import Instance
from zops.runtime.select import open_local_runtimes
from zops.spec import Spec


def used_snapshots(spec: Spec) -> dict[Path, tuple[str, ...]]:
    """Return the snapshots that instances have mounted or serve, and who they are: "name (runtime)".

    Stopped instances count too, since a restart brings them back. A docker engine is asked even when the specification
    names another runtime, as far as there is one.

    Raises:
        RuntimeUnreachable: when the specification's own runtime cannot be asked.
    """
    found = [instance for runtime in open_local_runtimes(spec) for instance in runtime.instances()]
    if spec.runtime != "docker":
        found += _containers(spec)
    used: dict[Path, tuple[str, ...]] = {}
    for instance in found:
        if instance.snapshot:
            place = Path(instance.snapshot).resolve()
            used[place] = (*used.get(place, ()), f"{instance.name} ({instance.runtime})")
    return used


def used_snapshots_if_known(spec: Spec, warn: Callable[[str], None]) -> dict[Path, tuple[str, ...]] | None:
    """Return the same for those who only want to know, and None, with a warning, when it cannot be told."""
    try:
        return used_snapshots(spec)
    except RuntimeUnreachable as error:
        warn(f"who uses the snapshots cannot be told: {error.message}")
        return None


def _containers(spec: Spec) -> list[Instance]:
    from zops.runtime.docker import DockerRuntime  # noqa: PLC0415 - docker-py costs 100 ms

    with suppress(RuntimeUnreachable):
        return DockerRuntime(spec).instances()
    return []
