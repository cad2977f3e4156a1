"""The way of an archive's bytes: each is read once, hashed beside being compressed, and written in order.

Reading, hashing and writing have a thread each, compressing has one for every core. They are joined by futures, so that
an error anywhere comes out in order, and whatever waits for it ends with it. Data lies in a few buffers that are used
again and again; their number bounds the memory, whatever the size.
"""

import ctypes
import hashlib
import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

from zops.archive.format import CHUNK, Frame
from zops.archive.frames import crc32
from zops.archive.pieces import Piece
from zops.archive.plan import Source
from zops.archive.sinks import Sink
from zops.cache.manifest import Finding, Status, damaged
from zops.cache.reading import OpenFile, new_buffer
from zops.errors import SnapshotDamaged

Pack = Callable[[memoryview], bytes]

BUFFERS_STORED = 5
BUFFERS_PACKED = 8
# Numbers of mallopt(3) (malloc.h), and what keeps frames of some MiB in one heap that does not shrink.
_HEAP = {-8: 1, -3: 32 << 20, -1: 256 << 20}  # M_ARENA_MAX, M_MMAP_THRESHOLD, M_TRIM_THRESHOLD


@dataclass(frozen=True, slots=True)
class Done:
    """A piece that was handed to the sink: the frame it became, and the file's SHA-256 when it was its last."""

    piece: Piece
    frame: Frame
    sha256: str = ""


class Pace:
    """Keeps work down to so many bytes a second, on average."""

    def __init__(self, limit: float | None) -> None:
        self._limit = limit
        self._done = 0
        self._began = time.monotonic()

    def wait(self, count: int) -> None:
        """Wait until `count` more bytes may go on."""
        if self._limit is None:
            return
        delay = self._began + self._done / self._limit - time.monotonic()
        self._done += count
        if delay > 0:
            time.sleep(delay)


class _Reading:
    """A file while it is read, by one thread, and hashed, by another."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self._file: OpenFile | None = None
        self._hash = hashlib.sha256()

    def read(self, buffer: memoryview, piece: Piece) -> int:
        """Bring the next bytes into a buffer.

        Raises:
            SnapshotDamaged: when the file is not there, not as long as was planned, or cannot be read.
        """
        try:
            if self._file is None:
                self._file = OpenFile(self.source.file)
            if self._file.size != self.source.size:
                raise wrong(self.source, "wrong-size")
            if self._file.unobtrusively(buffer, piece.start, piece.count) < piece.count:
                raise wrong(self.source, "wrong-size")
        except (FileNotFoundError, NotADirectoryError):
            raise wrong(self.source, "missing") from None
        except OSError as error:
            raise wrong(self.source, "corrupt", f"cannot be read: {error.strerror}") from error
        return piece.count

    def hash(self, content: memoryview) -> None:
        self._hash.update(content)

    def digest(self) -> str:
        return self._hash.hexdigest()

    def close(self) -> None:
        """Close the file; may be called twice."""
        if self._file:
            self._file.close()
            self._file = None


def wrong(source: Source, status: Status, detail: str = "") -> SnapshotDamaged:
    """Build the error for a file that is not what it should be."""
    return damaged(source.snapshot, [Finding(source.path, status, detail)])


class _Packed(NamedTuple):
    data: bytes | memoryview
    crc32: int


@dataclass(slots=True)
class _Flight:
    """A piece under way; `packed` is None for one that is only hashed, `written` until the sink has it."""

    piece: Piece
    buffer: memoryview
    reading: _Reading | None
    hashed: Future[None] | None
    packed: Future[_Packed] | None
    size: int = 0
    written: Future[None] | None = None


def stream(
    pieces: Iterable[Piece], pack: Pack | None, sink: Sink, pace: Pace, *, before: Iterable[Piece] = ()
) -> Generator[Done, None, None]:
    """Send pieces into a sink and yield each one when its part is done; to be closed by who stops early.

    Args:
        pieces: of the tar, in order.
        pack: makes a frame of a piece; None to write pieces as they are.
        sink: takes the frames in order; the caller lets it finish.
        pace: is asked before anything is read.
        before: pieces of the first file that are in the sink already: they are read for its hash, and not yielded.

    Raises:
        SnapshotDamaged: when a file is missing, cut, or cannot be read.
        OSError: when writing fails.
    """
    if pack:
        _keep_freed_memory()
    threads = _Threads()
    running = _Stream(threads, pack, sink, pace)
    try:
        yield from running.run(before, pieces)
    finally:
        # In this order: nobody reads a file that was closed.
        threads.end()
        running.close()


def _keep_freed_memory() -> None:
    """Have the C library use the memory of one frame for the next, where it is glibc.

    By default each frame gets pages of its own from the kernel and gives them back: a seventh of a backup's time.
    """
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt"):
        return
    for parameter, value in _HEAP.items():
        library.mallopt(parameter, value)


class _Threads:
    """The pools of a stream."""

    def __init__(self) -> None:
        self.reader = ThreadPoolExecutor(1, thread_name_prefix="archive-read")
        self.hasher = ThreadPoolExecutor(1, thread_name_prefix="archive-hash")
        self.packers = ThreadPoolExecutor(len(os.sched_getaffinity(0)), thread_name_prefix="archive-pack")

    def end(self) -> None:
        """Drop what has not begun and wait for the rest; whoever waits for what was dropped is told by its future."""
        for pool in (self.reader, self.hasher, self.packers):
            pool.shutdown(cancel_futures=True)


class _Stream:
    def __init__(self, threads: _Threads, pack: Pack | None, sink: Sink, pace: Pace) -> None:
        self._threads = threads
        self._pack = pack
        self._sink = sink
        self._pace = pace
        self._free = [new_buffer(CHUNK) for _ in range(BUFFERS_PACKED if pack else BUFFERS_STORED)]
        self._flying: deque[_Flight] = deque()
        self._landed: deque[_Flight] = deque()
        self._readings: list[_Reading] = []

    def run(self, before: Iterable[Piece], pieces: Iterable[Piece]) -> Iterator[Done]:
        for piece, wanted in chain(((p, False) for p in before), ((p, True) for p in pieces)):
            while not self._free:
                yield from self._step()
            self._pace.wait(piece.count)
            self._launch(piece, self._free.pop(), wanted=wanted)
        while self._flying or self._landed:
            yield from self._step()

    def close(self) -> None:
        for reading in self._readings:
            reading.close()

    def _launch(self, piece: Piece, buffer: memoryview, *, wanted: bool) -> None:
        reading = self._reading_of(piece)
        content = self._threads.reader.submit(_fill, buffer, piece, reading)
        hashed = self._threads.hasher.submit(_hash, reading, content, piece) if reading else None
        packed = self._threads.packers.submit(_pack, self._pack, content) if wanted else None
        self._flying.append(_Flight(piece, buffer, reading, hashed, packed))

    def _reading_of(self, piece: Piece) -> _Reading | None:
        if piece.source is None:
            return None
        if not self._readings or self._readings[-1].source is not piece.source:
            self._readings.append(_Reading(piece.source))
        return self._readings[-1]

    def _step(self) -> Iterator[Done]:
        """Hand the next piece to the sink when it is ready or nothing else is to be done, else end the oldest one."""
        flying = self._flying[0] if self._flying else None
        if flying and (not self._landed or flying.packed is None or flying.packed.done()):
            self._landed.append(self._flying.popleft())
            if flying.packed:
                packed = flying.packed.result()
                flying.size, flying.written = len(packed.data), self._sink.write(packed.data)
        else:
            flight = self._landed.popleft()
            done = self._end(flight)
            self._free.append(flight.buffer)
            if flight.packed:
                yield done

    def _end(self, flight: _Flight) -> Done:
        sha256 = ""
        if flight.written:
            flight.written.result()
        if flight.hashed:
            flight.hashed.result()
        if flight.reading and flight.piece.last:
            sha256 = flight.reading.digest()
            flight.reading.close()
            self._readings.remove(flight.reading)
        crc = flight.packed.result().crc32 if flight.packed else 0
        return Done(flight.piece, Frame(flight.size, flight.piece.size, crc), sha256)


def _fill(buffer: memoryview, piece: Piece, reading: _Reading | None) -> memoryview:
    count = reading.read(buffer, piece) if reading else 0
    buffer[count : piece.size] = piece.suffix
    return buffer[: piece.size]


def _hash(reading: _Reading, content: Future[memoryview], piece: Piece) -> None:
    reading.hash(content.result()[: piece.count])


def _pack(pack: Pack | None, content: Future[memoryview]) -> _Packed:
    view = content.result()
    if pack is None:
        return _Packed(view, 0)
    data = pack(view)
    return _Packed(data, crc32(data))
