"""Verdicts: what a probe, an instance or a whole host is judged to be, with the reason and the remedy."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

Verdict = Literal["ok", "degraded", "failed"]
_ORDER: tuple[Verdict, ...] = ("ok", "degraded", "failed")


@dataclass(frozen=True, slots=True)
class Probe:
    """One layer of an instance, judged. `remedy` is a command wherever there is one."""

    layer: str
    verdict: Verdict
    reason: str
    remedy: str = ""
    seconds: float = 0.0
    evidence: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Health:
    """All layers of one instance, outermost first. Layers behind a failed one are not asked and not listed."""

    name: str
    runtime: str
    probes: tuple[Probe, ...]

    @property
    def verdict(self) -> Verdict:
        """The worst of the probes."""
        return worst(probe.verdict for probe in self.probes)

    @property
    def first_bad(self) -> Probe | None:
        """The outermost layer that is not ok."""
        return next((probe for probe in self.probes if probe.verdict != "ok"), None)

    def as_json(self) -> dict[str, Any]:
        """Return the health as documented in docs/reference/json.md."""
        bad = self.first_bad
        return {
            "name": self.name,
            "runtime": self.runtime,
            "verdict": self.verdict,
            "reason": bad.reason if bad else "",
            "remedy": bad.remedy if bad else "",
            "layers": [
                {
                    "layer": probe.layer,
                    "verdict": probe.verdict,
                    "reason": probe.reason,
                    "remedy": probe.remedy,
                    "seconds": round(probe.seconds, 4),
                    "evidence": probe.evidence,
                }
                for probe in self.probes
            ],
        }


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """Return the worst verdict; ok when there are none."""
    return max(verdicts, key=_ORDER.index, default="ok")
