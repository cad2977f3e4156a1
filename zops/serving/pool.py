"""All workers of a server: started together, replaced one by one, given up only when none can start."""

import asyncio
from collections.abc import Callable, Sequence
from functools import partial

from zops.errors import ZopsError
from zops.events import Finished, Report, Warned
from zops.serving.life import WORKER_PHASES, Owner, Patience, Worker
from zops.serving.link import WorkerLink, close_all
from zops.serving.metrics import Metrics


class Pool:
    """All workers of this server."""

    def __init__(
        self,
        start_worker: Callable[[int], WorkerLink],
        count: int,
        owner: Owner,
        metrics: Metrics,
        *,
        report: Report,
        patience: Patience,
        startup_timeout_s: float,
    ) -> None:
        self.metrics = metrics
        self.patience = patience
        self.startup_timeout_s = startup_timeout_s
        self.gave_up: asyncio.Future[ZopsError] | None = None
        self.workers: Sequence[Worker] = [
            Worker(index, partial(start_worker, index), owner, self) for index in range(count)
        ]
        self._report = report
        self._closing = False

    def begin(self) -> None:
        """Start all workers; to be called once, in the running event loop."""
        self.gave_up = asyncio.get_running_loop().create_future()
        for worker in self.workers:
            worker.start()

    def drain(self) -> None:
        """Start no worker any more."""
        self._closing = True
        for worker in self.workers:
            if not worker.alive:
                worker.leave()  # its pause would end with a start

    def close(self) -> None:
        """Let all workers go, and wait a little for their end."""
        self._closing = True
        close_all(link for worker in self.workers if (link := worker.leave()))

    @property
    def furthest(self) -> Worker:
        """The worker that is nearest to an image; its phase is the server's."""
        return max(self.workers, key=lambda worker: WORKER_PHASES.index(worker.phase))

    @property
    def ready_count(self) -> int:
        """Workers that are loaded and alive."""
        return sum(worker.ready for worker in self.workers)

    def least_loaded(self) -> Worker | None:
        """Return the worker that has been idle for the longest time; None when all are busy."""
        return min((worker for worker in self.workers if worker.idle), key=lambda w: w.freed_at, default=None)

    # --- what the workers tell

    def passed(self, worker: Worker, phase: str, seconds: float) -> None:
        """Publish how long a phase of a start took."""
        self.metrics.start_phase.labels(phase).set(seconds)
        self.tell(worker, phase, seconds)

    def noticed(self, worker: Worker, text: str) -> None:
        """Tell the operator what a worker noticed in its start."""
        self._report(Warned(f"{self._name(worker)}{text}"))

    def tell(self, worker: Worker, text: str, seconds: float) -> None:
        """Report what a worker has done; it is named where there are several."""
        name = f"{self._name(worker)}{text}"
        self._report(Finished(name, name, seconds))

    def lost(self, worker: Worker, because: str) -> None:
        """See to the seat of a lost worker: start another one, or give up when none can start."""
        if self._closing:
            return
        self.metrics.worker_restarts.labels(because).inc()
        if all(other.failed_starts >= self.patience.failed_starts for other in self.workers):
            self._give_up(worker)
            return
        pause_s = worker.start_again()
        self._report(
            Warned(f"{self._name(worker)}the worker was lost ({worker.reason}); another one starts in {pause_s:g} s")
        )

    def _give_up(self, last: Worker) -> None:
        self._closing = True
        close_all(link for worker in self.workers if (link := worker.leave()))
        if self.gave_up and not self.gave_up.done():
            text = f"the worker failed to start {self.patience.failed_starts} times in a row: {last.reason}"
            self.gave_up.set_result(ZopsError(text, code="worker-start-failed", hint="see the log above for the cause"))

    def _name(self, worker: Worker) -> str:
        return f"worker {worker.index}: " if len(self.workers) > 1 else ""
