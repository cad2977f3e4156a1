"""A survey in the forms that monitoring systems read: a line for Nagios and its kin, a text file for Prometheus."""

from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any

from zops.cache.textfile import Labelled, Metric, render
from zops.errors import ZopsError
from zops.health.canary import SLOW, TOO_SLOW
from zops.health.survey import Survey
from zops.health.verdict import Health, Verdict

PREFIX = "zops_health_"
LEVELS: dict[Verdict, int] = {"ok": 0, "degraded": 1, "failed": 2}

# Statuses of the Monitoring Plugins' guidelines.
OK, WARNING, CRITICAL, UNKNOWN = 0, 1, 2, 3
_WORDS = ("OK", "WARNING", "CRITICAL", "UNKNOWN")
# From harmless to bad: an instance that failed says more than one of which nothing is known.
_SEVERITY = (OK, WARNING, UNKNOWN, CRITICAL)
# Nothing is known of what these stand for.
_UNKNOWN_CODES = frozenset({"engine-unreachable", "key-refused"})


# --- Nagios


def nagios(found: Survey) -> tuple[int, str]:
    """Return the exit status of a plugin and its one line: what is wrong in words, then performance data."""
    if not found.healths:
        return CRITICAL, "ZOPS CRITICAL - there is no instance"
    states = [_state(one) for one in found.healths]
    status = max(states, key=_SEVERITY.index)
    ill = [one for one in found.healths if one.verdict != "ok"]
    ill.sort(key=lambda one: -_SEVERITY.index(_state(one)))
    well = len(found.healths) - len(ill)
    said = [f"{one.title}: {bad.layer} {bad.code}: {bad.reason}" for one in ill if (bad := one.first_bad)]
    if well:
        said.append(f"{well} {'instance' if well == 1 else 'instances'} ok")
    figures = " ".join(figure for one in found.healths for figure in _figures(one))
    return status, f"ZOPS {_WORDS[status]} - {_plain('; '.join(said))}" + (f" | {figures}" if figures else "")


def nagios_unknown(error: ZopsError) -> tuple[int, str]:
    """Return what a plugin says that could not find out anything."""
    return UNKNOWN, f"ZOPS UNKNOWN - {_plain(error.message)}"


def _state(health: Health) -> int:
    if health.code in _UNKNOWN_CODES:
        return UNKNOWN
    return {"ok": OK, "degraded": WARNING, "failed": CRITICAL}[health.verdict]


def _plain(text: str) -> str:
    """Keep a text to one line without the bar that ends the words for people."""
    return " ".join(text.replace("|", "/").split())


def _figures(health: Health) -> Iterator[str]:
    """Yield performance data: 'label'=value[unit];[warn];[crit];[min];[max]."""
    name = health.title.replace("'", "").replace("=", "")
    yield f"'{name} time'={sum(probe.seconds for probe in health.probes):.3f}s;;;0"
    queue = _evidence(health, "queue")
    if "waiting" in queue:
        yield f"'{name} waiting'={queue['waiting']};;;0;{queue.get('limit', '')}"
    for gpu in _gpus(health):
        label = f"'{name} gpu{gpu.get('index')}"
        if _is_number(gpu.get("memory_used")):
            yield f"{label} memory'={gpu['memory_used']}B;;;0;{gpu.get('memory_total') or ''}"
        if _is_number(gpu.get("temperature")):
            yield f"{label} temperature'={gpu['temperature']}"
    canary = _evidence(health, "canary")
    if _is_number(canary.get("work_s")):
        usual = canary.get("baseline_s") or 0
        limits = f"{usual * SLOW:.3f};{usual * TOO_SLOW:.3f}" if usual else ";"
        yield f"'{name} canary'={canary['work_s']}s;{limits};0"


# --- Prometheus


def prometheus(found: Survey) -> str:
    """Return the survey in Prometheus' text format, for node_exporter's textfile collector."""
    return render(PREFIX, ({}, _totals(found)), *(group for one in found.healths for group in _groups(one)))


def _totals(found: Survey) -> Iterator[Metric]:
    # An alert on its age finds a timer that no longer runs.
    judged_at = datetime.fromisoformat(found.judged_at).timestamp()
    yield Metric("judged_timestamp_seconds", "when the instances were judged", judged_at)
    yield Metric("verdict_worst", "the worst verdict: 0 ok, 1 degraded, 2 failed", LEVELS[found.verdict])
    yield Metric("instances", "instances that were judged", len(found.healths))


def _groups(health: Health) -> Iterator[Labelled]:
    labels = {"deployment": health.name, "host": health.host, "runtime": health.runtime}
    yield labels, list(_of_instance(health))
    bad = health.first_bad
    if bad:
        yield labels | {"layer": bad.layer, "code": bad.code}, [Metric("problem", "1: what is wrong", 1)]
    for probe in health.probes:
        yield (
            labels | {"layer": probe.layer},
            [
                Metric("layer_verdict", "verdict on a layer: 0 ok, 1 degraded, 2 failed", LEVELS[probe.verdict]),
                Metric("layer_seconds", "what asking a layer took", probe.seconds),
            ],
        )
    for gpu in _gpus(health):
        yield labels | {"gpu": str(gpu.get("index")), "uuid": str(gpu.get("uuid") or "")}, list(_of_gpu(gpu))


def _of_instance(health: Health) -> Iterator[Metric]:
    yield Metric("verdict", "verdict on an instance: 0 ok, 1 degraded, 2 failed", LEVELS[health.verdict])
    told = {
        "restarts": ("running", "restarts", "how often its runtime restarted it"),
        "queue_waiting": ("queue", "waiting", "requests that wait"),
        "queue_running": ("queue", "running", "requests that run"),
        "queue_limit": ("queue", "limit", "requests that may wait"),
        "queue_oldest_seconds": ("queue", "oldest_s", "how long the oldest request waits"),
        "queue_idle_seconds": ("queue", "idle_s", "how long nothing moved while something waits or runs"),
        "canary_seconds": ("canary", "work_s", "what the canary image took, without its time in the queue"),
        "canary_baseline_seconds": ("canary", "baseline_s", "what it usually takes"),
        "canary_similarity_db": ("canary", "similarity_db", "how like its golden image it is; 99 for equal"),
    }
    for name, (layer, key, text) in told.items():
        value: Any = _evidence(health, layer).get(key)
        if _is_number(value):
            yield Metric(name, text, value)


def _of_gpu(gpu: Mapping[str, Any]) -> Iterator[Metric]:
    told = {
        "gpu_memory_used_bytes": ("memory_used", "memory of a GPU in use, as NVML says inside the instance"),
        "gpu_memory_bytes": ("memory_total", "memory of a GPU"),
        "gpu_temperature_celsius": ("temperature", "temperature of a GPU"),
        "gpu_ecc_uncorrected": ("ecc_uncorrected", "memory errors that were not corrected since the driver was loaded"),
    }
    for name, (key, text) in told.items():
        if _is_number(gpu.get(key)):
            yield Metric(name, text, gpu[key])


# --- what both read


def _evidence(health: Health, layer: str) -> Mapping[str, Any]:
    probe = health.probe(layer)
    return probe.evidence if probe else {}


def _gpus(health: Health) -> list[Mapping[str, Any]]:
    devices = _evidence(health, "gpu").get("devices") or []
    return [one for one in devices if isinstance(one, Mapping)]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
