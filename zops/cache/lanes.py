"""Work on several large files with all cores, in little memory: each core has a lane, which takes slices of files.

What is done with a file's bytes is sequential (a hash), so the cores share files, slice by slice: always the one of
which most is left. They end together, whatever the sizes. A lane has one thread that works and one that reads ahead.
"""

import heapq
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from queue import SimpleQueue
from typing import Generic, NamedTuple, Protocol, TypeVar

from zops.cache.reading import CHUNK, new_buffer

# Buffers for each lane: one is worked on, one is full, one is being filled.
BUFFERS = 3


class Stopped(BaseException):
    """Raised inside a worker thread that was told to end early; no error, hence no Exception."""


class Job(Protocol):
    """A file on its way; held by one lane at a time, and used by two threads of it: one reads, one works.

    Attributes:
        left: bytes that no lane was given yet.
    """

    left: int

    def next_slice(self, slice_bytes: int) -> tuple[range, bool]:
        """Take the next bytes of what is left.

        Returns:
            Where they are, and whether they are at hand: then all of them come to `use` as one, and are not read.
        """

    def read(self, buffer: memoryview, part: range) -> memoryview:
        """Bring a part into a buffer and return it; called in order, ahead of `use`."""

    def use(self, buffer: memoryview, part: range, content: memoryview | None) -> None:
        """Work on a part: what was read of it or, with None, what is at hand; called in order."""

    def close(self) -> None:
        """Let go of everything; called when nothing is left, and perhaps again."""


AnyJob = TypeVar("AnyJob", bound=Job)


def run_jobs(
    jobs: Sequence[Job],
    advance: Callable[[int], None],
    *,
    lanes: int,
    slice_bytes: int,
    chunk: int = CHUNK,
    beside: Sequence[Callable[[], None]] = (),
) -> None:
    """Work through all jobs; when anything raises or the caller is interrupted, end them all and raise that.

    Args:
        jobs: what there is to do; all are closed at the end.
        advance: is told of the bytes that were used.
        lanes: how many jobs go on at a time.
        slice_bytes: how much of a job a lane takes at a time, a multiple of `chunk`.
        chunk: size of a buffer; each lane has three.
        beside: other work, each with a thread of its own.
    """
    schedule = Schedule(jobs, slice_bytes, workers=lanes)
    try:
        works = [work for lane in range(lanes) for work in _pair(schedule, lane, chunk, advance)]
        _run_all([*works, *beside], schedule)
    finally:
        for job in jobs:
            job.close()


def _run_all(works: Sequence[Callable[[], None]], schedule: "Schedule[Job]") -> None:
    """Run each in a thread; when one raises or the caller is interrupted, end them all and raise that."""
    if not works:
        return
    pool = ThreadPoolExecutor(len(works), thread_name_prefix="lane")
    try:
        futures = [pool.submit(work) for work in works]
        wait(futures, return_when=FIRST_EXCEPTION)
    finally:
        schedule.end()
        pool.shutdown()
    for error in sorted((each.exception() for each in futures), key=lambda error: isinstance(error, Stopped)):
        if error is not None:
            raise error


class Schedule(Generic[AnyJob]):
    """Hands out files, always the one of which most is left, and none to two workers at once.

    A worker reads ahead, so it may hold several; but never one that another worker stands idle for.
    """

    def __init__(self, jobs: Sequence[AnyJob], slice_bytes: int, *, workers: int) -> None:
        self.slice_bytes = slice_bytes
        self.ended = False
        self._changed = threading.Condition()
        self._held = [0] * workers
        self._order = {job: number for number, job in enumerate(jobs)}
        self._idle = [(-job.left, number, job) for job, number in self._order.items()]
        heapq.heapify(self._idle)

    def take(self, worker: int) -> AnyJob | None:
        """Return the file to go on with, waiting while others hold or need all; None when nothing is left."""
        with self._changed:
            while not self.ended and (self._idle or any(self._held)) and not self._may_take(worker):
                self._changed.wait()
            if self.ended or not self._idle:
                return None
            self._held[worker] += 1
            self._changed.notify_all()
            return heapq.heappop(self._idle)[-1]

    def _may_take(self, worker: int) -> bool:
        idle_workers = self._held.count(0)
        return len(self._idle) > (idle_workers if self._held[worker] else 0)

    def give_back(self, job: AnyJob, worker: int) -> None:
        """Let others go on with a file."""
        with self._changed:
            self._held[worker] -= 1
            if not job.left:
                job.close()
            else:
                heapq.heappush(self._idle, (-job.left, self._order[job], job))
            self._changed.notify_all()

    def end(self) -> None:
        """Hand out nothing more, whatever is left."""
        with self._changed:
            self.ended = True
            self._changed.notify_all()


class _Piece(NamedTuple):
    """What a lane's reader hands on: a part of a job and, unless it is at hand anyway, its bytes in a buffer."""

    job: Job
    part: range
    last: bool
    buffer: memoryview
    content: memoryview | None


_Buffers = SimpleQueue[memoryview | None]
_Pieces = SimpleQueue[_Piece | None]


def _pair(
    schedule: Schedule[Job], lane: int, chunk: int, advance: Callable[[int], None]
) -> tuple[Callable[[], None], Callable[[], None]]:
    """Return the work of two threads: one that reads ahead, and one that uses what it brings."""
    free: _Buffers = SimpleQueue()
    filled: _Pieces = SimpleQueue()
    for _ in range(BUFFERS):
        free.put(new_buffer(chunk))
    return lambda: _read(schedule, lane, chunk, free, filled), lambda: _use(schedule, lane, free, filled, advance)


def _read(schedule: Schedule[Job], lane: int, chunk: int, free: _Buffers, filled: _Pieces) -> None:
    try:
        while job := schedule.take(lane):
            part, at_hand = job.next_slice(schedule.slice_bytes)
            step = max(1, len(part)) if at_hand else chunk
            for start in range(part.start, max(part.stop, part.start + 1), step):
                piece = range(start, min(start + step, part.stop))
                buffer = free.get()
                if buffer is None:
                    return
                content = None if at_hand else job.read(buffer, piece)
                filled.put(_Piece(job, piece, piece.stop == part.stop, buffer, content))
    finally:
        filled.put(None)


def _use(schedule: Schedule[Job], lane: int, free: _Buffers, filled: _Pieces, advance: Callable[[int], None]) -> None:
    try:
        while piece := filled.get():
            if schedule.ended:
                raise Stopped
            piece.job.use(piece.buffer, piece.part, piece.content)
            advance(len(piece.part))
            if piece.last:
                schedule.give_back(piece.job, lane)
            free.put(piece.buffer)
    finally:
        free.put(None)
