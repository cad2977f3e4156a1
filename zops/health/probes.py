"""Probes of one instance, layer by layer, outermost first: the first that fails is where to look.

running (the runtime's view) -> live -> gpu (NVML inside the instance, not on the host) -> cache (what lies on its disk
now) -> ready -> queue (does it move?) -> canary (only when asked deeply: a real image, looked at and compared with
earlier ones). Layers behind a failed one are not asked. What an older instance does not tell is not judged.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from zops.errors import ZopsError
from zops.health.client import KEY_CODES, Ask
from zops.health.given import judge_cache, judge_gpu
from zops.health.patient import Patient
from zops.health.running import judge_running
from zops.health.verdict import Health, Probe, degraded, failed, passed
from zops.runtime.base import Instance, Runtime
from zops.spec import Serve

# These answer from memory; an HTTP process that takes longer is stuck.
PROBE_TIMEOUT_S = 5.0
# Python and the HTTP libraries from a cold disk, before the port is bound.
BIND_S = 30.0
# The server itself gives a worker on a GPU 60 s without a forward, and kills it then.
STUCK_S = 60.0

# Errors of the client -> code of the probe.
_TROUBLE = {
    "instance-unreachable": "unreachable",
    "instance-timeout": "hung",
    "instance-stranger": "stranger",
    "runtime-unreachable": "engine-unreachable",
}
_PHASES_AFTER_A_LOSS = frozenset({"restarting", "failed"})


def check_instance(
    instance: Instance,
    *,
    runtime: Runtime | None = None,
    deep: bool = False,
    record: bool = False,
    expected_digest: str | None = None,
    probe_timeout_s: float = PROBE_TIMEOUT_S,
    canary_timeout_s: float = 120.0,
    startup_timeout_s: float | None = None,
    ask: Ask | None = None,
    host: str = "",
    engine: str = "",
) -> Health:
    """Judge one instance and return every layer that was asked.

    Args:
        instance: as its runtime knows it now.
        runtime: where to get its last log lines from when it does not run; none when nothing shall be asked.
        deep: make a real image, look at it, and compare it with the first ones.
        record: take that image as the one to compare later ones with.
        expected_digest: digest of the manifest that it must serve, its own label by default.
        probe_timeout_s: longest time for one question.
        canary_timeout_s: longest time for the image.
        startup_timeout_s: how long it may take to become ready, the specification's default when empty.
        ask: how to ask it where its address cannot be reached from here; over HTTP when empty.
        host: name of its host, where that is not this one.
        engine: what commands about it must give as --engine, where they would mean another instance without.
    """
    patient = Patient(
        instance=instance,
        runtime=runtime,
        expected_digest=instance.manifest_digest if expected_digest is None else expected_digest,
        probe_timeout_s=probe_timeout_s,
        canary_timeout_s=canary_timeout_s,
        startup_timeout_s=_default_startup_s() if startup_timeout_s is None else startup_timeout_s,
        ask=ask,
        host=host,
        engine=engine,
    )
    layers: list[Callable[[Patient], Probe]] = [judge_running, _live, judge_gpu, judge_cache, _ready, _queue]
    if deep:
        from zops.health.canary import judge_canary  # noqa: PLC0415 - decoding images is for those who make one

        layers.append(lambda one: judge_canary(one, record=record))
    return Health(instance.name, instance.runtime, tuple(_examine(patient, layers)), host)


def _examine(patient: Patient, layers: Sequence[Callable[[Patient], Probe]]) -> list[Probe]:
    probes: list[Probe] = []
    for layer in layers:
        began = time.monotonic()
        probe = layer(patient)
        probes.append(replace(probe, seconds=time.monotonic() - began))
        # Behind a key that is refused nothing can be known, though nothing need be wrong.
        if probe.verdict == "failed" or probe.code == "key-refused":
            break
    return probes


def _default_startup_s() -> float:
    return float(Serve.model_fields["startup_timeout_s"].default)


def _live(patient: Patient) -> Probe:
    """Ask whether the HTTP process lives and is zops at all; all later layers judge what it says here."""
    try:
        if patient.client.live():
            _ = patient.readiness
            return passed("live", f"answers at {patient.instance.url}")
        _ = patient.readiness
    except ZopsError as error:
        return _unanswered(patient, error)
    reason = "the HTTP process says that it does not live"
    return failed("live", "not-live", reason, patient.anew)


def _unanswered(patient: Patient, error: ZopsError) -> Probe:
    if error.code in KEY_CODES:
        # It is our key that is wrong; an instance must not be replaced for that.
        return degraded("live", "key-refused", error.message, error.hint)
    code = _TROUBLE.get(error.code, "not-live")
    if code in {"unreachable", "hung"} and _may_still_bind(patient, code):
        reason = f"started {patient.age_s:.0f} s ago and does not {'answer' if code == 'hung' else 'listen'} yet"
        return failed("live", "starting", reason, patient.wait)
    return failed("live", code, error.message, error.hint, cause=error.code)


def _may_still_bind(patient: Patient, code: str) -> bool:
    """Tell whether an instance that nobody can reach, or that takes connections and is silent, may be too young."""
    match patient.instance.health:
        case "healthy":
            # Reached from inside: it is the way to it that is gone.
            return False
        case "starting" if code == "unreachable":
            return patient.age_s < patient.startup_timeout_s
    return patient.age_s < min(BIND_S, patient.startup_timeout_s)


def _ready(patient: Patient) -> Probe:
    seen = patient.readiness
    evidence = dict(seen.facts)
    workers = [one for one in seen.facts.get("workers") or [] if isinstance(one, dict)]
    down = [one for one in workers if one.get("phase") != "ready"]
    if seen.ready:
        lost = [one for one in down if one.get("restarts")]
        if lost:
            reason = f"{len(lost)} of {len(workers)} workers down: {_why(lost[0].get('phase'), lost[0].get('reason'))}"
            remedy = f"see why with: {patient.logs}"
            return degraded("ready", "worker-down", reason, remedy, **evidence)
        return passed("ready", "ready", **evidence)
    reason = f"live but not ready: {_why(seen.phase, seen.reason)}"
    code = _unready_code(patient, any(one.get("restarts") for one in workers))
    if code == "start-overdue":
        reason += f", {patient.age_s:.0f} s after its start ({patient.startup_timeout_s:g} s are allowed)"
    return failed("ready", code, reason, patient.wait, **evidence)


def _unready_code(patient: Patient, lost: bool) -> str:  # noqa: FBT001 - a fact of the same body, not an option
    phase = patient.readiness.phase
    if phase == "draining":
        return "draining"
    if lost or phase in _PHASES_AFTER_A_LOSS:
        return "worker-down"
    return "starting" if patient.age_s < patient.startup_timeout_s else "start-overdue"


def _why(phase: object, reason: object) -> str:
    return ": ".join(str(part) for part in (phase, reason) if part)


def _queue(patient: Patient) -> Probe:
    queue = patient.queue
    if not queue:
        return passed("queue", "it does not tell of its queue")
    waiting, running, idle_s = (_number(queue.get(name)) for name in ("waiting", "running", "idle_s"))
    limit_s = _patience_s(patient)
    seen = dict(queue) | {"stuck_after_s": limit_s}
    text = f"{waiting or 0:.0f} waiting, {running or 0:.0f} running"
    if (waiting or running) and idle_s is not None and idle_s > limit_s:
        reason = f"{text}, and nothing moved for {idle_s:.0f} s"
        return failed("queue", "queue-stuck", reason, patient.anew, **seen)
    return passed("queue", text, **seen)


def _patience_s(patient: Patient) -> float:
    """Return how long nothing may move while requests run; each forward moves."""
    serve = patient.asked.get("serve")
    on_cpu = str(patient.facts.get("device") or "") == "cpu"
    # On a CPU one forward of a large image can take minutes; the server itself ends it after the request's time.
    allowed_s = _number(serve.get("request_timeout_s")) if on_cpu and isinstance(serve, dict) else None
    return max(STUCK_S, allowed_s or 0.0)


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) else None
