"""The bounded queue in front of the worker, and the care for the worker itself.

Everything here runs in the event loop, in callbacks that never wait: a request comes, an answer comes, a worker is
lost, a timer fires. So there are no locks, and at each moment at most one job is with the worker.
"""

import asyncio
import collections
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from zops.errors import ZopsError
from zops.events import Finished, Report, Warned, silent
from zops.serving.errors import ApiError
from zops.serving.link import WorkerLink
from zops.serving.messages import (
    PHASES,
    Cancel,
    Cancelled,
    Done,
    Entered,
    Failed,
    FromWorker,
    Job,
    Passed,
    Ready,
    StartFailed,
)
from zops.serving.metrics import Metrics
from zops.serving.request import Limits

# A worker gets this long to stop between two forwards before it is taken for hung and killed. It must stay below the
# grace that a runtime adds to request_timeout_s when it stops an instance (15 s).
CANCEL_GRACE_S = 5.0
BACKOFF_FIRST_S = 0.5
BACKOFF_LAST_S = 30.0
# Starts that fail in a row before the server gives up, so that whatever runs it sees that it cannot work.
MAX_FAILED_STARTS = 3
RETRY_LATER_S = 5.0


@dataclass(eq=False, slots=True)
class _Ticket:
    """A request between its arrival and its answer. Times are of `time.monotonic`."""

    job: Job
    future: "asyncio.Future[Outcome]"
    arrived: float
    started: float = 0.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the worker made of a job, and how long the job waited for it."""

    done: Done
    queue_s: float


@dataclass(slots=True)
class Status:
    """What /readyz tells of the worker. `phase` is one of `serving.app.READY_PHASES`."""

    phase: str = "starting"
    reason: str = "the worker is being started"
    phase_seconds: dict[str, float] = field(default_factory=dict)
    facts: Ready | None = None
    restarts: int = 0
    pid: int | None = None


class Scheduler:
    """Queues requests, gives them to the worker one by one, and replaces the worker when it dies or hangs."""

    def __init__(
        self,
        start_worker: Callable[[], WorkerLink],
        limits: Limits,
        metrics: Metrics,
        *,
        report: Report = silent,
        cancel_grace_s: float = CANCEL_GRACE_S,
    ) -> None:
        self.status = Status()
        self.draining = False
        self.gave_up: asyncio.Future[ZopsError] | None = None
        self._start_worker = start_worker
        self._limits = limits
        self._metrics = metrics
        self._report = report
        self._cancel_grace_s = cancel_grace_s
        self._waiting: collections.deque[_Ticket] = collections.deque()
        self._running: _Ticket | None = None
        self._link: WorkerLink | None = None
        self._start_timer: asyncio.TimerHandle | None = None
        self._hang_timer: asyncio.TimerHandle | None = None
        self._losses = 0
        self._failed_starts = 0
        self._killed_because = ""
        self._service_s = 1.0
        """Moving average of what one job takes; tells clients of a full queue when to come back."""
        self._idle = asyncio.Event()
        self._idle.set()

    # --- what the server and the app call

    def begin(self) -> None:
        """Start the first worker. To be called once, in the running event loop."""
        self.gave_up = asyncio.get_running_loop().create_future()
        self._start()

    async def generate(self, job: Job) -> Outcome:
        """Queue a job and wait for its images; cancelling this call cancels the job.

        Raises:
            ApiError: when the job is refused, fails, or is not done within the request timeout.
        """
        if self.draining:
            raise ApiError("draining", "the server is stopping", retry_after_s=RETRY_LATER_S)
        if self.status.phase != "ready":
            message = f"the server is not ready: {self.status.reason}"
            raise ApiError("not_ready", message, retry_after_s=RETRY_LATER_S)
        if len(self._waiting) >= self._limits.max_queue:
            message = f"{len(self._waiting)} requests are waiting already, the limit is {self._limits.max_queue}"
            wait_s = self._service_s * (len(self._waiting) + 1)
            raise ApiError("queue_full", message, param=None, retry_after_s=wait_s)
        ticket = _Ticket(job, asyncio.get_running_loop().create_future(), time.monotonic())
        self._waiting.append(ticket)
        self._dispatch()
        try:
            async with asyncio.timeout(self._limits.request_timeout_s):
                return await ticket.future
        except TimeoutError:
            message = f"the image was not finished within {self._limits.request_timeout_s:g} s"
            raise ApiError("deadline_exceeded", message) from None
        finally:
            self._abandon(ticket)

    def drain(self) -> None:
        """Take no new requests, refuse the waiting ones, let the running one finish."""
        self.draining = True
        self.status.reason = "the server is stopping"
        while self._waiting:
            self._fail(self._waiting.popleft(), ApiError("draining", "the server is stopping", retry_after_s=5))
        self._update_gauges()

    async def drained(self) -> None:
        """Wait until no job is with the worker."""
        await self._idle.wait()

    def close(self) -> None:
        """Let the worker go, and start no other one."""
        self.draining = True
        for timer in (self._start_timer, self._hang_timer):
            if timer:
                timer.cancel()
        if self._link:
            link, self._link = self._link, None
            link.close()

    @property
    def ready(self) -> bool:
        """Whether a new request would be taken (if the queue is not full)."""
        return self.status.phase == "ready" and not self.draining

    @property
    def waiting(self) -> int:
        """Requests that wait for the worker."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Requests that the worker works on: 0 or 1."""
        return int(self._running is not None)

    # --- the life of a job

    def _dispatch(self) -> None:
        if self._link and self.status.phase == "ready" and self._running is None and self._waiting:
            ticket = self._running = self._waiting.popleft()
            ticket.started = time.monotonic()
            self._idle.clear()
            self._link.send(ticket.job)
        self._update_gauges()

    def _abandon(self, ticket: _Ticket) -> None:
        """Nobody waits for this ticket any more; does nothing when it was answered."""
        if ticket in self._waiting:
            self._waiting.remove(ticket)
            self._update_gauges()
        elif ticket is self._running and self._link:
            self._link.send(Cancel(ticket.job.id))
            loop = asyncio.get_running_loop()
            self._hang_timer = loop.call_later(self._cancel_grace_s, self._kill, self._link, "hung")

    def _answered(self, message: Done | Failed | Cancelled) -> None:
        ticket = self._running
        if ticket is None or ticket.job.id != message.id:
            return
        self._release()
        now = time.monotonic()
        match message:
            case Done():
                self._losses = 0
                self._service_s += 0.2 * (now - ticket.started - self._service_s)
                if not ticket.future.done():
                    ticket.future.set_result(Outcome(message, ticket.started - ticket.arrived))
            case Failed():
                self._fail(ticket, ApiError(message.code, message.message, param=message.param))
            case Cancelled():
                pass  # whoever asked for it was answered when it was cancelled
        self._dispatch()

    def _release(self) -> None:
        self._running = None
        self._idle.set()
        if self._hang_timer:
            self._hang_timer.cancel()
            self._hang_timer = None

    @staticmethod
    def _fail(ticket: _Ticket, error: ApiError) -> None:
        if not ticket.future.done():
            ticket.future.set_exception(error)

    # --- the life of a worker

    def _start(self) -> None:
        if self.draining:
            return
        loop = asyncio.get_running_loop()
        self.status.phase, self.status.reason = "starting", "the worker is being started"
        self.status.phase_seconds = {}
        self._killed_because = ""
        link = self._link = self._start_worker()
        self.status.pid = link.pid
        link.listen(loop, self._received, self._lost)
        self._start_timer = loop.call_later(self._limits.startup_timeout_s, self._kill, link, "start-timeout")

    def _kill(self, link: WorkerLink, because: str) -> None:
        if link is self._link:
            self._killed_because = because
            link.kill()

    def _received(self, link: WorkerLink, message: FromWorker) -> None:
        if link is not self._link:
            return
        match message:
            case Entered(phase):
                self.status.phase, self.status.reason = phase, f"the worker is in phase {phase}"
            case Passed(phase, seconds):
                self.status.phase_seconds[phase] = round(seconds, 3)
                self._metrics.start_phase.labels(phase).set(seconds)
                self._report(Finished(phase, phase, seconds))
            case Ready():
                self._became_ready(message)
            case StartFailed():
                self.status.phase, self.status.reason = "failed", message.message
            case _:
                self._answered(message)

    def _became_ready(self, facts: Ready) -> None:
        if self._start_timer:
            self._start_timer.cancel()
        self._failed_starts = 0
        self.status.phase, self.status.reason, self.status.facts = "ready", "", facts
        self._metrics.tell_facts(facts)
        if facts.device == "cpu" and self._limits.default_size > 64:
            self._report(Warned("no GPU is visible: serving on the CPU, which takes minutes an image"))
        self._dispatch()

    def _lost(self, link: WorkerLink) -> None:
        """Answer for the lost worker and see to the next one."""
        if link is not self._link:
            return
        self._link = None
        self.status.pid = None
        if self._start_timer:
            self._start_timer.cancel()
        because = self._why_lost()
        if self._running:
            error = ApiError("worker_lost", "the worker was lost while it made the image", retry_after_s=RETRY_LATER_S)
            self._fail(self._running, error)
            self._release()
        self._losses += 1
        if self._failed_starts >= MAX_FAILED_STARTS:
            self._give_up()
            return
        delay_s = min(BACKOFF_LAST_S, BACKOFF_FIRST_S * 2 ** (self._losses - 1))
        if not self.draining:
            self.status.restarts += 1
            self._metrics.worker_restarts.labels(because).inc()
            self._report(Warned(f"the worker was lost ({self.status.reason}); another one starts in {delay_s:g} s"))
            asyncio.get_running_loop().call_later(delay_s, self._start)
        self._update_gauges()

    def _why_lost(self) -> str:
        """Set phase and reason after a loss and return the reason as a metric's label."""
        status = self.status
        was_ready = status.phase == "ready"
        if self._killed_because == "start-timeout":
            status.reason = f"it was not ready within {self._limits.startup_timeout_s:g} s (phase {status.phase})"
        elif self._killed_because == "hung":
            status.reason = "it did not answer within the request timeout and was killed"
        elif status.phase != "failed":
            status.reason = f"its process ended in phase {status.phase}"
        if not was_ready:
            self._failed_starts += 1
        because = self._killed_because or ("died" if was_ready else "start-failed")
        status.phase = "restarting" if was_ready else "failed"
        return because

    def _give_up(self) -> None:
        for ticket in self._waiting:
            self._fail(ticket, ApiError("not_ready", self.status.reason))
        self._waiting.clear()
        self._update_gauges()
        if self.gave_up and not self.gave_up.done():
            text = f"the worker failed to start {MAX_FAILED_STARTS} times in a row: {self.status.reason}"
            self.gave_up.set_result(ZopsError(text, code="worker-start-failed", hint="see the log above for the cause"))

    def _update_gauges(self) -> None:
        self._metrics.waiting.set(self.waiting)
        self._metrics.running.set(self.running)
        self._metrics.ready.set(int(self.ready))

    def snapshot(self) -> dict[str, Any]:
        """Return the state as /readyz shows it."""
        status, facts = self.status, self.status.facts
        return {
            "phase": "draining" if self.draining else status.phase,
            "reason": status.reason,
            "phases": {phase: status.phase_seconds.get(phase) for phase in PHASES},
            "device": facts.device if facts else None,
            "dtype": facts.dtype if facts else None,
            "versions": dict(facts.versions) if facts else {},
            "worker": {"pid": status.pid, "restarts": status.restarts},
            "queue": {"waiting": self.waiting, "running": self.running, "limit": self._limits.max_queue},
        }
