"""The outermost probe: what the runtime says of the container or process, before anybody asks the instance itself."""

from typing import Any

from zops.errors import ZopsError
from zops.health.patient import Patient
from zops.health.verdict import Probe, degraded, failed, passed

# Three starts within two minutes: the engine restarts it as often as it dies.
LOOP_RESTARTS, LOOP_WINDOW_S = 3, 120.0


def judge_running(patient: Patient) -> Probe:
    """Judge state, exit status, out-of-memory kills and restarts."""
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
        if instance.restarts >= LOOP_RESTARTS and patient.age_s < LOOP_WINDOW_S:
            reason = f"restarted {instance.restarts} times, the last time {patient.age_s:.0f} s ago"
            judge = degraded if _is_ready(patient) else failed
            return judge("running", "restart-loop", reason, f"see why with: {patient.logs}", **seen)
        return passed("running", f"running since {instance.started_at or 'unknown'}", **seen)
    code, reason, remedy = _explain(patient)
    return failed("running", code, reason, remedy, **seen, log=patient.last_lines())


def _is_ready(patient: Patient) -> bool:
    try:
        return patient.readiness.ready
    except ZopsError:
        return False


def _explain(patient: Patient) -> tuple[str, str, str]:
    """Return the code, why an instance does not run, and what to do."""
    instance, start = patient.instance, f"zops up {patient.named}"
    status = instance.exit_code
    told = "" if status is None else f" with status {status}"
    look = f"see why with: {patient.logs}"
    looping = instance.state == "restarting" and instance.restarts >= LOOP_RESTARTS
    if instance.oom_killed:
        remedy = f"raise resources.memory (or leave it empty); then: {start}"
        return "oom-killed", "killed because it ran out of memory (OOM)", remedy
    if looping:
        reason = f"dies at its start and is restarted again and again ({instance.restarts} times"
        return "restart-loop", f"{reason}, last exit status {status})", look
    if instance.state == "exited" and status == 0:
        return "stopped", "exited with status 0: it was stopped", start
    told_of = {
        "paused": ("paused", "paused", f"docker unpause {instance.id[:12]}"),
        "created": ("created", "was created and never started", start),
        "restarting": ("exited", f"ended{told} and is being restarted", look),
        "dead": ("dead", f"dead{told}", f"{look}; then: {start}"),
        "exited": ("exited", f"exited{told}", f"{look}; then: {start}"),
    }
    return told_of[instance.state]
