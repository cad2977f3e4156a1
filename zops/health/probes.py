"""Probes of one instance, layer by layer, outermost first: the first that fails is where to look.

running (the runtime's view) -> live -> ready -> gpu (inside the instance, not on the host) -> cache -> canary (only
when asked deeply: a real image, decoded and looked at). Layers behind a failed one are not asked.
"""

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from itertools import islice
from typing import Any

from zops.errors import ZopsError
from zops.health.canary import SEED, paint
from zops.health.client import KEY_CODES, Client
from zops.health.verdict import Health, Probe
from zops.runtime.base import Instance, Runtime

# These answer from memory; an HTTP process that takes longer is stuck.
PROBE_TIMEOUT_S = 5.0
# Three starts within two minutes: the engine restarts it as often as it dies.
LOOP_RESTARTS, LOOP_WINDOW_S = 3, 120.0
LOG_LINES = 5

CANARY_EDGE = 512


@dataclass(frozen=True)
class Patient:
    """An instance under examination, with what the probes share."""

    instance: Instance
    runtime: Runtime | None
    expected_digest: str
    probe_timeout_s: float
    canary_timeout_s: float

    @property
    def asked(self) -> Mapping[str, Any]:
        """What the deployment asked for when the instance was made."""
        return self.instance.traits

    @cached_property
    def client(self) -> Client:
        """For questions that are answered from memory."""
        return Client(self.instance.url, timeout_s=self.probe_timeout_s)

    @cached_property
    def info(self) -> Mapping[str, Any]:
        """What the instance says of itself, asked once."""
        return self.client.info()


def check_instance(
    instance: Instance,
    *,
    runtime: Runtime | None = None,
    deep: bool = False,
    expected_digest: str | None = None,
    probe_timeout_s: float = PROBE_TIMEOUT_S,
    canary_timeout_s: float = 120.0,
) -> Health:
    """Judge one instance and return every layer that was asked.

    Args:
        instance: as its runtime knows it now.
        runtime: where to get its last log lines from when it does not run; none when nothing shall be asked.
        deep: make a real image and look at it.
        expected_digest: digest of the manifest that it must serve, its own label by default.
        probe_timeout_s: longest time for one question.
        canary_timeout_s: longest time for the image.
    """
    patient = Patient(
        instance=instance,
        runtime=runtime,
        expected_digest=instance.manifest_digest if expected_digest is None else expected_digest,
        probe_timeout_s=probe_timeout_s,
        canary_timeout_s=canary_timeout_s,
    )
    layers: list[Callable[[Patient], Probe]] = [_running, _live, _ready, _gpu, _cache]
    if deep:
        layers.append(_canary)
    probes: list[Probe] = []
    for layer in layers:
        began = time.monotonic()
        try:
            probe = layer(patient)
        except ZopsError as error:
            probe = _failed(layer.__name__.strip("_"), error.message, error.hint, code=error.code)
            if error.code in KEY_CODES:
                # It is our key that is wrong; an instance must not be replaced for that.
                probe = replace(probe, verdict="degraded")
        probes.append(replace(probe, seconds=time.monotonic() - began))
        if probe.verdict == "failed":
            break
    return Health(instance.name, instance.runtime, tuple(probes))


def _running(patient: Patient) -> Probe:
    instance = patient.instance
    seen: dict[str, Any] = {
        "state": instance.state,
        "restarts": instance.restarts,
        "started_at": instance.started_at,
        "exit_code": instance.exit_code,
        "oom_killed": instance.oom_killed,
        "engine_health": instance.health,
    }
    if instance.running:
        if instance.restarts >= LOOP_RESTARTS and _age_s(instance.started_at) < LOOP_WINDOW_S:
            reason = f"restarted {instance.restarts} times, the last time just now"
            return Probe("running", "degraded", reason, "see why with: zops logs", evidence=seen)
        return Probe("running", "ok", f"running since {instance.started_at or 'unknown'}", evidence=seen)
    seen["log"] = _last_lines(patient)
    reason, remedy = _stopped(instance)
    return _failed("running", reason, remedy, **seen)


def _stopped(instance: Instance) -> tuple[str, str]:
    """Return why an instance does not run, and what to do."""
    start = f"zops up --name {instance.name}"
    if instance.oom_killed:
        remedy = f"raise resources.memory (or leave it empty), then: {start}"
        return "killed because it ran out of memory (OOM)", remedy
    if instance.state == "paused":
        return "paused", f"docker unpause {instance.id[:12]}"
    if instance.state == "restarting":
        reason = f"dies at its start and is restarted again and again ({instance.restarts} times"
        return f"{reason}, last exit status {instance.exit_code})", f"see why with: zops logs --name {instance.name}"
    if instance.state == "created":
        return "was created and never started", start
    status = "" if instance.exit_code is None else f" with status {instance.exit_code}"
    return f"{instance.state}{status}", f"see why with: zops logs --name {instance.name}; then: {start}"


def _live(patient: Patient) -> Probe:
    if patient.client.live():
        return Probe("live", "ok", f"answers at {patient.instance.url}")
    return _failed("live", "the HTTP process says that it does not live", "zops down, then zops up")


def _ready(patient: Patient) -> Probe:
    seen = patient.client.ready()
    evidence = dict(seen.facts)
    if seen.ready:
        return Probe("ready", "ok", "ready", evidence=evidence)
    why = ": ".join(part for part in (seen.phase, seen.reason) if part)
    remedy = "wait for it with: zops health --wait; see why with: zops logs"
    return Probe("ready", "failed", f"live but not ready: {why}", remedy, evidence=evidence)


def _gpu(patient: Patient) -> Probe:
    if patient.asked.get("gpus", "none") == "none":
        return Probe("gpu", "ok", "none asked for")
    device = str(patient.info.get("device") or "")
    evidence = {"device": device, "dtype": patient.info.get("dtype")}
    # A restart gives the container the same lost devices; only a new one gets them back.
    remedy = f"recreate it: zops down --name {patient.instance.name} && zops up --name {patient.instance.name}"
    if device in {"", "cpu"}:
        reason = f"a GPU is asked for, the instance computes on {device or 'nothing that it names'}"
        return _failed("gpu", reason, remedy, **evidence)
    return Probe("gpu", "ok", f"sees {device}", evidence=evidence)


def _cache(patient: Patient) -> Probe:
    served, expected = str(patient.info.get("manifest_digest") or ""), patient.expected_digest
    writable = patient.info.get("snapshot_writable")
    evidence = {"served": served, "expected": expected, "writable": writable}
    if not served:
        return _failed("cache", "the instance does not say which manifest it serves", "zops down, then zops up")
    if expected and served != expected:
        reason = f"serves manifest {served[:12]}, {expected[:12]} is expected"
        return _failed("cache", reason, "zops cache verify, then zops up", **evidence)
    if writable and patient.instance.runtime == "docker":
        reason = "the cache is mounted so that the instance can write to it"
        return Probe("cache", "degraded", reason, "zops down, then zops up", evidence=evidence)
    return Probe("cache", "ok", f"serves manifest {served[:12]}", evidence=evidence)


def _canary(patient: Patient) -> Probe:
    serve = patient.asked.get("serve")
    edge = int(serve.get("warmup_size", CANARY_EDGE)) if isinstance(serve, dict) else CANARY_EDGE
    made = paint(patient.instance.url, edge=edge, timeout_s=patient.canary_timeout_s)
    evidence = {
        "sha256": hashlib.sha256(made.image.data).hexdigest(),
        "seconds": round(made.seconds, 3),
        "width": made.look.width,
        "height": made.look.height,
        "mean": round(made.look.mean, 2),
        "deviation": round(made.look.deviation, 2),
        "seed": SEED,
    }
    if made.fault:
        remedy = "check the weights with: zops cache verify --deep; see what it did with: zops logs"
        return _failed("canary", made.fault, remedy, **evidence)
    return Probe("canary", "ok", f"an image of {edge} x {edge} in {made.seconds:.2f} s", evidence=evidence)


def _failed(layer: str, reason: str, remedy: str, **evidence: Any) -> Probe:
    return Probe(layer, "failed", reason, remedy, evidence=evidence)


def _last_lines(patient: Patient) -> list[str]:
    if patient.runtime is None:
        return []
    try:
        return list(islice(patient.runtime.logs(patient.instance.name, tail=LOG_LINES), LOG_LINES))
    except ZopsError:
        # The verdict stands without them.
        return []


def _age_s(started_at: str) -> float:
    """Return the seconds since an ISO 8601 time; infinity when it is none."""
    try:
        began = datetime.fromisoformat(started_at)
    except ValueError:
        return float("inf")
    return (datetime.now(UTC) - (began if began.tzinfo else began.replace(tzinfo=UTC))).total_seconds()
