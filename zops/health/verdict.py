"""Verdicts: what a probe, an instance or a whole host is judged to be, with the reason, the code and the remedy."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

Verdict = Literal["ok", "degraded", "failed"]
_ORDER: tuple[Verdict, ...] = ("ok", "degraded", "failed")

LAYERS = ("engine", "running", "live", "gpu", "cache", "ready", "queue", "canary")
"""Outermost first. What an instance is given (GPUs, weights) comes before what it makes of it (a worker that is ready):
a worker that died because its GPU is gone is to be told as a GPU that is gone."""

CODES: dict[str, str] = {
    "engine-unreachable": "the engine, or its host, does not answer; nothing is known of its instances",
    "instance-missing": "a host of the fleet has no instance, or not the one that was asked for",
    "exited": "it ended with a status other than 0",
    "stopped": "it ended with status 0: somebody stopped it",
    "oom-killed": "the kernel killed it because it wanted more memory than it may have",
    "paused": "somebody paused it",
    "restart-loop": "it dies again and again, and its runtime restarts it each time",
    "created": "it was made and never started",
    "dead": "the engine could not remove it entirely",
    "unreachable": "nobody listens at its address",
    "hung": "it takes connections and does not answer in time",
    "stranger": "something else than zops answers at its address",
    "not-live": "its HTTP process says itself that it does not live",
    "gpu-lost": "NVML fails inside it, or a GPU that it had is gone",
    "gpu-missing": "it was to have GPUs and sees none, or fewer",
    "gpu-errors": "a GPU counted memory errors that it could not correct",
    "gpu-unused": "it sees its GPU and computes on the CPU",
    "snapshot-gone": "its snapshot, or a file of it, is no longer where it is mounted",
    "manifest-differs": "the snapshot that it serves, or that lies there now, is not the deployment's",
    "cache-writable": "it could write to the cache",
    "starting": "it was not ready yet since its start, and still has time",
    "start-overdue": "it was not ready within serve.startup_timeout_s of its start",
    "worker-down": "a worker that was there is gone and is being started again",
    "draining": "it is stopping and takes no new requests",
    "queue-stuck": "requests wait or run and nothing moves",
    "canary-failed": "no whole image came out of it",
    "canary-black": "the image is black or flat",
    "canary-differs": "the image is not the one that the same weights gave before",
    "canary-slow": "the image took several times as long as it used to",
    "key-refused": "it wants another API key than zops has; nothing is known beyond that",
}
"""Every code of a probe that is not ok, and what it means. Documented, with what to do, in
docs/how-to/check-health.md; a code keeps its meaning, new ones may be added."""


@dataclass(frozen=True, slots=True)
class Probe:
    """One layer of an instance, judged. `remedy` is a command wherever there is one, `code` one of `CODES`."""

    layer: str
    verdict: Verdict
    reason: str
    remedy: str = ""
    seconds: float = 0.0
    evidence: dict[str, Any] = field(default_factory=dict)
    code: str = ""
    """A stable kebab-case name of what is wrong; empty when it is ok."""


@dataclass(frozen=True, slots=True)
class Health:
    """All layers of one instance, outermost first. Layers behind a failed one are not asked and not listed."""

    name: str
    runtime: str
    probes: tuple[Probe, ...]
    host: str = ""
    """Name of its host in `hosts:` of zops.yaml; empty for an instance of the specification's own engine."""

    @property
    def verdict(self) -> Verdict:
        """The worst of the probes."""
        return worst(probe.verdict for probe in self.probes)

    def probe(self, layer: str) -> Probe | None:
        """Return what was found in a layer, None where it was not asked."""
        return next((probe for probe in self.probes if probe.layer == layer), None)

    @property
    def first_bad(self) -> Probe | None:
        """The layer to look at first: the outermost that failed, else the outermost that is degraded."""
        verdict = self.verdict
        return next((probe for probe in self.probes if probe.verdict == verdict), None) if verdict != "ok" else None

    @property
    def code(self) -> str:
        """Code of the layer to look at first; empty when all is well."""
        bad = self.first_bad
        return bad.code if bad else ""

    @property
    def title(self) -> str:
        """How people are told which instance is meant: its name, behind its host's where it has one."""
        return "/".join(part for part in (self.host, self.name) if part)

    def as_json(self) -> dict[str, Any]:
        """Return the health as documented in docs/reference/json.md."""
        bad = self.first_bad
        return {
            "name": self.name,
            "host": self.host,
            "runtime": self.runtime,
            "verdict": self.verdict,
            "layer": bad.layer if bad else "",
            "code": bad.code if bad else "",
            "reason": bad.reason if bad else "",
            "remedy": bad.remedy if bad else "",
            "layers": [
                {
                    "layer": probe.layer,
                    "verdict": probe.verdict,
                    "code": probe.code,
                    "reason": probe.reason,
                    "remedy": probe.remedy,
                    "seconds": round(probe.seconds, 4),
                    "evidence": probe.evidence,
                }
                for probe in self.probes
            ],
        }


def passed(layer: str, reason: str, /, **evidence: Any) -> Probe:
    """Return a probe that found nothing wrong."""
    return Probe(layer, "ok", reason, evidence=evidence)


def degraded(layer: str, code: str, reason: str, remedy: str, /, **evidence: Any) -> Probe:
    """Return a probe that found something to look at; the layers behind it are asked all the same."""
    return Probe(layer, "degraded", reason, remedy, evidence=evidence, code=code)


def failed(layer: str, code: str, reason: str, remedy: str, /, **evidence: Any) -> Probe:
    """Return a probe behind which nothing is asked."""
    return Probe(layer, "failed", reason, remedy, evidence=evidence, code=code)


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """Return the worst verdict; ok when there are none."""
    return max(verdicts, key=_ORDER.index, default="ok")
