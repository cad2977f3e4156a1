"""The tar inside an archive of ours, at any place: whatever it was compressed with, its index tells where to look."""

import mmap
import threading
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate

from zops.archive.access import SPAN_LIMIT, Access, Span
from zops.archive.decode import decode
from zops.archive.format import CHUNK, Index
from zops.archive.tar import END
from zops.cache.reading import new_buffer

# Headers are small; so much is read for them at once from an archive that is not compressed.
_WINDOW = 64 << 10


class Tape:
    """The tar of an archive, read by several threads at once."""

    def __init__(self, access: Access, index: Index) -> None:
        self._access = access
        self._frames = index.frames
        self._compression = index.compression
        self._starts = [0, *accumulate(frame.size for frame in index.frames)]
        self._places = [0, *accumulate(frame.compressed for frame in index.frames)]
        self._spare = threading.local()
        self.end = index.end
        """Where the last member and its padding end."""

    def read(self, buffer: memoryview, part: range) -> memoryview:
        """Bring a part of the tar, at most a chunk of it, into a buffer of `new_buffer` and return it.

        What lies in the buffer behind the part may be anything.

        Raises:
            ArchiveDamaged: when that part of the archive is damaged.
            SourceFailed: when the store does not deliver.
        """
        if not self._frames:
            if part.start % mmap.PAGESIZE == 0:
                return self._access.read(buffer, (part.start, len(part)))
            buffer[: len(part)] = self._access.read(self._buffer("packed", SPAN_LIMIT), (part.start, len(part)))
            return buffer[: len(part)]
        position = part.start
        number = bisect_right(self._starts, position) - 1
        while position < part.stop:
            frame, start = self._frames[number], self._starts[number]
            rest = buffer[position - part.start :]
            if start == position and frame.size <= len(rest):
                self._decode(number, rest)
            else:
                content = self._decode(number, self._buffer("content", CHUNK))
                content = content[position - start : part.stop - start]
                rest[: len(content)] = content
            number, position = number + 1, start + frame.size
        return buffer[: len(part)]

    def expect(self, part: range) -> None:
        """Be told which part will be read soon."""
        if not self._frames:
            self._access.expect(_spans(part))
            return
        first = bisect_right(self._starts, part.start) - 1
        last = bisect_right(self._starts, part.stop - 1)
        self._access.expect(self._span(number) for number in range(first, last))

    def pieces(self, position: int) -> Iterator[memoryview]:
        """Yield the tar from a place to its end, in pieces as they come; each is good until the next one."""
        if not self._frames:
            buffer = new_buffer(_WINDOW + mmap.PAGESIZE)
            while position < self.end:
                # On borders of pages, where a disk is read without a copy.
                stop = min(position - position % _WINDOW + _WINDOW, self.end)
                yield self._access.read(buffer, (position, stop - position))
                position = stop
            yield memoryview(END)
            return
        buffer = new_buffer(CHUNK)
        for number in range(bisect_right(self._starts, position) - 1, len(self._frames)):
            yield self._decode(number, buffer)[max(0, position - self._starts[number]) :]
        if self._starts[-1] == self.end:
            # A .tar.gz has its end behind the index, whose place was checked when it was found.
            yield memoryview(END)

    def _decode(self, number: int, buffer: memoryview) -> memoryview:
        packed = self._access.read(self._buffer("packed", SPAN_LIMIT), self._span(number))
        return decode(packed, self._frames[number], self._compression, buffer)

    def _span(self, number: int) -> Span:
        return self._places[number], self._frames[number].compressed

    def _buffer(self, name: str, size: int) -> memoryview:
        """Return a buffer of this thread's own."""
        if not hasattr(self._spare, name):
            setattr(self._spare, name, new_buffer(size))
        buffer: memoryview = getattr(self._spare, name)
        return buffer


def _spans(part: range) -> Iterator[Span]:
    for start in range(part.start, part.stop, CHUNK):
        yield start, min(CHUNK, part.stop - start)
