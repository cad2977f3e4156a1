"""What /metrics shows. Names start with `zops_`; labels never carry request ids, prompts or paths of clients.

`METRICS` is the published list (docs/reference/http-api.md); a test holds both together.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, cast

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from zops.serving.answers import GpusState, Queue, SnapshotState
from zops.serving.messages import Ready

# An image takes 0.2 to 5 s on current GPUs, and there the buckets are fine; the text encoder takes a few hundredths of
# a second; a CPU takes longer than all of it.
BUCKETS_S = (
    *(0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0),
    *(1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 7.5, 10.0, 30.0, 60.0, 120.0),
)
BUCKETS_PICTURES = (1, 2, 3, 4, 6, 8, 12, 16)


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
    "zops_phase_seconds": MetricKind(
        "histogram", ("phase",), "parts of an image's way: queue (a request); text, denoise, decode (a batch); encode"
    ),
    "zops_batch_size": MetricKind("histogram", (), "pictures that a worker was given to make together"),
    "zops_waiting": MetricKind("gauge", (), "requests of which no picture has been begun"),
    "zops_running": MetricKind("gauge", (), "requests of which a picture has been begun"),
    "zops_ready": MetricKind("gauge", (), "1 while /readyz answers 200, else 0"),
    "zops_workers": MetricKind("gauge", (), "workers that there should be"),
    "zops_workers_ready": MetricKind("gauge", (), "workers that take pictures"),
    "zops_worker_restarts_total": MetricKind(
        "counter", ("reason",), "workers lost: died, hung, silent, stalled, start-failed, start-timeout"
    ),
    "zops_retried_total": MetricKind("counter", (), "pictures made again because their worker was lost"),
    "zops_gpu_memory_used_bytes": MetricKind("gauge", ("worker", "card"), "memory in use on a GPU of the worker"),
    "zops_gpu_memory_total_bytes": MetricKind("gauge", ("worker", "card"), "memory of a GPU of the worker"),
    "zops_oldest_waiting_seconds": MetricKind("gauge", (), "how long the oldest waiting request waits"),
    "zops_idle_seconds": MetricKind("gauge", (), "since the last forward or picture, while something waits or runs"),
    "zops_gpus": MetricKind("gauge", (), "GPUs that NVML shows inside the instance"),
    "zops_gpu_error": MetricKind("gauge", (), "1 while NVML fails inside the instance, hangs, or misses a GPU"),
    "zops_gpu_temperature_celsius": MetricKind("gauge", ("gpu",), "temperature of a GPU"),
    "zops_gpu_ecc_uncorrected": MetricKind(
        "gauge", ("gpu",), "uncorrectable memory errors since the driver was loaded"
    ),
    "zops_snapshot_error": MetricKind(
        "gauge", (), "1 while the snapshot on the disk is gone or not as its manifest says"
    ),
    "zops_cache_hit_bytes": MetricKind("gauge", ("worker",), "weights read from the local disk at the last start"),
    "zops_cache_hit_seconds": MetricKind("gauge", ("worker",), "how long that took"),
    "zops_start_phase_seconds": MetricKind("gauge", ("phase",), "phases of the worker's last start"),
    "zops_client_requests_total": MetricKind(
        "counter", ("client", "status"), "image requests by the name of their API key"
    ),
    "zops_api_keys": MetricKind("gauge", (), "API keys that are good"),
    "zops_api_keys_stale": MetricKind("gauge", (), "1 while the file of API keys is broken and the former keys apply"),
    "zops_jobs": MetricKind("gauge", (), "jobs that wait or run"),
    "zops_jobs_ended_total": MetricKind("counter", ("status",), "jobs that ended: succeeded, failed, cancelled"),
    "zops_job_bytes": MetricKind("gauge", (), "size of the results that jobs keep"),
    "zops_replays_total": MetricKind("counter", (), "answers given once more for their Idempotency-Key"),
    "zops_connections_dropped_total": MetricKind(
        "counter", ("reason",), "connections cut off: head_timeout, body_timeout, slow_reader, too_many"
    ),
    "zops_build_info": MetricKind(
        "gauge",
        ("version", "model", "revision", "manifest", "device", "dtype", "torch", "diffusers", "preset", "gate"),
        "always 1; what is served, and what with",
    ),
    "zops_gate_psnr_db": MetricKind("gauge", (), "how near the preset's images are to eager's, where it was compared"),
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
        self.request_seconds = self._histogram("zops_request_seconds", BUCKETS_S)
        self.phase_seconds = self._histogram("zops_phase_seconds", BUCKETS_S)
        self.batch_size = self._histogram("zops_batch_size", BUCKETS_PICTURES)
        self.waiting = self._gauge("zops_waiting")
        self.running = self._gauge("zops_running")
        self.ready = self._gauge("zops_ready")
        self.workers = self._gauge("zops_workers")
        self.workers_ready = self._gauge("zops_workers_ready")
        self.worker_restarts = self._counter("zops_worker_restarts_total")
        self.retried = self._counter("zops_retried_total")
        self._memory_used = self._gauge("zops_gpu_memory_used_bytes")
        self._memory_total = self._gauge("zops_gpu_memory_total_bytes")
        self._oldest_waiting = self._gauge("zops_oldest_waiting_seconds")
        self._idle = self._gauge("zops_idle_seconds")
        self._gpus = self._gauge("zops_gpus")
        self._gpu_error = self._gauge("zops_gpu_error")
        self._gpu_temperature = self._gauge("zops_gpu_temperature_celsius")
        self._gpu_ecc = self._gauge("zops_gpu_ecc_uncorrected")
        self._snapshot_error = self._gauge("zops_snapshot_error")
        self._cache_bytes = self._gauge("zops_cache_hit_bytes")
        self._cache_seconds = self._gauge("zops_cache_hit_seconds")
        self.start_phase = self._gauge("zops_start_phase_seconds")
        self.client_requests = self._counter("zops_client_requests_total")
        self.api_keys = self._gauge("zops_api_keys")
        self.api_keys_stale = self._gauge("zops_api_keys_stale")
        self.jobs_open = self._gauge("zops_jobs")
        self.jobs_ended = self._counter("zops_jobs_ended_total")
        self.job_bytes = self._gauge("zops_job_bytes")
        self.replays = self._counter("zops_replays_total")
        self.connections_dropped = self._counter("zops_connections_dropped_total")
        self._build_info = self._gauge("zops_build_info")
        self._gate_psnr = self._gauge("zops_gate_psnr_db")

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
            facts.preset,
            facts.gate.result,
        ).set(1)
        if facts.gate.psnr_db is not None:
            self._gate_psnr.set(facts.gate.psnr_db)

    def tell_memory(self, worker: int, cards: Iterable[tuple[int, int]]) -> None:
        """Publish used and total bytes of each of a worker's GPUs."""
        for card, (used, total) in enumerate(cards):
            self._memory_used.labels(str(worker), str(card)).set(used)
            self._memory_total.labels(str(worker), str(card)).set(total)

    def tell_queue(self, queue: Queue) -> None:
        """Publish since when the queue waits and the workers stand still; 0 where neither does."""
        self._oldest_waiting.set(queue["oldest_s"] or 0)
        self._idle.set(queue["idle_s"] or 0)

    def tell_surroundings(self, gpus: GpusState | None, snapshot: SnapshotState | None) -> None:
        """Publish what GPUs and disk look like now, in place of what they did."""
        devices = gpus["devices"] if gpus else []
        self._gpus.set(len(devices))
        self._gpu_error.set(int(bool(gpus and gpus["error"])))
        self._snapshot_error.set(int(bool(snapshot and snapshot["error"])))
        for gauge, key in ((self._gpu_temperature, "temperature"), (self._gpu_ecc, "ecc_uncorrected")):
            gauge.clear()
            for gpu in devices:
                value = cast("int | None", gpu.get(key))
                if value is not None:
                    gauge.labels(str(gpu["index"])).set(value)

    def tell_cache(self, worker: int, read_bytes: int, seconds: float) -> None:
        """Publish what a worker read from the snapshot on local disk."""
        self._cache_bytes.labels(str(worker)).set(read_bytes)
        self._cache_seconds.labels(str(worker)).set(seconds)

    def render(self) -> tuple[bytes, str]:
        """Return the exposition and its content type."""
        return prometheus_client.generate_latest(self.registry), "text/plain; version=0.0.4; charset=utf-8"

    def _counter(self, name: str) -> Counter:
        return Counter(name, METRICS[name].text, METRICS[name].labels, registry=self.registry)

    def _gauge(self, name: str) -> Gauge:
        return Gauge(name, METRICS[name].text, METRICS[name].labels, registry=self.registry)

    def _histogram(self, name: str, buckets: tuple[float, ...]) -> Histogram:
        kind = METRICS[name]
        return Histogram(name, kind.text, kind.labels, registry=self.registry, buckets=buckets)
