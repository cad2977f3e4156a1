"""The life of one worker: start, watch, kill, start again after a pause.

Everything runs in callbacks of the event loop that never wait. What a worker works on is the scheduler's business; a
worker here only knows that it has a batch, since when it made no progress, and until when it must be done.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from zops.serving.link import WorkerLink
from zops.serving.messages import (
    PHASES,
    Batch,
    Beat,
    Entered,
    FromWorker,
    Noticed,
    Passed,
    Ready,
    Shape,
    StartFailed,
    ToWorker,
)
from zops.serving.metrics import Metrics

# Phases of a worker, from the one that is furthest from an image on; the server as a whole is as far as the furthest.
WORKER_PHASES = ("failed", "restarting", "starting", *PHASES, "ready")
# How many shapes whose batches did not fit a worker remembers.
_REMEMBERED_SHAPES = 256


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a worker is waited for, in seconds."""

    silent_s: float = 5.0
    """Without a `Beat` of a ready worker: it is stopped, or something holds its interpreter's lock."""
    silent_start_s: float = 60.0
    """The same while it starts: an import from a cold disk holds the lock for long."""
    stalled_s: float = 60.0
    """Without a forward, on a GPU: a new batch size may compile for 47 s (one H200). A CPU may take longer."""
    overdue_s: float = 5.0
    """Beyond the deadline of what it makes. Must stay below the grace that a runtime adds to
    `serve.request_timeout_s` when it stops an instance (15 s)."""
    pause_s: float = 0.5
    """Before the first new start; doubled with each loss until a picture was made."""
    longest_pause_s: float = 30.0
    failed_starts: int = 3
    """In a row, of every worker, until the server gives up, so that whatever runs it sees that it cannot work."""


class Watchdog:
    """Calls back when it was not fed for a while. Feeding costs no more than reading the clock."""

    # A timer this late says that the event loop itself was held up: what came meanwhile is still to be read.
    _LATE_S = 1.0

    def __init__(self, limit_s: float, on_starved: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._limit_s = limit_s
        self._on_starved = on_starved
        self._fed = self._loop.time()
        self._timer = self._loop.call_at(self._fed + limit_s, self._look)

    def feed(self) -> None:
        """Start the time anew."""
        self._fed = self._loop.time()

    def stop(self) -> None:
        """Never call back."""
        self._timer.cancel()

    def _look(self) -> None:
        now = self._loop.time()
        if now - self._timer.when() > self._LATE_S:
            self._fed = now
        if now >= self._fed + self._limit_s:
            self._on_starved()
        else:
            self._timer = self._loop.call_at(self._fed + self._limit_s, self._look)


class Owner(Protocol):
    """Who gives a worker its work, and is told of what becomes of it."""

    def became_ready(self, worker: "Worker") -> None:
        """Take note that the worker takes batches now."""
        ...

    def received(self, worker: "Worker", message: FromWorker) -> None:
        """Take what a ready worker says."""
        ...

    def was_lost(self, worker: "Worker") -> None:
        """Take note that the worker is gone with all that it had; its `batch` still tells what."""
        ...


class Care(Protocol):
    """Who keeps workers on their seats."""

    patience: Patience
    startup_timeout_s: float
    metrics: Metrics

    def passed(self, worker: "Worker", phase: str, seconds: float) -> None:
        """Take note of how long a phase of a start took."""
        ...

    def noticed(self, worker: "Worker", text: str) -> None:
        """Tell the operator what a worker noticed in its start."""
        ...

    def lost(self, worker: "Worker", because: str) -> None:
        """See to the seat of a lost worker; `because` is a label of the metrics."""
        ...


class Worker:
    """One seat: the workers that sit on it, one after another, and what is known of the present one."""

    def __init__(self, index: int, start: Callable[[], WorkerLink], owner: Owner, care: "Care") -> None:
        self.index = index
        self.phase = "starting"
        self.reason = "it is being started"
        self.phase_seconds: dict[str, float] = {}
        self.facts: Ready | None = None
        self.restarts = 0
        self.failed_starts = 0
        self.pid: int | None = None
        self.batch: Batch | None = None
        self.freed_at = 0.0
        """When it last became idle."""
        self.fits: dict[Shape, int] = {}
        """Largest batches that fit into memory, of shapes of which a larger one did not."""
        self.beat = Beat(None, 0)
        self._start_link = start
        self._care = care
        self._owner = owner
        self._link: WorkerLink | None = None
        self._losses = 0
        self._killed_because = ""
        self._timer: asyncio.TimerHandle | None = None
        """Ends a start that takes too long, a pause before a start, or a batch past its deadline."""
        self._silence: Watchdog | None = None
        self._stall: Watchdog | None = None

    # --- what the scheduler calls

    @property
    def ready(self) -> bool:
        """Whether it is loaded and alive."""
        return self.phase == "ready"

    @property
    def idle(self) -> bool:
        """Whether it would take a batch now."""
        return self.ready and self.batch is None

    @property
    def alive(self) -> bool:
        """Whether there is a process, ready or not."""
        return self._link is not None

    def make(self, batch: Batch, *, deadline: float) -> None:
        """Give it a batch. It is killed when it has not answered a while after `deadline`, on the loop's clock."""
        self.batch = batch
        loop, patience = asyncio.get_running_loop(), self._care.patience
        self._set_timer(loop.call_at(deadline + patience.overdue_s, self._kill, "hung"))
        if self.facts and self.facts.device != "cpu":
            self._stall = Watchdog(patience.stalled_s, lambda: self._kill("stalled"))
        self.send(batch)

    def send(self, message: ToWorker) -> None:
        """Hand it a message, if there is still somebody to take it."""
        if self._link:
            self._link.send(message)

    def free(self, fits: int | None) -> None:
        """Note that its batch is over, and how many of its pictures fit into memory at once."""
        if self.batch and fits is not None:
            if len(self.fits) >= _REMEMBERED_SHAPES:
                self.fits.clear()
            self.fits[self.batch.shape] = fits
        self._release()

    def succeeded(self) -> None:
        """Note that it made a picture: earlier losses are forgiven."""
        self._losses = 0

    def snapshot(self) -> dict[str, Any]:
        """Return its state as /readyz shows it."""
        return {
            "index": self.index,
            "pid": self.pid,
            "phase": self.phase,
            "reason": self.reason,
            "restarts": self.restarts,
            "device": self.facts.device if self.facts else None,
            "running": len(self.batch.pictures) if self.batch else 0,
            "forwards": self.beat.forwards if self.batch and self.beat.batch == self.batch.id else 0,
            "memory_used": sum(used for used, _ in self.beat.memory) if self.beat.memory else None,
            "memory_total": sum(total for _, total in self.beat.memory) if self.beat.memory else None,
            "cards": [{"memory_used": used, "memory_total": total} for used, total in self.beat.memory],
        }

    # --- its life

    def start(self) -> None:
        """Start a process."""
        self.phase, self.reason = "starting", "it is being started"
        self.phase_seconds, self.facts, self.beat = {}, None, Beat(None, 0)
        self.fits.clear()
        self._killed_because = ""
        link = self._link = self._start_link()
        self.pid = link.pid
        loop = asyncio.get_running_loop()
        link.listen(loop, self._received, self._lost)
        self._set_timer(loop.call_later(self._care.startup_timeout_s, self._kill, "start-timeout"))

    def leave(self) -> WorkerLink | None:
        """Forget the process, if there is one, and return the link to be closed."""
        link, self._link, self.pid = self._link, None, None
        self._stop_watching()
        return link

    def _kill(self, because: str) -> None:
        if self._link:
            self._killed_because = because
            self._link.kill()

    def _received(self, message: FromWorker) -> None:
        if self._link is None:
            return
        if self._silence:
            self._silence.feed()
        match message:
            case Beat():
                self._beat(message)
            case Entered(phase):
                # Phases overlap; the furthest one tells most.
                if WORKER_PHASES.index(phase) > WORKER_PHASES.index(self.phase):
                    self.phase, self.reason = phase, f"it is in phase {phase}"
            case Passed(phase, seconds):
                self.phase_seconds[phase] = round(seconds, 3)
                self._care.passed(self, phase, seconds)
            case Ready():
                self._become_ready(message)
            case Noticed(text):
                self._care.noticed(self, text)
            case StartFailed():
                self.phase, self.reason = "failed", message.message
        self._owner.received(self, message)

    def _beat(self, beat: Beat) -> None:
        if self._silence is None:
            self._watch_silence(self._care.patience.silent_start_s)
        if self._stall and (beat.batch, beat.forwards) != (self.beat.batch, self.beat.forwards):
            self._stall.feed()
        self.beat = beat
        self._care.metrics.tell_memory(self.index, beat.memory)

    def _become_ready(self, facts: Ready) -> None:
        self._set_timer(None)
        self._watch_silence(self._care.patience.silent_s)
        self.failed_starts = 0
        self.freed_at = asyncio.get_running_loop().time()
        self.phase, self.reason, self.facts = "ready", "", facts
        self._owner.became_ready(self)

    def _lost(self) -> None:
        link = self.leave()
        if link is None:
            return
        because = self._explain_loss(link)
        self._losses += 1
        self._owner.was_lost(self)
        self._release()
        self._care.lost(self, because)

    def start_again(self) -> float:
        """Start another process after a pause, whose seconds are returned."""
        patience = self._care.patience
        pause_s: float = min(patience.longest_pause_s, patience.pause_s * 2 ** min(self._losses - 1, 16))
        self.restarts += 1
        self._set_timer(asyncio.get_running_loop().call_later(pause_s, self.start))
        return pause_s

    def _explain_loss(self, link: WorkerLink) -> str:
        """Set phase and reason after a loss, and return the reason as a metric's label."""
        patience, was_ready = self._care.patience, self.ready
        texts = {
            "start-timeout": f"it was not ready within {self._care.startup_timeout_s:g} s (phase {self.phase})",
            "hung": "it did not answer within the request timeout and was killed",
            "stalled": f"it made no forward for {patience.stalled_s:g} s and was killed",
            "silent": f"it gave no sign of life for {patience.silent_s:g} s and was killed",
        }
        if self._killed_because:
            self.reason = texts[self._killed_because]
        elif self.phase != "failed":
            self.reason = f"{link.ending or 'its process ended'} in phase {self.phase}"
        if not was_ready:
            self.failed_starts += 1
        self.phase = "restarting" if was_ready else "failed"
        return self._killed_because or ("died" if was_ready else "start-failed")

    def _release(self) -> None:
        self.batch = None
        self.freed_at = asyncio.get_running_loop().time()
        self._set_timer(None)
        if self._stall:
            self._stall.stop()
            self._stall = None

    def _watch_silence(self, limit_s: float) -> None:
        if self._silence:
            self._silence.stop()
        self._silence = Watchdog(limit_s, lambda: self._kill("silent"))

    def _set_timer(self, timer: asyncio.TimerHandle | None) -> None:
        if self._timer:
            self._timer.cancel()
        self._timer = timer

    def _stop_watching(self) -> None:
        self._set_timer(None)
        for watchdog in (self._silence, self._stall):
            if watchdog:
                watchdog.stop()
        self._silence = self._stall = None
