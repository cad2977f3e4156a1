"""The bytes of an archive at any place, for several threads at once: from a disk, a bucket, or a stream."""

import io
import mmap
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Protocol

from zops.archive.format import CHUNK
from zops.cache.reading import OpenFile, new_buffer
from zops.errors import ArchiveDamaged

Span = tuple[int, int]
"""Where some bytes of an archive begin, and how many they are."""

SPAN_LIMIT = CHUNK + (1 << 20)
"""A buffer for any span: a chunk that compression made longer, which it does by thousandths, and a page."""

# A request takes some ten milliseconds at a near store; so many at once fill a fast line. All are in memory.
_AHEAD = 6


class Access(Protocol):
    """Reads an archive for several threads at once."""

    def read(self, buffer: memoryview, span: Span) -> memoryview:
        """Bring a span into a buffer of `new_buffer` and return it.

        It lies at the beginning of the buffer when it begins on a border of pages, and else a little behind that: then
        the buffer has a page more than the span.

        Raises:
            ArchiveDamaged: when the archive has become shorter.
            SourceFailed: when the store does not deliver.
        """

    def expect(self, spans: Iterable[Span]) -> None:
        """Be told what will be read soon, in this order; where reading takes time, it may begin now."""


ReadRange = Callable[[int, int], bytes]
"""Returns the bytes of an archive from a place up to another; may be called from several threads."""


@contextmanager
def access_to(stream: BinaryIO, read_range: ReadRange | None = None) -> Iterator[Access]:
    """Give the fastest way to the bytes of an archive that was opened.

    Args:
        stream: the archive; it stays the caller's to close.
        read_range: the same by ranges, where several at once can be had.
    """
    raw = getattr(stream, "raw", stream)
    access: _DiskAccess | _RangeAccess | StreamAccess
    if isinstance(raw, io.FileIO):
        access = _DiskAccess(Path(f"/proc/self/fd/{raw.fileno()}"))
    else:
        access = _RangeAccess(read_range) if read_range else StreamAccess(stream)
    try:
        yield access
    finally:
        access.close()


class _DiskAccess:
    """A file: read from the disk itself, so that a host that serves keeps its warm cache."""

    def __init__(self, path: Path) -> None:
        self._file = OpenFile(path)
        # Settles, before threads share the file, whether the file system can be read past the page cache.
        self._file.from_disk(new_buffer(mmap.PAGESIZE), 0, min(mmap.PAGESIZE, self._file.size))

    def read(self, buffer: memoryview, span: Span) -> memoryview:
        """See `Access`."""
        start, count = span
        skip = start % mmap.PAGESIZE
        if self._file.from_disk(buffer, start - skip, skip + count) < skip + count:
            raise _shorter()
        return buffer[skip : skip + count]

    def expect(self, spans: Iterable[Span]) -> None:
        """See `Access`: a disk is fast enough."""

    def close(self) -> None:
        """See `Access`."""
        self._file.close()


class _RangeAccess:
    """An archive in a bucket: several requests at once, ahead of who reads."""

    def __init__(self, read_range: ReadRange) -> None:
        self._read_range = read_range
        self._pool = ThreadPoolExecutor(_AHEAD, thread_name_prefix="zops-range")
        self._coming: dict[Span, Future[bytes]] = {}
        self._lock = threading.Lock()

    def read(self, buffer: memoryview, span: Span) -> memoryview:
        """See `Access`."""
        self.expect([span])
        with self._lock:
            coming = self._coming.pop(span, None)
        data = coming.result() if coming else self._fetch(span)
        if len(data) != span[1]:
            raise _shorter()
        buffer[: len(data)] = data
        return buffer[: len(data)]

    def expect(self, spans: Iterable[Span]) -> None:
        """See `Access`."""
        with self._lock:
            for span in spans:
                if span not in self._coming and len(self._coming) < _AHEAD:
                    self._coming[span] = self._pool.submit(self._fetch, span)

    def close(self) -> None:
        """See `Access`."""
        self._pool.shutdown(cancel_futures=True)

    def _fetch(self, span: Span) -> bytes:
        return self._read_range(span[0], span[0] + span[1])


class StreamAccess:
    """Anything that can be read and sought, by one thread at a time."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._lock = threading.Lock()

    def read(self, buffer: memoryview, span: Span) -> memoryview:
        """See `Access`."""
        with self._lock:
            self._stream.seek(span[0])
            data = self._stream.read(span[1])
        if len(data) != span[1]:
            raise _shorter()
        buffer[: len(data)] = data
        return buffer[: len(data)]

    def expect(self, spans: Iterable[Span]) -> None:
        """See `Access`: there is but one reader."""

    def close(self) -> None:
        """See `Access`."""


def _shorter() -> ArchiveDamaged:
    return ArchiveDamaged("the archive became shorter while it was read")
