"""Digests of many large files with all cores, in little memory, at the speed of the hash or of the disk.

One file's SHA-256 is sequential, so the cores share files, slice by slice.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from zops.cache.lanes import run_jobs
from zops.cache.reading import CHUNK, OpenFile
from zops.events import Report, task

Algorithm = Literal["sha256", "blake3"]
Stat = tuple[int, int, int]
Hashed = tuple[str, Stat]
"""SHA-256 in hex, and the file's `stat_key` taken before it was read."""

# hashlib releases the GIL for blocks of this size; more per call gains nothing measurable.
BLOCK = 1 << 20
# Slices that each core gets: the last one ends no later than the others by about one in so many parts.
SLICES = 64
SLICE_BYTES = 2 * CHUNK


@dataclass(frozen=True, slots=True)
class Digests:
    """What a file's bytes hash to, in hex, by algorithm, and its `stat_key` from before they were read."""

    stat: Stat
    hex: Mapping[Algorithm, str]


def new_digest(algorithm: Algorithm) -> Any:
    """Return a new hash with `update` and `hexdigest`, both of which let other threads run."""
    if algorithm == "sha256":
        return hashlib.sha256()
    from blake3 import blake3  # noqa: PLC0415 - most commands need none

    return blake3(max_threads=1)


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
    """Return the SHA-256 of every file by its key, or why it could not be read."""
    found = digest_files(paths, ("sha256",), report, text)
    return {key: each if isinstance(each, OSError) else (each.hex["sha256"], each.stat) for key, each in found.items()}


def digest_files(
    paths: Mapping[str, Path], algorithms: Sequence[Algorithm], report: Report, text: str
) -> dict[str, Digests | OSError]:
    """Read every file once and return its digests by its key, or why it could not be read."""
    jobs = [_Job(path, algorithms, _size(path)) for path in paths.values()]
    cores = min(len(os.sched_getaffinity(0)), len(jobs))
    total = sum(job.left for job in jobs)
    slice_bytes = max(SLICE_BYTES, total // (max(1, cores) * SLICES) // CHUNK * CHUNK)
    with task(report, "hash", text, total=total) as counter:
        run_jobs(jobs, counter.advance, lanes=cores, slice_bytes=slice_bytes)
    return {key: job.result for key, job in zip(paths, jobs, strict=True)}


@dataclass(slots=True, eq=False)
class _Job:
    """A file on its way through the hash; held by one worker at a time."""

    path: Path
    algorithms: Sequence[Algorithm]
    left: int
    """Bytes that nobody was given yet."""
    position: int = 0
    file: OpenFile | None = None
    stat: Stat = (0, 0, 0)
    error: OSError | None = None
    hashes: dict[Algorithm, Any] = field(default_factory=dict)

    def next_slice(self, slice_bytes: int) -> tuple[range, bool]:
        """Take the next bytes of what is left; return where they are, and whether the page cache has them.

        The first call opens the file and takes its size from there.
        """
        try:
            if self.file is None:
                self.file = OpenFile(self.path)
                self.stat, self.left = self.file.stat, self.file.size
                self.hashes = {algorithm: new_digest(algorithm) for algorithm in self.algorithms}
            begin, count = self.position, min(slice_bytes, self.left)
            self.position, self.left = begin + count, self.left - count
            return range(begin, self.position), self.file.is_cached(begin, self.position)
        except OSError as error:
            self.fail(error)
            return range(0), True

    def read(self, buffer: memoryview, part: range) -> memoryview:
        """Read a range from the disk; what was given up has no bytes."""
        try:
            return buffer[: self.file.from_disk(buffer, part.start, len(part)) if self.file and not self.error else 0]
        except OSError as error:
            self.fail(error)
            return buffer[:0]

    def use(self, buffer: memoryview, part: range, content: memoryview | None) -> None:
        """Hash the next bytes, in place where the page cache has them."""
        try:
            cached = self.file.from_cache(buffer, part.start, part.stop) if self.file and content is None else ()
            for view in cached if content is None else (content,):
                for value in self.hashes.values():
                    value.update(view)
        except OSError as error:
            self.fail(error)

    def fail(self, error: OSError) -> None:
        """Give the file up."""
        self.error, self.left = error, 0

    def close(self) -> None:
        """Close the file; may be called twice."""
        if self.file:
            self.file.close()
            self.file = None

    @property
    def result(self) -> Digests | OSError:
        if self.error is not None:
            return self.error
        return Digests(self.stat, {algorithm: value.hexdigest() for algorithm, value in self.hashes.items()})


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def total_size(paths: Iterable[Path]) -> int:
    """Return the bytes of all files that exist."""
    return sum(_size(path) for path in paths)
