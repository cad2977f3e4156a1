"""Probes of what an instance is given: its GPUs, and the snapshot that is mounted into it."""

from collections.abc import Mapping, Sequence
from typing import Any

from zops.errors import ZopsError
from zops.health.patient import Patient
from zops.health.verdict import Probe, degraded, failed, passed


def judge_gpu(patient: Patient) -> Probe:
    """Judge whether NVML shows the GPUs that were asked for, from inside, and whether they are computed on."""
    wanted = patient.asked.get("gpus", "none")
    if wanted == "none":
        return passed("gpu", "no GPU asked for")
    told = patient.gpus or {}
    devices = [one for one in told.get("devices") or [] if isinstance(one, Mapping)]
    device = str(patient.facts.get("device") or "")
    seen = {"asked": wanted, "device": device, "error": told.get("error") or "", "devices": devices}
    trouble = _lack(patient, len(wanted) if isinstance(wanted, list | tuple) else 1, device, devices)
    if trouble:
        code, reason = trouble
        unused = f"see why with: {patient.logs}"
        return failed("gpu", code, reason, unused if code == "gpu-unused" else patient.recreate, **seen)
    ill = [one for one in devices if one.get("ecc_uncorrected")]
    if ill:
        counts = ", ".join(f"GPU {one.get('index')}: {one['ecc_uncorrected']}" for one in ill)
        reason = f"memory errors that could not be corrected since the driver was loaded: {counts}"
        return degraded("gpu", "gpu-errors", reason, "zops doctor --only gpu-condition", **seen)
    return passed("gpu", f"sees {_names(devices) or device or 'what it will use'}", **seen)


def _lack(patient: Patient, count: int, device: str, devices: Sequence[Mapping[str, Any]]) -> tuple[str, str] | None:
    """Return code and reason where an instance lacks a GPU; an older instance tells only what it computes on."""
    told = patient.gpus
    if told and told.get("error"):
        return "gpu-lost", f"NVML inside it: {told['error']}"
    if told and len(devices) < count:
        wanted = "a GPU" if count == 1 else f"{count} GPUs"
        return "gpu-missing", f"{wanted} asked for, it sees {len(devices) or 'none'}"
    if told and device == "cpu":
        return "gpu-unused", f"sees {_names(devices)}, but computes on the CPU"
    if device == "cpu" or (not told and not device and patient.readiness.ready):
        return "gpu-missing", f"a GPU is asked for, the instance computes on {device or 'nothing that it names'}"
    return None


def _names(devices: Sequence[Mapping[str, Any]]) -> str:
    names = [str(one.get("name")) for one in devices]
    counts = {name: names.count(name) for name in names}
    return ", ".join(f"{count} x {name}" if count > 1 else name for name, count in counts.items())


def judge_cache(patient: Patient) -> Probe:
    """Judge what lies on the instance's disk now, whether it is what it loaded, and whether it could write to it."""
    served, expected = str(patient.facts.get("manifest_digest") or ""), patient.expected_digest
    told = patient.snapshot or {}
    on_disk = str(told.get("manifest_digest") or "")
    seen: dict[str, Any] = {"served": served, "expected": expected, "on_disk": on_disk or None}
    if told.get("error"):
        remedy = f"zops cache verify --deep --repair; then {patient.recreate}"
        return failed("cache", "snapshot-gone", f"inside it: {told['error']}", remedy, **seen)
    if not served:
        reason = "the instance does not say which manifest it serves"
        return failed("cache", "manifest-differs", reason, patient.recreate, **seen)
    remedy = f"zops cache verify; then {patient.recreate}"
    if expected and served != expected:
        reason = f"serves manifest {served[:12]}, {expected[:12]} is expected"
        return failed("cache", "manifest-differs", reason, remedy, **seen)
    if on_disk and on_disk != (expected or served):
        reason = f"manifest {on_disk[:12]} lies on its disk now, {(expected or served)[:12]} is expected"
        return failed("cache", "manifest-differs", reason, remedy, **seen)
    try:
        seen["writable"] = patient.writable
    except ZopsError:
        seen["writable"] = None
    if seen["writable"] and patient.instance.runtime == "docker":
        reason = "the cache is mounted so that the instance can write to it"
        return degraded("cache", "cache-writable", reason, patient.recreate, **seen)
    return passed("cache", f"manifest {served[:12]}", **seen)
