"""Bytes on their way to and from a bucket: an upload that is written to, and an object that is read as a file."""

import hashlib
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

from zops.archive.ranged import RangedFile

READ_AHEAD = 8 << 20
"""What a reader that asks for little is given at once, so that a request is worth its time."""


CONCURRENCY = 3
"""Parts that are sent at once; one more is being filled meanwhile."""


class Sent(NamedTuple):
    """A part that the bucket has: what the bucket calls it, the MD5 of its bytes, their number."""

    etag: str
    md5: bytes
    size: int
    was_there: bool = False


class Outgoing:
    """Cuts what is written here into parts, and hands them on in threads, but for those that the bucket has already."""

    def __init__(
        self, put: Callable[[int, memoryview, bytes], str], part: int, there: Mapping[int, tuple[str, int]]
    ) -> None:
        self._put, self._part, self._there = put, part, there
        # The same few buffers again and again; they would come to twice as much if each part grew one of its own.
        self._free: list[bytearray] = []
        self._buffer, self._filled = bytearray(part), 0
        self._threads = ThreadPoolExecutor(CONCURRENCY, thread_name_prefix="zops-upload")
        self._flying: deque[tuple[Future[Sent], bytearray]] = deque()
        self._sent: list[Sent] = []

    @property
    def kept_size(self) -> int:
        """Bytes of the parts that were there, as their MD5 says, and were not sent again; final after `finish`."""
        return sum(sent.size for sent in self._sent if sent.was_there)

    def write(self, data: bytes) -> None:
        """Take more bytes.

        Raises:
            SourceFailed: when a part cannot be sent.
        """
        view = memoryview(data)
        while view:
            count = min(len(view), self._part - self._filled)
            self._buffer[self._filled : self._filled + count] = view[:count]
            self._filled += count
            view = view[count:]
            if self._filled == self._part:
                self._send()

    def finish(self) -> list[Sent]:
        """Send what is left, wait until the bucket has all parts, and return them in order.

        Raises:
            SourceFailed: when a part cannot be sent.
        """
        if self._filled or not (self._flying or self._sent):
            self._send()
        while self._flying:
            self._land()
        self._threads.shutdown()
        return self._sent

    def abort(self) -> None:
        """Give up: wait for what is on its way and send no more."""
        self._threads.shutdown(cancel_futures=True)

    def _send(self) -> None:
        while len(self._flying) >= CONCURRENCY:
            self._land()
        number = len(self._sent) + len(self._flying) + 1
        body = memoryview(self._buffer)[: self._filled]
        self._flying.append((self._threads.submit(self._settle, number, body), self._buffer))
        self._buffer, self._filled = self._free.pop() if self._free else bytearray(self._part), 0

    def _land(self) -> None:
        future, buffer = self._flying.popleft()
        self._sent.append(future.result())
        self._free.append(buffer)

    def _settle(self, number: int, body: memoryview) -> Sent:
        md5 = hashlib.md5(body, usedforsecurity=False).digest()
        if self._there.get(number) == (md5.hex(), len(body)):
            return Sent(md5.hex(), md5, len(body), was_there=True)
        return Sent(self._put(number, body, md5), md5, len(body))


class Forward:
    """An object as one stream, read forward only."""

    def __init__(self, key: str, answer: Any) -> None:
        self.key = key
        self.position = 0
        self._chunks = iter(answer.stream())
        self._ahead = b""

    def read(self, start: int, end: int) -> bytes:
        """Return a range that does not begin before `position`, which moves behind it."""
        data = bytearray()
        while self.position < end:
            if not self._ahead:
                self._ahead = bytes(next(self._chunks, b""))
                if not self._ahead:
                    raise EOFError("the answer ended early")
            wanted = (start if self.position < start else end) - self.position
            taken, self._ahead = self._ahead[:wanted], self._ahead[wanted:]
            if self.position >= start:
                data += taken
            self.position += len(taken)
        return bytes(data)


class Ranges(RangedFile):
    """A file of which every read is a request for a range."""

    def __init__(self, fetch: Callable[[int, int], bytes], size: int) -> None:
        super().__init__()
        self._fetch = fetch
        self.size = size

    def readall(self) -> bytes:
        # Python's own asks for 8 KiB at a time, each of which would be a request.
        parts = []
        while self._position < self.size:
            parts.append(self._fetch(self._position, min(self._position + READ_AHEAD, self.size)))
            self._position += len(parts[-1])
        return b"".join(parts)

    def read_range(self, start: int, end: int) -> bytes:
        """See `RangedFile`."""
        return self._fetch(start, end)


__all__ = ["READ_AHEAD", "Forward", "Outgoing", "Ranges", "Sent"]
