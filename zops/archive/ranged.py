"""A file whose bytes are had by ranges: those of a bucket's object, or of what is encrypted."""

import io
import os
from abc import abstractmethod
from typing import Any


class RangedFile(io.RawIOBase):
    """Reads at any place by asking for ranges.

    Attributes:
        size: bytes of the file, to be set before anything is read.
    """

    size: int

    def __init__(self) -> None:
        self._position = 0

    @abstractmethod
    def read_range(self, start: int, end: int) -> bytes:
        """Return the bytes from `start` to `end`, or to the end; may be called from several threads."""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        end = min(self._position + len(buffer), self.size)
        if self._position >= end:
            return 0
        data = self.read_range(self._position, end)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)
