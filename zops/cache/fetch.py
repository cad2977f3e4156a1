"""Bringing files from a source into a staging directory: over several connections, with patience, hashed on arrival.

A large file comes in ranges over several connections at once where the source can give ranges, everything else in one
stream each. A file ends once: as right, or with the failure that its last attempt met.
"""

import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from zops.cache import ranges
from zops.cache.arrival import accept
from zops.cache.hashing import Hashed
from zops.cache.hubs import Advance, HubFailure, Listed, RangesIgnored, Span, Take
from zops.cache.lanes import Stopped
from zops.errors import SourceFailed, ZopsError
from zops.events import Finished, Progressed, Report, Started, Task, Warned, task

if TYPE_CHECKING:
    import tenacity

CONNECTIONS = 8
# Attempts in a row that bring no byte. One that brings some starts the count anew: a bad line is slow, not dead.
ATTEMPTS = 4
FIRST_WAIT_S = 0.5
LONGEST_WAIT_S = 60.0
# A hub may ask for longer pauses than we would make by ourselves, but not for any.
LONGEST_ASKED_S = 3600.0
# Shorter pauses are over before anybody could read of them.
NOTABLE_WAIT_S = 5.0
# A connection that brings less is dead, whatever its socket says: ModelScope's SDK draws the line there too.
SLOWEST_BYTES_S = 1024
SLOW_WINDOW_S = 60.0
# How long threads may take to notice that they were stopped, before the lock is given up without them.
GRACE_S = 2.0
# Smaller files are done before anybody could read their line.
OWN_BAR_BYTES = 8_000_000
# Progress is told in steps of this size; a connection brings some kilobytes at a time.
TOLD_BYTES = 1 << 20
TOLD_S = 0.1


@dataclass(frozen=True, slots=True)
class Delivery:
    """How a source brings files; every call is one attempt and raises `HubFailure`.

    Attributes:
        whole: brings a file to a path, going on where an earlier attempt stopped where the source can.
        span: gives the bytes of a range, in order, to whoever takes them; None where the source has whole files only.
        fickle: whether another attempt may bring other bytes, as over a network.
    """

    whole: Callable[[Listed, Path, Advance], None]
    span: Callable[[Listed, Span, Take], None] | None = None
    fickle: bool = True


def patiently(
    attempt: Callable[[], None], *, moved: Callable[[], bool], wait: Callable[[float, HubFailure], None]
) -> None:
    """Repeat an attempt while it is worth it.

    Args:
        attempt: what to do; raises `HubFailure`.
        moved: whether the last attempt got further than the ones before.
        wait: waits that many seconds because of that failure, or raises to give up.

    Raises:
        HubFailure: the last one.
    """
    import tenacity  # noqa: PLC0415 - it brings asyncio, which only those who fetch need to pay for

    idle = 0
    last = HubFailure("")

    def enough(_state: object) -> bool:
        nonlocal idle
        idle = 0 if moved() else idle + 1
        return idle >= ATTEMPTS

    def pause(state: "tenacity.RetryCallState") -> float:
        nonlocal last
        failure = state.outcome.exception() if state.outcome else None
        assert isinstance(failure, HubFailure)
        last = failure
        return pause_after(failure, idle)

    tenacity.Retrying(
        retry=tenacity.retry_if_exception(lambda error: isinstance(error, HubFailure) and not error.final),
        stop=enough,
        wait=pause,
        sleep=lambda seconds: wait(seconds, last),
        reraise=True,
    )(attempt)


def pause_after(failure: HubFailure, idle: int) -> float:
    """Return the seconds to wait after a failure: what the hub asks for, else longer each time nothing came."""
    if failure.retry_after_s is not None:
        return min(failure.retry_after_s, LONGEST_ASKED_S)
    return min(FIRST_WAIT_S * float(2**idle), LONGEST_WAIT_S)


def tell_pause(report: Report, what: str, seconds: float, failure: HubFailure) -> None:
    """Report a pause that is long enough to be noticed."""
    if seconds >= NOTABLE_WAIT_S:
        report(Warned(f"{what}: {failure.text}; trying again in {seconds:.0f} s"))


class _Run:
    """What the connections of one `fetch` share: the work to do, and what became of each file."""

    def __init__(
        self, delivery: Delivery, staging: Path, counter: Task, report: Report, arrived: Callable[[str, Hashed], None]
    ) -> None:
        self.delivery = delivery
        self.staging = staging
        self.counter = counter
        self.report = report
        self.arrived = arrived
        self.todo: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.ended: queue.SimpleQueue[tuple[str, BaseException | None]] = queue.SimpleQueue()
        self.stop = threading.Event()

    def work(self) -> None:
        """Do what is to be done until told that nothing is left."""
        while (unit := self.todo.get()) is not None and not self.stop.is_set():
            try:
                unit()
            except Stopped:
                pass
            except BaseException as error:  # noqa: BLE001 - carried to the calling thread, which raises it
                self.ended.put(("", error))


def fetch(
    delivery: Delivery,
    files: Sequence[Listed],
    staging: Path,
    report: Report,
    *,
    arrived: Callable[[str, Hashed], None],
) -> None:
    """Bring every file to its path under `staging` and hash it; `arrived` is told of each that is right.

    Raises:
        SourceFailed: naming every file that could not be had, after all others were.
        HostShort: when the disk is full or read-only.
    """
    if not files:
        return
    failures: dict[str, HubFailure] = {}
    text = f"fetching {len(files)} file(s)"
    with task(report, "fetch", text, total=sum(file.size for file in files)) as counter:
        run = _Run(delivery, staging, counter, report, arrived)
        for file in sorted(files, key=lambda file: -file.size):
            _Job(run, file).enqueue()
        # Daemons: a thread that hangs in a dead connection must not keep an interrupted zops from ending.
        threads = [threading.Thread(target=run.work, name="fetch", daemon=True) for _ in range(CONNECTIONS)]
        for thread in threads:
            thread.start()
        try:
            for _ in files:
                path, error = run.ended.get()
                if isinstance(error, HubFailure):
                    failures[path] = error
                elif error is not None:
                    raise error
        finally:
            run.stop.set()
            for _ in threads:
                run.todo.put(None)
            deadline = time.monotonic() + GRACE_S
            for thread in threads:
                thread.join(max(0.0, deadline - time.monotonic()))
        if failures:
            raise _undelivered(failures, len(files))


class _Job:
    """One file on its way."""

    def __init__(self, run: _Run, file: Listed) -> None:
        self._run = run
        self._file = file
        self._target = run.staging / file.path
        self._target.parent.mkdir(parents=True, exist_ok=True)
        self._partial = ranges.Partial(file, self._target)
        self._lock = threading.Lock()
        self._counted = 0
        self._untold = 0
        self._told_at = 0.0
        self._began = 0.0
        self._rounds = 0
        self._left = 0
        """Ranges that no thread is through with; the last one decides what becomes of the file."""
        self._failure: HubFailure | None = None

    def enqueue(self) -> None:
        """Give the connections what is to be done for this file."""
        if self._run.delivery.span is None or not ranges.in_ranges(self._file):
            self._run.todo.put(self._bring_whole)
            return
        spans = self._partial.open()
        self._count(self._partial.size_done - self._counted)
        # At least one, which finds nothing to fetch, so that a file that is complete is hashed too.
        spans = spans or [(self._file.size, self._file.size)]
        self._left = len(spans)
        for span in spans:
            self._run.todo.put(_bound(self._bring_span, span))

    # --- in one stream

    def _bring_whole(self) -> None:
        furthest = 0

        def attempt() -> None:
            self._count(-self._counted)
            self._run.delivery.whole(self._file, self._target, self._advance)
            try:
                hashed = accept(self._file, self._target)
            except HubFailure as failure:
                raise HubFailure(failure.text, final=not self._run.delivery.fickle) from failure
            self._run.arrived(self._file.path, hashed)

        def moved() -> bool:
            nonlocal furthest
            further, furthest = self._counted > furthest, max(furthest, self._counted)
            return further and self._counted < self._file.size

        self._begin()
        try:
            patiently(attempt, moved=moved, wait=self._wait)
        except HubFailure as failure:
            self._end(failure)
        else:
            self._end(None)

    # --- in ranges

    def _bring_span(self, span: Span) -> None:
        self._begin()
        try:
            if span[0] < span[1] and self._failure is None:
                self._fill(span)
                self._partial.complete(span)
        except HubFailure as failure:
            # What a sibling met is as good a reason; that ranges are ignored counts for more than all others.
            if self._failure is None or isinstance(failure, RangesIgnored):
                self._failure = failure
        finally:
            with self._lock:
                self._left -= 1
                last = self._left == 0
            if last:
                self._conclude()

    def _fill(self, span: Span) -> None:
        at, furthest, slow = span[0], span[0], False
        deliver = self._run.delivery.span
        assert deliver is not None

        def attempt() -> None:
            nonlocal slow
            slow, began, begun_at = False, time.monotonic(), at

            def take(block: bytes) -> None:
                nonlocal at, slow
                block = block[: span[1] - at]
                self._partial.write(at, block)
                at += len(block)
                self._advance(len(block))
                seconds = time.monotonic() - began
                slow = at < span[1] and seconds > SLOW_WINDOW_S and (at - begun_at) / seconds < SLOWEST_BYTES_S
                if slow:
                    raise HubFailure(f"less than {SLOWEST_BYTES_S} bytes a second came")

            self._check()
            if at < span[1]:  # else the last attempt failed behind the last byte
                deliver(self._file, (at, span[1]), take)
            if at < span[1]:
                raise HubFailure(f"{span[1] - at} bytes of a range did not come")

        def moved() -> bool:
            nonlocal furthest
            further, furthest = at > furthest, at
            return further and not slow

        patiently(attempt, moved=moved, wait=self._wait)

    def _conclude(self) -> None:
        """Decide what becomes of the file, after no thread writes it any more."""
        if isinstance(self._failure, RangesIgnored):
            self._partial.discard()
            self._count(-self._counted)
            self._failure = None
            self._run.todo.put(self._bring_whole)
        elif self._failure is not None:
            self._partial.close()
            self._end(self._failure)
        elif self._partial.size_done < self._file.size:
            self._partial.close()  # stopped, or crashed: somebody else tells
        else:
            self._partial.finish()
            self._judge()

    def _judge(self) -> None:
        """Hash the file whose ranges are all there; a wrong one is fetched again, for no range can be blamed."""
        try:
            self._run.arrived(self._file.path, accept(self._file, self._target))
        except HubFailure as failure:
            self._rounds += 1
            if self._rounds >= ATTEMPTS:
                self._end(failure)
                return
            self._wait(pause_after(failure, self._rounds - 1), failure)
            self.enqueue()
        else:
            self._end(None)

    # --- progress and end

    def _begin(self) -> None:
        with self._lock:
            first, self._began = not self._began, self._began or time.monotonic()
        if first and self._file.size >= OWN_BAR_BYTES:
            self._run.report(Started(self._file.path, self._file.path, self._file.size))
            self._tell()

    def _check(self) -> None:
        # With another failure the ranges in flight are brought to their end, for the next run needs them too.
        if self._run.stop.is_set() or isinstance(self._failure, RangesIgnored):
            raise Stopped

    def _advance(self, count: int) -> None:
        self._check()
        self._count(count)

    def _count(self, count: int) -> None:
        with self._lock:
            self._counted += count
            self._untold += count
            now = time.monotonic()
            if abs(self._untold) < TOLD_BYTES and now - self._told_at < TOLD_S and self._counted < self._file.size:
                return
            untold, self._untold, self._told_at = self._untold, 0, now
        self._run.counter.advance(untold)
        self._tell()

    def _tell(self) -> None:
        if self._began and self._file.size >= OWN_BAR_BYTES:
            self._run.report(Progressed(self._file.path, self._counted, self._file.size))

    def _wait(self, seconds: float, failure: HubFailure) -> None:
        tell_pause(self._run.report, self._file.path, seconds, failure)
        if self._run.stop.wait(seconds):
            raise Stopped

    def _end(self, failure: HubFailure | None) -> None:
        if failure is None:
            self._count(self._file.size - self._counted)
            if self._file.size >= OWN_BAR_BYTES:
                self._run.report(Finished(self._file.path, self._file.path, time.monotonic() - self._began))
        self._run.ended.put((self._file.path, failure))


def _bound(bring: Callable[[Span], None], span: Span) -> Callable[[], None]:
    return lambda: bring(span)


def _undelivered(failures: dict[str, HubFailure], total: int) -> ZopsError:
    shown = "; ".join(f"{path}: {failure.text}" for path, failure in list(failures.items())[:3])
    more = f"; and {len(failures) - 3} more" if len(failures) > 3 else ""
    return SourceFailed(
        f"{len(failures)} of {total} file(s) could not be fetched: {shown}{more}",
        code="source-files-failed",
        hint="what arrived is kept; run the same command again to go on",
        files={path: failure.text for path, failure in failures.items()},
    )
