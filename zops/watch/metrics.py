"""The watch's figures for Prometheus; docs/how-to/watch.md explains each (a test holds it to this)."""

import threading
from collections.abc import Mapping
from typing import Literal, NamedTuple

from zops.health.verdict import Verdict


class Family(NamedTuple):
    """A metric: its type, what it means, and its labels."""

    type: Literal["gauge", "counter"]
    text: str
    labels: tuple[str, ...] = ()


PREFIX = "zops_watch_"
_OF_AN_INSTANCE = ("instance", "runtime")
FAMILIES: dict[str, Family] = {
    "instance_verdict": Family(
        "gauge", "Verdict that stands: 0 ok, 1 degraded, 2 failed.", (*_OF_AN_INSTANCE, "layer", "code")
    ),
    "last_probe_timestamp_seconds": Family("gauge", "When the instance was last probed.", _OF_AN_INSTANCE),
    "probe_seconds": Family("gauge", "How long the last probe took, without its canary.", _OF_AN_INSTANCE),
    "last_canary_timestamp_seconds": Family("gauge", "When the last canary image was asked for.", _OF_AN_INSTANCE),
    "canary_seconds": Family("gauge", "How long the last canary image took.", _OF_AN_INSTANCE),
    "heals_total": Family(
        "counter", "Heals by what was done and how it ended.", (*_OF_AN_INSTANCE, "action", "result")
    ),
    "recovery_seconds": Family("gauge", "From the last heal to a verdict that is not failed.", _OF_AN_INSTANCE),
    "gave_up": Family("gauge", "1 while nothing more is done for an instance that is not ok.", _OF_AN_INSTANCE),
    "engine_reachable": Family("gauge", "1 while the engine answers.", ("runtime",)),
    "fenced_gpus": Family("gauge", "GPUs that are fenced on this host."),
    "gpu_fenced": Family("gauge", "1 for each fenced GPU.", ("gpu", "pci", "action")),
    "events_total": Family("counter", "Events by kind.", ("kind",)),
    "webhook_events_total": Family("counter", "Events for the webhook by how it ended.", ("result",)),
    "loop_age_seconds": Family("gauge", "Seconds since the loop last came round."),
    "dry_run": Family("gauge", "1 when the watch only says what it would do."),
}
"""Every metric, without `PREFIX`."""
VALUES: dict[Verdict, int] = {"ok": 0, "degraded": 1, "failed": 2}


class Figures:
    """The values of all metrics; may be used from several threads."""

    def __init__(self) -> None:
        self._values: dict[str, dict[tuple[str, ...], float]] = {name: {} for name in FAMILIES}
        self._lock = threading.Lock()

    def set(self, name: str, value: float, *labels: str) -> None:
        """Set a value; labels in the order of the family."""
        assert len(labels) == len(FAMILIES[name].labels), name
        with self._lock:
            self._values[name][labels] = value

    def add(self, name: str, *labels: str) -> None:
        """Count one more."""
        assert len(labels) == len(FAMILIES[name].labels), name
        with self._lock:
            self._values[name][labels] = self._values[name].get(labels, 0) + 1

    def replace(self, name: str, values: Mapping[tuple[str, ...], float]) -> None:
        """Set all values of a family; those that are not named are gone."""
        with self._lock:
            self._values[name] = dict(values)

    def judge(self, instance: str, runtime: str, verdict: Verdict, layer: str, code: str) -> None:
        """Set the verdict of an instance in place of the one before."""
        with self._lock:
            self._drop("instance_verdict", instance, runtime)
            self._values["instance_verdict"][instance, runtime, layer, code] = VALUES[verdict]

    def forget(self, instance: str, runtime: str) -> None:
        """Drop every gauge of an instance that is gone; what was counted stays."""
        with self._lock:
            for name, family in FAMILIES.items():
                if family.type == "gauge" and family.labels[:2] == _OF_AN_INSTANCE:
                    self._drop(name, instance, runtime)

    def render(self) -> str:
        """Return everything in Prometheus' text format."""
        with self._lock:
            lines = []
            for name, family in FAMILIES.items():
                full = PREFIX + name
                lines += [f"# HELP {full} {family.text}", f"# TYPE {full} {family.type}"]
                for labels, value in self._values[name].items():
                    pairs = ",".join(f'{k}="{_escaped(v)}"' for k, v in zip(family.labels, labels, strict=True))
                    lines.append(f"{full}{f'{{{pairs}}}' if pairs else ''} {float(value):.15g}")
            return "\n".join([*lines, ""])

    def _drop(self, name: str, instance: str, runtime: str) -> None:
        values = self._values[name]
        for labels in [labels for labels in values if labels[:2] == (instance, runtime)]:
            del values[labels]


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
