"""The bounded queue in front of the workers: who is next, on which worker, with whom in a batch.

Everything here runs in the event loop, in callbacks that never wait: a request comes, an answer comes, a worker is
lost, a timer fires. So there are no locks.
"""

import asyncio
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

from zops.errors import ZopsError
from zops.events import Report, Warned, silent
from zops.serving.answers import Queue
from zops.serving.batching import CROWD_S, LINGER_S, largest_batch
from zops.serving.bounds import Bounds
from zops.serving.errors import ApiError
from zops.serving.fairness import FairQueue
from zops.serving.life import Patience, Worker
from zops.serving.link import WorkerLink
from zops.serving.making import Making, Part
from zops.serving.messages import (
    PHASES,
    Batch,
    Beat,
    Cancel,
    Failed,
    Free,
    FromWorker,
    Made,
    Picture,
    Preview,
    Ready,
    Shape,
)
from zops.serving.metrics import Metrics
from zops.serving.pool import Pool
from zops.serving.progress import Progress

RETRY_LATER_S = 5.0
# Weight of the newest batch in the moving average of what a picture takes.
_NEWEST = 0.2


class Scheduler:
    """Queues requests, spreads their pictures over the workers, and sees that each request is answered.

    Args:
        start_worker: starts the worker with the given index.
        bounds: the operator's limits.
        metrics: where numbers go.
        workers: how many to start.
        max_batch: largest batch in place of the measured one.
        wants_gpu: whether it is worth a warning when a worker runs on the CPU.
        report: where the phases of starts and losses of workers go.
        patience: how long workers are waited for.
    """

    def __init__(
        self,
        start_worker: Callable[[int], WorkerLink],
        bounds: Bounds,
        metrics: Metrics,
        *,
        workers: int = 1,
        max_batch: int | None = None,
        wants_gpu: bool = False,
        report: Report = silent,
        patience: Patience | None = None,
    ) -> None:
        self.draining = False
        self._bounds = bounds
        self._metrics = metrics
        self._max_batch = max_batch
        self._wants_gpu = wants_gpu
        self._report = report
        self._pool = Pool(
            start_worker,
            workers,
            self,
            metrics,
            report=report,
            patience=patience or Patience(),
            startup_timeout_s=bounds.startup_timeout_s,
        )
        self._queue = FairQueue()
        self._queued: set[Making] = set()
        self._running: set[Making] = set()
        self._deadlines: dict[Making, asyncio.TimerHandle] = {}
        self._parts: dict[int, dict[str, Part]] = {worker.index: {} for worker in self._pool.workers}
        """What each worker makes, by the id of the picture."""
        self._batches = 0
        self._given_at: dict[int, float] = {}
        self._progress = Progress()
        self._picture_s = 1.0
        """Moving average of what a picture takes a worker; tells clients of a full queue when to come back."""
        self._crowd, self._crowd_until = 0, 0.0
        """Requests that the last batch served together, and until when they are likely to come back."""
        self._linger: asyncio.TimerHandle | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        self._begun_at = 0.0
        self._facts: Ready | None = None

    # --- what the server and the app call

    def begin(self) -> None:
        """Start the workers. To be called once, in the running event loop."""
        self._begun_at = asyncio.get_running_loop().time()
        self._metrics.workers.set(len(self._pool.workers))
        self._pool.begin()

    def submit(self, shape: Shape, pictures: tuple[Picture, ...], client: str = "") -> Making:
        """Queue a request.

        Args:
            shape: what all its pictures have in common.
            pictures: what to make, at least one.
            client: whom it counts for; clients take turns.

        Raises:
            ApiError: not_ready, draining or queue_full, each with the time to come back.
        """
        self._refuse()
        if all(worker.facts.packs for worker in self._pool.workers if worker.ready and worker.facts):
            shape = replace(shape, bucket=0)  # captions of any length go into one batch
        loop = asyncio.get_running_loop()
        now = loop.time()
        deadline = now + self._bounds.request_timeout_s
        making = Making(shape, pictures, client, arrived=now, deadline=deadline, on_end=self._ended)
        if self._idle.is_set():
            self._progress.begin(now)
        self._queued.add(making)
        self._idle.clear()
        self._deadlines[making] = loop.call_at(deadline, self._expire, making)
        for part in making.parts:
            self._queue.put(part)
        self._dispatch()
        return making

    def drain(self) -> None:
        """Take no new requests, refuse those that wait, let those that have begun finish."""
        self.draining = True
        self._pool.drain()
        for making in list(self._queued):
            making.fail(ApiError("draining", "the server is stopping", retry_after_s=RETRY_LATER_S))
        self._give_up_without_workers()
        self._dispatch()

    async def drained(self) -> None:
        """Wait until no request is on its way."""
        await self._idle.wait()

    def close(self) -> None:
        """Let the workers go, and start no other ones."""
        self.draining = True
        self._pool.close()
        if self._linger:
            self._linger.cancel()
        for making in [*self._queued, *self._running]:
            making.fail(self._loss())

    @property
    def gave_up(self) -> "asyncio.Future[ZopsError] | None":
        """Ends with the reason when no worker can be started; None before `begin`."""
        return self._pool.gave_up

    @property
    def ready(self) -> bool:
        """Whether a new request would be taken (if the queue is not full)."""
        return not self.draining and self._pool.ready_count > 0

    @property
    def waiting(self) -> int:
        """Requests of which no picture has been begun."""
        return len(self._queued)

    @property
    def running(self) -> int:
        """Requests of which a picture has been begun, and that are not finished."""
        return len(self._running)

    @property
    def facts(self) -> Ready | None:
        """What the first ready worker runs on; while there is none, what the last one did."""
        return next((worker.facts for worker in self._pool.workers if worker.ready), self._facts)

    def memory_left(self) -> int | None:
        """Return the least free bytes over the ready workers' devices; None when it cannot be told."""
        known = [w.facts.memory_free for w in self._pool.workers if w.ready and w.facts]
        return min((free for free in known if free is not None), default=None)

    def snapshot(self) -> dict[str, Any]:
        """Return the state as /readyz shows it."""
        furthest, facts = self._pool.furthest, self.facts
        return {
            "phase": "draining" if self.draining else furthest.phase,
            "reason": "the server is stopping" if self.draining else furthest.reason,
            "phases": {phase: furthest.phase_seconds.get(phase) for phase in PHASES},
            "device": facts.device if facts else None,
            "dtype": facts.dtype if facts else None,
            "preset": facts.preset if facts else None,
            "gate": asdict(facts.gate) if facts else None,
            "notes": list(facts.notes) if facts else [],
            "versions": dict(facts.versions) if facts else {},
            "workers": [worker.snapshot() for worker in self._pool.workers],
            "queue": self.queue_facts(),
        }

    def queue_facts(self) -> Queue:
        """Return how much waits and runs, and since when nothing moved."""
        moved = self._progress.facts(asyncio.get_running_loop().time(), self._queued, busy=not self._idle.is_set())
        return {"waiting": self.waiting, "running": self.running, "limit": self._bounds.max_queue, **moved}

    # --- requests

    def _refuse(self) -> None:
        """Raise when no new request can be taken."""
        if self.draining:
            raise ApiError("draining", "the server is stopping", retry_after_s=RETRY_LATER_S)
        if not self.ready:
            message = f"the server is not ready: {self._pool.furthest.reason}"
            raise ApiError("not_ready", message, retry_after_s=RETRY_LATER_S)
        if self.waiting >= self._bounds.max_queue:
            message = f"{self.waiting} requests are waiting already, the limit is {self._bounds.max_queue}"
            raise ApiError("queue_full", message, retry_after_s=self._wait_s())

    def _wait_s(self) -> float:
        """Guess how long it takes until all that waits now is made."""
        return self._picture_s * (len(self._queue) + 1) / max(1, self._pool.ready_count)

    def _expire(self, making: Making) -> None:
        message = f"the image was not finished within {self._bounds.request_timeout_s:g} s"
        making.fail(ApiError("deadline_exceeded", message))

    def _ended(self, making: Making) -> None:
        """Forget a request that was answered; stop what is still made for it."""
        self._deadlines.pop(making).cancel()
        self._queued.discard(making)
        self._running.discard(making)
        if making.state != "succeeded":
            self._queue.drop(making)
            for worker in self._pool.workers:
                for part in self._parts[worker.index].values():
                    if part.making is making and part.made is None:
                        worker.send(Cancel(part.picture.id))
        if not self._queued and not self._running:
            self._idle.set()
        self._dispatch()

    # --- batches

    def _dispatch(self) -> None:
        """Give waiting pictures to idle workers."""
        while (worker := self._pool.least_loaded()) and (head := self._queue.head()):
            limit = self._limit(worker, head)
            if limit > 1:
                idle = sum(other.idle for other in self._pool.workers)
                found = self._queue.count(head.shape, limit * idle)
                if self._lingers(head, found, limit):
                    break
                limit = min(limit, -(-found // idle))  # rounded up: no worker idles while another one makes them all
            self._give(worker, self._queue.take(limit))
        self._metrics.waiting.set(self.waiting)
        self._metrics.running.set(self.running)
        self._metrics.ready.set(int(self.ready))
        self._metrics.workers_ready.set(self._pool.ready_count)

    def _limit(self, worker: Worker, head: Part) -> int:
        """Return how many pictures the worker may make at once."""
        if head.losses or worker.facts is None:
            return 1
        limit = largest_batch(head.shape, worker.facts, self._max_batch)
        return max(1, min(limit, worker.fits.get(head.shape, limit)))

    def _lingers(self, head: Part, found: int, limit: int) -> bool:
        """Tell whether to wait for others to go with this picture: only after a batch whose clients may come back."""
        loop = asyncio.get_running_loop()
        now, until = loop.time(), head.making.arrived + LINGER_S
        if found >= min(limit, self._crowd) or now >= min(until, self._crowd_until):
            return False
        if self._linger is None:
            self._linger = loop.call_at(until, self._end_linger)
        return True

    def _end_linger(self) -> None:
        self._linger = None
        self._dispatch()

    def _give(self, worker: Worker, parts: list[Part]) -> None:
        """Have a worker make pictures."""
        now = asyncio.get_running_loop().time()
        for part in parts:
            part.worker, part.forwards = worker.index, 0
            making = part.making
            if making in self._queued:
                self._queued.remove(making)
                self._running.add(making)
                making.begin(now)
                self._metrics.phase_seconds.labels("queue").observe(making.queue_s)
        self._batches += 1
        self._parts[worker.index] = {part.picture.id: part for part in parts}
        self._given_at[worker.index] = now
        self._metrics.batch_size.observe(len(parts))
        batch = Batch(self._batches, parts[0].shape, tuple(part.picture for part in parts))
        worker.make(batch, deadline=max(part.making.deadline for part in parts))

    # --- what the workers tell

    def became_ready(self, worker: Worker) -> None:
        """Take note that a worker takes batches now."""
        facts = self._facts = worker.facts
        if facts is None:
            return
        self._metrics.tell_facts(facts)
        self._metrics.tell_cache(worker.index, facts.cache_bytes, facts.cache_seconds)
        if self._wants_gpu and facts.device == "cpu":
            self._report(Warned("no GPU is visible: serving on the CPU, which takes minutes an image"))
        if worker.restarts == 0:
            self._pool.tell(worker, "ready", asyncio.get_running_loop().time() - self._begun_at)
        self._dispatch()

    def received(self, worker: Worker, message: FromWorker) -> None:
        """Take what a worker says of its batch; what it says of a picture that it was not given means nothing."""
        parts = self._parts[worker.index]
        match message:
            case Beat(batch, forwards) if worker.batch and batch == worker.batch.id:
                self._progress.hear(worker.index, batch, forwards, asyncio.get_running_loop().time())
                for running in parts.values():
                    running.forwards = forwards
            case Preview(picture) if (part := parts.get(picture)) and part.wanted:
                part.making.show(part, message)
            case Made(picture) if part := parts.get(picture):
                self._made(worker, part, message)
            case Failed(picture, code, text, param) if part := parts.pop(picture, None):
                part.making.fail(ApiError(code, text, param=param))
            case Free(batch, fits) if worker.batch and batch == worker.batch.id:
                self._freed(worker, fits)

    def was_lost(self, worker: Worker) -> None:
        """Have what a lost worker had made once more, or answer for it."""
        self._retry_unfinished(worker)
        self._give_up_without_workers()
        self._dispatch()

    def _made(self, worker: Worker, part: Part, made: Made) -> None:
        worker.succeeded()
        self._progress.finish(asyncio.get_running_loop().time())
        parts = self._parts[worker.index]
        if not any(other.made for other in parts.values()):
            for phase, seconds in made.seconds.items():
                self._metrics.phase_seconds.labels(phase).observe(seconds)
        if part.wanted:
            part.making.add(part, made)

    def _freed(self, worker: Worker, fits: int | None) -> None:
        now = asyncio.get_running_loop().time()
        parts = self._parts[worker.index].values()
        seconds = (now - self._given_at[worker.index]) / max(1, len(parts))
        self._picture_s += _NEWEST * (seconds - self._picture_s)
        self._crowd, self._crowd_until = len({part.making for part in parts}), now + CROWD_S
        worker.free(fits)
        self._retry_unfinished(worker)
        self._dispatch()

    def _retry_unfinished(self, worker: Worker) -> None:
        """Queue again, before all others, what a worker had and somebody still waits for; but no picture twice."""
        parts, self._parts[worker.index] = self._parts[worker.index], {}
        for part in parts.values():
            if not part.wanted:
                continue
            part.losses += 1
            part.worker, part.forwards = None, 0
            if part.losses > 1:
                part.making.fail(self._loss())
            else:
                self._metrics.retried.inc()
                self._queue.put_back(part)

    def _give_up_without_workers(self) -> None:
        """Answer for what has begun when the last worker is gone and none will be started."""
        if self.draining and not any(worker.alive for worker in self._pool.workers):
            for making in list(self._running):
                making.fail(self._loss())

    @staticmethod
    def _loss() -> ApiError:
        message = "the worker was lost while it made the image"
        return ApiError("worker_lost", message, retry_after_s=RETRY_LATER_S)
