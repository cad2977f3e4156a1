"""Reading a log that is rotated while it is read."""

import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

POLL_S = 0.2


def read_lines(path: Path, *, tail: int | None = None, going_on: Callable[[], bool] = lambda: False) -> Iterator[str]:
    """Yield the lines of a log and of its rotated files, oldest first, and then those that come.

    Args:
        path: the log; its older parts are path.1, path.2 and so on.
        tail: the last so many of the lines that are there; all of them when None.
        going_on: asked when the end is reached, whether more may come.
    """
    stream = _open(path)
    try:
        # The older files are read after the newest was opened: a line may come twice when it is rotated in between,
        # which is better than not at all.
        present = _rest(stream) if stream else []
        yield from deque((*_older(path), *present), maxlen=tail)
        while going_on():
            time.sleep(POLL_S)
            yield from _rest(stream) if stream else ()
            if _was_rotated(path, stream):
                renewed = _open(path)
                if stream:
                    yield from _rest(stream)
                    stream.close()
                stream = renewed
        yield from _rest(stream) if stream else ()
    finally:
        if stream:
            stream.close()


def _open(path: Path) -> IO[bytes] | None:
    try:
        return path.open("rb")
    except FileNotFoundError:
        return None


def _older(path: Path) -> Iterator[str]:
    numbers = [int(p.suffix[1:]) for p in path.parent.glob(f"{path.name}.*") if p.suffix[1:].isdigit()]
    for number in sorted(numbers, reverse=True):
        stream = _open(path.with_name(f"{path.name}.{number}"))
        if stream:
            with stream:
                yield from _rest(stream)


def _rest(stream: IO[bytes]) -> list[str]:
    """Return the whole lines that are left; a line without its end is left for the next time."""
    position = stream.tell()
    data = stream.read()
    end = data.rfind(b"\n") + 1
    stream.seek(position + end)
    return [line.rstrip(b"\r").decode("utf-8", "replace") for line in data[:end].split(b"\n")[:-1]]


def _was_rotated(path: Path, stream: IO[bytes] | None) -> bool:
    try:
        found = path.stat()
    except FileNotFoundError:
        return False
    if stream is None:
        return True
    mine = os.fstat(stream.fileno())
    # With a single file the log is emptied instead of renamed.
    return found.st_ino != mine.st_ino or mine.st_size < stream.tell()
