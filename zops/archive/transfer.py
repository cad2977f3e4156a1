"""Bytes on their way to and from a bucket: an upload that is written to, and an object that is read as a file."""

import hashlib
import io
import os
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

READ_AHEAD = 8 << 20
"""What a reader that asks for little is given at once, so that a request is worth its time."""


class _Aborted(Exception):
    pass


class Outgoing:
    """Hands what is written here, in parts, to obstore, which reads them in a thread of its own."""

    def __init__(
        self, put: Callable[[Iterator[bytes]], str], part: int, failed: Callable[[BaseException], BaseException]
    ) -> None:
        self.digests: list[bytes] = []
        self.sizes: list[int] = []
        self._part, self._pending = part, bytearray()
        self._queue: queue.Queue[bytes | type[_Aborted] | None] = queue.Queue(maxsize=1)
        self._failure: BaseException | None = None
        self._etag = ""
        self._put_all, self._failed = put, failed
        self._thread = threading.Thread(target=self._run, name="zops-upload", daemon=True)
        self._thread.start()

    def write(self, data: bytes) -> None:
        """Queue bytes for the upload.

        Raises:
            SourceFailed: when the upload failed meanwhile.
        """
        view = memoryview(data)
        while len(view) >= (room := self._part - len(self._pending)):
            self._pending += view[:room]
            self._send()
            view = view[room:]
        self._pending += view

    def finish(self) -> str:
        """Complete the upload, wait for the store to confirm it, and return what it calls the object.

        Raises:
            SourceFailed: when it failed.
        """
        if self._pending or not self.sizes:
            self._send()
        self._put(None)
        self._thread.join()
        if self._failure:
            raise self._failure
        return self._etag

    def abort(self) -> None:
        """Give the upload up; the parts that were sent are removed from the bucket."""
        if self._thread.is_alive() and self._failure is None:
            self._put(_Aborted, quiet=True)
        self._thread.join()

    def _send(self) -> None:
        self.sizes.append(len(self._pending))
        self._put(bytes(self._pending))
        self._pending = bytearray()

    def _put(self, item: "bytes | type[_Aborted] | None", *, quiet: bool = False) -> None:
        while self._thread.is_alive():
            with suppress(queue.Full):
                self._queue.put(item, timeout=0.2)
                return
        if self._failure and not quiet:
            raise self._failure

    def _items(self) -> Iterator[bytes]:
        while (item := self._queue.get()) is not None:
            if not isinstance(item, bytes):
                raise _Aborted
            self.digests.append(hashlib.md5(item, usedforsecurity=False).digest())
            yield item

    def _run(self) -> None:
        try:
            self._etag = self._put_all(self._items())
        except _Aborted:
            pass
        except BaseException as error:  # noqa: BLE001 - carried to the thread that writes, which raises it
            self._failure = self._failed(error)


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


class Ranges(io.RawIOBase):
    """A file of which every read is a request for a range."""

    def __init__(self, fetch: Callable[[int, int], bytes], size: int) -> None:
        self._fetch = fetch
        self._size = size
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readall(self) -> bytes:
        # Python's own asks for 8 KiB at a time, each of which would be a request.
        parts = []
        while self._position < self._size:
            parts.append(self._fetch(self._position, min(self._position + READ_AHEAD, self._size)))
            self._position += len(parts[-1])
        return b"".join(parts)

    def read_range(self, start: int, end: int) -> bytes:
        """Return the bytes from `start` to `end`; may be called from several threads."""
        return self._fetch(start, end)

    def readinto(self, buffer: Any) -> int:
        end = min(self._position + len(buffer), self._size)
        if self._position >= end:
            return 0
        data = self._fetch(self._position, end)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


__all__ = ["READ_AHEAD", "Forward", "Outgoing", "Ranges"]
