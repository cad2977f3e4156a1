"""SHA-256 of many large files with all cores, largest first, in little memory."""

import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path

from zops.cache.manifest import stat_key
from zops.events import Report, task

Stat = tuple[int, int, int]
Hashed = tuple[str, Stat]
"""SHA-256 in hex, and the file's `stat_key` taken before it was read."""

# hashlib releases the GIL for blocks of this size; more per call gains nothing measurable.
BLOCK = 1 << 20


class Stopped(BaseException):
    """Raised inside a worker thread that was told to end early; no error, hence no Exception."""


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
    """Hash every file and return, by its key, what was found or why it could not be read."""
    sizes = {key: _size(path) for key, path in paths.items()}
    results: dict[str, Hashed | OSError] = {}
    with task(report, "hash", text, total=sum(sizes.values())) as counter, _workers() as (pool, stop):

        def advance(count: int) -> None:
            if stop.is_set():
                raise Stopped
            counter.advance(count)

        def hash_one(key: str) -> None:
            try:
                stat = stat_key(paths[key])
                results[key] = sha256_file(paths[key], advance), stat
            except OSError as error:
                results[key] = error

        futures = [pool.submit(hash_one, key) for key in sorted(paths, key=lambda key: -sizes[key])]
        wait(futures, return_when=FIRST_EXCEPTION)
        for future in futures:
            future.result()
    return results


@contextmanager
def _workers() -> Iterator[tuple[ThreadPoolExecutor, threading.Event]]:
    """Yield a thread a core, and the event that makes them end when the caller is interrupted."""
    stop = threading.Event()
    pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)), thread_name_prefix="hash")
    try:
        yield pool, stop
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def total_size(paths: Iterable[Path]) -> int:
    """Return the bytes of all files that exist."""
    return sum(_size(path) for path in paths)
