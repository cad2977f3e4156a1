"""What /metrics shows. Names start with `zops_`; labels never carry request ids, prompts or paths of clients.

`METRICS` is the published list (docs/reference/http-api.md); a test holds both together.
"""

from dataclasses import dataclass
from typing import Literal

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from zops.serving.messages import Ready

# A forward of the model takes 0.05 to 0.2 s on current GPUs and an image 0.3 to 5 s; a CPU takes longer.
BUCKETS_S = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0, 60.0, 120.0)


@dataclass(frozen=True, slots=True)
class MetricKind:
    """One metric: its Prometheus type, its labels, what it tells."""

    type: Literal["counter", "gauge", "histogram"]
    labels: tuple[str, ...]
    text: str


METRICS: dict[str, MetricKind] = {
    "zops_requests_total": MetricKind("counter", ("status",), "answered image requests by HTTP status"),
    "zops_refused_total": MetricKind("counter", ("code",), "image requests answered with an error, by its code"),
    "zops_images_total": MetricKind("counter", ("format",), "images delivered, warm-up images not counted"),
    "zops_request_seconds": MetricKind("histogram", (), "from the arrival of a good request to its answer"),
    "zops_phase_seconds": MetricKind("histogram", ("phase",), "parts of a good request: queue, generate, encode"),
    "zops_waiting": MetricKind("gauge", (), "requests that wait for the worker"),
    "zops_running": MetricKind("gauge", (), "requests that the worker works on"),
    "zops_ready": MetricKind("gauge", (), "1 while /readyz answers 200, else 0"),
    "zops_worker_restarts_total": MetricKind(
        "counter", ("reason",), "workers lost and replaced: died, hung, start-failed, start-timeout"
    ),
    "zops_start_phase_seconds": MetricKind("gauge", ("phase",), "phases of the worker's last start"),
    "zops_build_info": MetricKind(
        "gauge",
        ("version", "model", "revision", "manifest", "device", "dtype", "torch", "diffusers"),
        "always 1; what is served, and what with",
    ),
}


class Metrics:
    """The metrics of one server, in a registry of its own."""

    def __init__(self, *, model: str, revision: str, manifest_digest: str) -> None:
        # Without it each counter has a second series, of its birth, that nobody reads.
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call] # the library has no annotation here
        self.registry = CollectorRegistry()
        self._identity = (model, revision, manifest_digest)
        self.requests = self._counter("zops_requests_total")
        self.refused = self._counter("zops_refused_total")
        self.images = self._counter("zops_images_total")
        self.request_seconds = self._histogram("zops_request_seconds")
        self.phase_seconds = self._histogram("zops_phase_seconds")
        self.waiting = self._gauge("zops_waiting")
        self.running = self._gauge("zops_running")
        self.ready = self._gauge("zops_ready")
        self.worker_restarts = self._counter("zops_worker_restarts_total")
        self.start_phase = self._gauge("zops_start_phase_seconds")
        self._build_info = self._gauge("zops_build_info")

    def tell_facts(self, facts: Ready) -> None:
        """Publish what the worker runs on, in place of what an earlier one ran on."""
        model, revision, digest = self._identity
        versions = facts.versions
        self._build_info.clear()
        self._build_info.labels(
            versions["zops"],
            model,
            revision,
            digest,
            facts.device,
            facts.dtype,
            versions["torch"],
            versions["diffusers"],
        ).set(1)

    def render(self) -> tuple[bytes, str]:
        """Return the exposition and its content type."""
        return prometheus_client.generate_latest(self.registry), "text/plain; version=0.0.4; charset=utf-8"

    def _counter(self, name: str) -> Counter:
        return Counter(name, METRICS[name].text, METRICS[name].labels, registry=self.registry)

    def _gauge(self, name: str) -> Gauge:
        return Gauge(name, METRICS[name].text, METRICS[name].labels, registry=self.registry)

    def _histogram(self, name: str) -> Histogram:
        kind = METRICS[name]
        return Histogram(name, kind.text, kind.labels, registry=self.registry, buckets=BUCKETS_S)
