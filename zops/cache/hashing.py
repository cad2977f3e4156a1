"""Digests of many large files with all cores, in little memory, at the speed of the hash or of the disk.

One file's SHA-256 is sequential, so the cores share files, slice by slice: always the one of which most is left. They
end together, whatever the sizes. Each core has a thread that hashes, and one that reads ahead for it.
"""

import hashlib
import heapq
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal, NamedTuple

from zops.cache.reading import CHUNK, OpenFile, new_buffer
from zops.events import Report, task

Algorithm = Literal["sha256", "blake3"]
Stat = tuple[int, int, int]
Hashed = tuple[str, Stat]
"""SHA-256 in hex, and the file's `stat_key` taken before it was read."""

# hashlib releases the GIL for blocks of this size; more per call gains nothing measurable.
BLOCK = 1 << 20
# Buffers of `CHUNK` for each core: one is hashed, one is full, one is being filled.
BUFFERS = 3
# Slices that each core gets: the last one ends no later than the others by about one in so many parts.
SLICES = 64
SLICE_BYTES = 2 * CHUNK


class Stopped(BaseException):
    """Raised inside a worker thread that was told to end early; no error, hence no Exception."""


@dataclass(frozen=True, slots=True)
class Digests:
    """What a file's bytes hash to, in hex, by algorithm, and its `stat_key` from before they were read."""

    stat: Stat
    hex: Mapping[Algorithm, str]


def new_digest(algorithm: Algorithm) -> Any:
    """Return a new hash with `update` and `hexdigest`, both of which let other threads run."""
    if algorithm == "sha256":
        return hashlib.sha256()
    from blake3 import blake3  # noqa: PLC0415 - most commands need none

    return blake3(max_threads=1)


def sha256_file(path: Path, advance: Callable[[int], None] | None = None) -> str:
    """Return the SHA-256 of a file in hex; `advance` is told of each block's length."""
    digest = hashlib.sha256()
    buffer = bytearray(BLOCK)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as stream:
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        while count := stream.readinto(buffer):
            digest.update(view[:count])
            if advance:
                advance(count)
    return digest.hexdigest()


def git_sha1_file(path: Path) -> str:
    """Return the name that git gives a file with this content: SHA-1 over a header with its size, and the content."""
    digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as stream:
        while block := stream.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def hash_files(paths: Mapping[str, Path], report: Report, text: str) -> dict[str, Hashed | OSError]:
    """Return the SHA-256 of every file by its key, or why it could not be read."""
    found = digest_files(paths, ("sha256",), report, text)
    return {key: each if isinstance(each, OSError) else (each.hex["sha256"], each.stat) for key, each in found.items()}


def digest_files(
    paths: Mapping[str, Path], algorithms: Sequence[Algorithm], report: Report, text: str
) -> dict[str, Digests | OSError]:
    """Read every file once and return its digests by its key, or why it could not be read."""
    jobs = [_Job(path, algorithms, _size(path)) for path in paths.values()]
    cores = min(len(os.sched_getaffinity(0)), len(jobs))
    total = sum(job.left for job in jobs)
    slice_bytes = max(SLICE_BYTES, total // (max(1, cores) * SLICES) // CHUNK * CHUNK)
    schedule = _Schedule(jobs, slice_bytes, workers=cores)
    try:
        with task(report, "hash", text, total=total) as counter:
            works = [work for worker in range(cores) for work in _pair(schedule, worker, counter.advance)]
            _run_all(works, schedule)
    finally:
        for job in jobs:
            job.close()
    return {key: job.result for key, job in zip(paths, jobs, strict=True)}


def _run_all(works: Sequence[Callable[[], None]], schedule: "_Schedule") -> None:
    """Run each in a thread; when one raises or the caller is interrupted, end them all and raise that."""
    if not works:
        return
    pool = ThreadPoolExecutor(len(works), thread_name_prefix="hash")
    try:
        futures = [pool.submit(work) for work in works]
        wait(futures, return_when=FIRST_EXCEPTION)
    finally:
        schedule.end()
        pool.shutdown()
    for error in sorted((each.exception() for each in futures), key=lambda error: isinstance(error, Stopped)):
        if error is not None:
            raise error


@dataclass(slots=True, eq=False)
class _Job:
    """A file on its way through the hash; held by one worker at a time."""

    path: Path
    algorithms: Sequence[Algorithm]
    left: int
    """Bytes that nobody was given yet."""
    position: int = 0
    file: OpenFile | None = None
    stat: Stat = (0, 0, 0)
    error: OSError | None = None
    hashes: dict[Algorithm, Any] = field(default_factory=dict)

    def next_slice(self, slice_bytes: int) -> tuple[range, bool]:
        """Take the next bytes of what is left; return where they are, and whether the page cache has them.

        The first call opens the file and takes its size from there.
        """
        try:
            if self.file is None:
                self.file = OpenFile(self.path)
                self.stat, self.left = self.file.stat, self.file.size
                self.hashes = {algorithm: new_digest(algorithm) for algorithm in self.algorithms}
            begin, count = self.position, min(slice_bytes, self.left)
            self.position, self.left = begin + count, self.left - count
            return range(begin, self.position), self.file.is_cached(begin, self.position)
        except OSError as error:
            self.fail(error)
            return range(0), True

    def read(self, buffer: memoryview, part: range) -> memoryview:
        """Read a range from the disk; what was given up has no bytes."""
        try:
            return buffer[: self.file.from_disk(buffer, part.start, len(part)) if self.file and not self.error else 0]
        except OSError as error:
            self.fail(error)
            return buffer[:0]

    def update(self, views: Iterable[memoryview]) -> None:
        """Hash the next bytes."""
        try:
            for view in views:
                for value in self.hashes.values():
                    value.update(view)
        except OSError as error:
            self.fail(error)

    def fail(self, error: OSError) -> None:
        """Give the file up."""
        self.error, self.left = error, 0

    def close(self) -> None:
        """Close the file; may be called twice."""
        if self.file:
            self.file.close()
            self.file = None

    @property
    def result(self) -> Digests | OSError:
        if self.error is not None:
            return self.error
        return Digests(self.stat, {algorithm: value.hexdigest() for algorithm, value in self.hashes.items()})


class _Schedule:
    """Hands out files, always the one of which most is left, and none to two workers at once.

    A worker reads ahead, so it may hold several; but never one that another worker stands idle for.
    """

    def __init__(self, jobs: Sequence[_Job], slice_bytes: int, *, workers: int) -> None:
        self.slice_bytes = slice_bytes
        self.ended = False
        self._changed = threading.Condition()
        self._held = [0] * workers
        self._order = {job: number for number, job in enumerate(jobs)}
        self._idle = [(-job.left, number, job) for job, number in self._order.items()]
        heapq.heapify(self._idle)

    def take(self, worker: int) -> _Job | None:
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

    def give_back(self, job: _Job, worker: int) -> None:
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
    """What a reader hands to its hasher: bytes of a file or, without `content`, a range to take from the page cache."""

    job: _Job
    part: range
    last: bool
    buffer: memoryview
    content: memoryview | None

    def views(self) -> Iterable[memoryview]:
        """Return the bytes, view by view."""
        if self.content is not None or self.job.file is None:
            return (self.content,) if self.content else ()
        return self.job.file.from_cache(self.buffer, self.part.start, self.part.stop)


_Buffers = SimpleQueue[memoryview | None]
_Pieces = SimpleQueue[_Piece | None]


def _pair(
    schedule: _Schedule, worker: int, advance: Callable[[int], None]
) -> tuple[Callable[[], None], Callable[[], None]]:
    """Return the work of two threads: one that reads ahead, and one that hashes what it brings."""
    free: _Buffers = SimpleQueue()
    filled: _Pieces = SimpleQueue()
    for _ in range(BUFFERS):
        free.put(new_buffer())
    return lambda: _read(schedule, worker, free, filled), lambda: _hash(schedule, worker, free, filled, advance)


def _read(schedule: _Schedule, worker: int, free: _Buffers, filled: _Pieces) -> None:
    try:
        while job := schedule.take(worker):
            part, cached = job.next_slice(schedule.slice_bytes)
            step = max(1, len(part)) if cached else CHUNK
            for start in range(part.start, max(part.stop, part.start + 1), step):
                piece = range(start, min(start + step, part.stop))
                buffer = free.get()
                if buffer is None:
                    return
                content = None if cached else job.read(buffer, piece)
                filled.put(_Piece(job, piece, piece.stop == part.stop, buffer, content))
    finally:
        filled.put(None)


def _hash(schedule: _Schedule, worker: int, free: _Buffers, filled: _Pieces, advance: Callable[[int], None]) -> None:
    try:
        while piece := filled.get():
            if schedule.ended:
                raise Stopped
            piece.job.update(piece.views())
            advance(len(piece.part))
            if piece.last:
                schedule.give_back(piece.job, worker)
            free.put(piece.buffer)
    finally:
        free.put(None)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def total_size(paths: Iterable[Path]) -> int:
    """Return the bytes of all files that exist."""
    return sum(_size(path) for path in paths)
