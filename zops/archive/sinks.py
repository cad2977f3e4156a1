"""Where the bytes of an archive go, by a thread of its own: a file, past the page cache, or the stream of a store."""

import ctypes
import errno
import fcntl
import mmap
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from zops.archive.store import Writer
from zops.cache.blocks import reserve
from zops.cache.reading import new_buffer

BLOCK = mmap.PAGESIZE
"""What O_DIRECT wants addresses, places and lengths to be multiples of."""
BUFFER = 4 << 20
# One is filled while two are written or wait for it.
BUFFERS = 3
# Where writing past the page cache is refused, what was written is dropped from it every so many bytes.
DROP = 32 << 20


class Sink(Protocol):
    """Takes the bytes of an archive in order.

    Attributes:
        position: how many it was given.
    """

    position: int

    def write(self, data: bytes | memoryview) -> Future[None] | None:
        """Take more bytes; they must not change until the future is done, and may at once when there is none."""

    def finish(self) -> None:
        """Wait until all is written.

        Raises:
            OSError: what writing failed with.
        """

    def close(self) -> None:
        """Stop at once, leaving what is not written."""


class StreamSink:
    """Passes bytes on to the writer of any store."""

    def __init__(self, writer: Writer) -> None:
        self.position = 0
        self._writer = writer
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="archive-write")
        self._writing: deque[Future[None]] = deque()

    def write(self, data: bytes | memoryview) -> Future[None]:
        """See `Sink`."""
        self.position += len(data)
        while self._writing and self._writing[0].done():
            self._writing.popleft().result()
        self._writing.append(self._thread.submit(self._write, data))
        return self._writing[-1]

    def finish(self) -> None:
        """See `Sink`."""
        while self._writing:
            self._writing.popleft().result()

    def close(self) -> None:
        """See `Sink`."""
        self._thread.shutdown(cancel_futures=True)

    def _write(self, data: bytes | memoryview) -> None:
        self._writer.write(data)  # type: ignore[arg-type] # a store's writer takes any buffer, and keeps none


class FileSink:
    """Writes to a file by O_DIRECT where its file system can.

    What starts on a border of blocks, in memory and in the file, is written from where it is; everything else passes
    through buffers. Bytes that are not there yet when the last block is written are zeros until they are.
    """

    def __init__(self, descriptor: int, position: int = 0) -> None:
        self.position = position
        self._descriptor = descriptor
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="archive-write")
        self._writing: deque[tuple[Future[None], memoryview | None]] = deque()
        self._free = [new_buffer(BUFFER) for _ in range(BUFFERS)]
        self._buffer = self._free.pop()
        self._filled = position % BLOCK
        self._begin = position - self._filled
        if self._filled:
            os.preadv(descriptor, [self._buffer[: self._filled]], self._begin)
        self._direct = _set_direct(descriptor, wanted=True)
        self._dropped = self._begin

    def reserve(self, size: int) -> None:
        """Take room for that many bytes now, so that a full disk shows before the work."""
        reserve(self._descriptor, size)

    def write(self, data: bytes | memoryview) -> Future[None] | None:
        """See `Sink`."""
        view = memoryview(data)
        self.position += len(view)
        written = None
        if len(view) >= BLOCK and self._filled % BLOCK == 0 and _on_border(view):
            self._flush()
            whole = len(view) // BLOCK * BLOCK
            written = self._submit(view[:whole], None)
            view = view[whole:]
        while view:
            count = min(len(view), BUFFER - self._filled)
            self._buffer[self._filled : self._filled + count] = view[:count]
            self._filled += count
            view = view[count:]
            if self._filled == BUFFER:
                self._flush()
        return written

    def finish(self) -> None:
        """See `Sink`; the file is then exactly as long as what was written."""
        self.make_durable()
        os.ftruncate(self._descriptor, self.position)

    def make_durable(self) -> None:
        """Wait until all that was given so far is on the disk."""
        if self._filled:
            end = -(-self._filled // BLOCK) * BLOCK
            self._buffer[self._filled : end] = bytes(end - self._filled)
            self._thread.submit(self._pwrite, self._buffer[:end], self._begin).result()
        while self._writing:
            self._reclaim()
        os.fdatasync(self._descriptor)

    def close(self) -> None:
        """See `Sink`."""
        self._thread.shutdown(cancel_futures=True)

    def _flush(self) -> None:
        """Write the buffer, which is filled up to a border, and go on with an empty one."""
        if not self._filled:
            return
        self._submit(self._buffer[: self._filled], self._buffer)
        self._filled = 0
        while not self._free:
            self._reclaim()
        self._buffer = self._free.pop()

    def _submit(self, view: memoryview, buffer: memoryview | None) -> Future[None]:
        future = self._thread.submit(self._pwrite, view, self._begin)
        self._begin += len(view)
        self._writing.append((future, buffer))
        while self._writing and self._writing[0][0].done():
            self._reclaim()
        return future

    def _reclaim(self) -> None:
        future, buffer = self._writing.popleft()
        future.result()
        if buffer is not None:
            self._free.append(buffer)

    def _pwrite(self, view: memoryview, begin: int) -> None:
        done = 0
        while done < len(view):
            try:
                done += os.pwrite(self._descriptor, view[done:], begin + done)
            except OSError as error:
                if error.errno != errno.EINVAL or not self._direct:
                    raise
                self._direct = _set_direct(self._descriptor, wanted=False)
        if not self._direct and begin + done - self._dropped >= DROP:
            self._dropped = begin + done
            os.fdatasync(self._descriptor)
            os.posix_fadvise(self._descriptor, 0, self._dropped, os.POSIX_FADV_DONTNEED)


def open_sink(writer: Writer, position: int = 0) -> Sink:
    """Return the fastest way into a store's writer, which has `position` bytes: past the page cache where it can.

    A writer with a file says so by `fileno`, as Python's files do.
    """
    fileno = getattr(writer, "fileno", None)
    return StreamSink(writer) if fileno is None else FileSink(fileno(), position)


def _on_border(view: memoryview) -> bool:
    if view.readonly:
        return False
    return ctypes.addressof(ctypes.c_char.from_buffer(view)) % BLOCK == 0


def _set_direct(descriptor: int, *, wanted: bool) -> bool:
    """Set or clear O_DIRECT; return whether it is set now."""
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_DIRECT if wanted else flags & ~os.O_DIRECT)
    except OSError:
        return not wanted and bool(flags & os.O_DIRECT)
    return wanted
