"""One large file in ranges: a partial file of its full size, and a durable record of the ranges that are complete.

The record is written after the bytes that it speaks of have reached the disk, so that a run that was killed at any
byte, or a host that lost power, goes on with what is missing. It only saves fetching: in the end the file is hashed.
"""

import json
import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

from zops.cache.blocks import reserve
from zops.cache.hubs import Listed, Span
from zops.cache.incoming import PARTIAL
from zops.cache.manifest import FORMAT, write_json

# Ranges of this size cost one request in some seconds on a usual line, and a kill costs at most one of each connection.
RANGE_BYTES = 32 << 20
# Smaller files come in one stream.
RANGED_BYTES = 2 * RANGE_BYTES


def in_ranges(file: Listed) -> bool:
    """Tell whether a file is worth several connections."""
    return file.size >= RANGED_BYTES


class Partial:
    """The part of a file that is there. `write` and `complete` may be called from several threads."""

    def __init__(self, file: Listed, target: Path) -> None:
        self._file = file
        self._target = target
        self._path = target.with_name(target.name + PARTIAL)
        self._record = target.with_name(f"{target.name}{PARTIAL}.json")
        self._done: list[Span] = []
        self._descriptor = -1
        self._lock = threading.Lock()

    def open(self) -> list[Span]:
        """Make or take up the partial file with room for all of it; return the ranges that are missing.

        Raises:
            OSError: when there is no room.
        """
        self._done = self._recorded()
        if not self._done:
            self.discard()
        self._target.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        reserve(self._descriptor, self._file.size)
        return list(_split(_gaps(self._done, self._file.size)))

    @property
    def size_done(self) -> int:
        """Bytes of the ranges that are complete."""
        with self._lock:
            return sum(end - start for start, end in self._done)

    def write(self, offset: int, block: bytes) -> None:
        """Put bytes in their place."""
        view = memoryview(block)
        while view:
            count = os.pwrite(self._descriptor, view, offset)
            view, offset = view[count:], offset + count

    def complete(self, span: Span) -> None:
        """Record durably that every byte of a range is there."""
        os.fdatasync(self._descriptor)
        with self._lock:
            self._done = _joined([*self._done, span])
            body = {"format": FORMAT, "file": self._identity(), "done": self._done}
            write_json(self._record, body)

    def close(self) -> None:
        """Let go of the file; no thread may write any more."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1

    def finish(self) -> None:
        """Give the complete file its name."""
        self.close()
        self._path.replace(self._target)
        self._record.unlink(missing_ok=True)

    def discard(self) -> None:
        """Forget what is there."""
        self.close()
        self._record.unlink(missing_ok=True)
        self._path.unlink(missing_ok=True)
        self._done = []

    def _identity(self) -> list[object]:
        return [self._file.size, self._file.sha256 or self._file.git_sha1 or ""]

    def _recorded(self) -> list[Span]:
        """Read what an earlier run completed of this very file; anything that cannot be read only costs fetching."""
        with suppress(OSError, ValueError, KeyError, TypeError):
            body = json.loads(self._record.read_text(encoding="utf-8"))
            spans = [(int(start), int(end)) for start, end in body["done"]]
            whole = self._path.stat().st_size == self._file.size
            inside = all(0 <= start < end <= self._file.size for start, end in spans)
            if whole and inside and body["format"] == FORMAT and body["file"] == self._identity():
                return _joined(spans)
        return []


def _joined(spans: list[Span]) -> list[Span]:
    joined: list[Span] = []
    for start, end in sorted(spans):
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((start, end))
    return joined


def _gaps(done: list[Span], size: int) -> Iterator[Span]:
    position = 0
    for start, end in done:
        if position < start:
            yield position, start
        position = end
    if position < size:
        yield position, size


def _split(gaps: Iterator[Span]) -> Iterator[Span]:
    """Cut at multiples of the range's size, so that every run asks for the same ranges."""
    for start, end in gaps:
        cuts = [start, *range((start // RANGE_BYTES + 1) * RANGE_BYTES, end, RANGE_BYTES), end]
        yield from pairwise(cuts)
