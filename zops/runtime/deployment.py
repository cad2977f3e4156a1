"""From a specification to the deployment that it means now, with the very snapshot that will be served."""

from collections.abc import Callable

from zops.cache.layout import meant
from zops.cache.manifest import require_verified
from zops.errors import SnapshotDamaged, SnapshotMissing
from zops.events import Report, Warned
from zops.runtime.base import Deployment, Instance, Runtime, drift
from zops.spec import Spec
from zops.spec.keys import is_loopback

# An instance that ended so often since somebody waits for it will not become ready by itself.
CRASH_LOOP = 3


def deploy(spec: Spec) -> Deployment:
    """Resolve a specification to a verified snapshot in its cache.

    Raises:
        SnapshotMissing: when the cache has none, or none that was verified.
        SnapshotDamaged: when files changed since they were verified.
    """
    snapshot = meant(spec)
    manifest = require_verified(snapshot.path)
    return Deployment(spec, snapshot.path, snapshot.revision or manifest.revision, manifest.digest)


def bring_up(runtime: Runtime, deployment: Deployment, report: Report) -> Instance:
    """Make the deployment run, obtaining its image first where it is missing. Does not wait until it is ready.

    Raises:
        HostShort: when the host lacks what the deployment needs; nothing half-made is left.
    """
    serve = deployment.spec.serve
    if serve.api_keys is None and not is_loopback(serve.host):
        text = f"no serve.api_keys: whoever reaches port {serve.port} on {serve.host} can make images"
        report(Warned(f"{text}; make a key with: zops key new NAME --file FILE"))
    if not runtime.has_image(deployment.spec):
        runtime.obtain_image(deployment.spec, report)
    return runtime.up(deployment, report)


def drift_of(spec: Spec, instance: Instance) -> list[str] | None:
    """Return what of an instance differs from what the specification asks for now.

    Returns:
        None when the instance is another deployment's or another runtime's, or when the cache has no verified snapshot
        to compare with.
    """
    if (instance.name, instance.runtime) != (spec.name, spec.runtime):
        return None
    try:
        return drift(deploy(spec), instance)
    except (SnapshotMissing, SnapshotDamaged):
        return None


def end_of(runtime: Runtime, name: str) -> Callable[[], str | None]:
    """Return what tells whether there is no hope left for an instance that somebody waits for, and why.

    The function that is returned gives None as long as the instance may still become ready.
    """
    first_seen: list[int] = []

    def look() -> str | None:
        instance = runtime.find(name)
        if instance is None:
            return "the instance disappeared"
        if instance.state in {"exited", "dead"}:
            memory = " for want of memory" if instance.oom_killed else ""
            return f"the instance exited with status {instance.exit_code}{memory}"
        first_seen.append(instance.restarts)
        ended = instance.restarts - first_seen[0]
        if ended >= CRASH_LOOP:
            return f"the instance ended {ended} times, the last time with status {instance.exit_code}"
        return None

    return look
