"""One file of a derived snapshot, made in one pass: read, hashed, cast where it is to be, hashed again, written.

Two threads share a file: one reads and hashes what the parent has, the other casts, hashes and writes what becomes of
it. Blocks go between them in a few buffers that are made once, so the size of a file makes no difference to memory.
"""

import ctypes
import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from queue import SimpleQueue

from zops.cache.blocks import clone
from zops.cache.cast import Caster, Recast, Run
from zops.cache.hashing import sha256_file
from zops.cache.manifest import sync_directory

# Large enough for a disk, small enough that what one thread wrote is still in the cache of the other.
BLOCK = 2 << 20
BUFFERS = 4
# How far ahead the kernel is asked to read: its own read-ahead (128 KiB by default) leaves a disk idle during hashing.
READ_AHEAD = 8 * BLOCK
# From linux/fs.h. Begins to write what is dirty and does not wait; else all of a file would wait for the fsync.
_SYNC_FILE_RANGE_WRITE = 2
_libc = ctypes.CDLL(None, use_errno=True)

Advance = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Derived:
    """The SHA-256 of a file as it was read, and of what was written for it."""

    origin_sha256: str
    sha256: str


def derive_file(origin: Path, target: Path, how: Recast | None, advance: Advance) -> Derived:
    """Write `target` from `origin`, cast as `how` says or as it is, durably; an unfinished target is removed.

    A file that stays as it is shares its blocks with the origin where the file system can do that, and is copied
    elsewhere; never a hard link, since through one of those either snapshot could change the other.

    Args:
        origin: the parent's file; links are followed.
        target: the file to be written; what is there is replaced.
        how: the plan of the cast, None to take the file as it is.
        advance: told of every byte of the origin that is done; what it raises ends the work.

    Raises:
        OSError: when reading or writing fails.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        with origin.open("rb", buffering=0) as reader, target.open("xb", buffering=0) as writer:
            if how is None and clone(reader.fileno(), writer.fileno()):
                digest = sha256_file(target, advance)
                result = Derived(digest, digest)
            else:
                result = _transcribe(reader, writer, how, advance)
            os.fsync(writer.fileno())
    except BaseException:
        target.unlink(missing_ok=True)
        raise
    sync_directory(target.parent)
    return result


@dataclass(slots=True)
class _Block:
    """Bytes on their way from the reading thread to the writing one."""

    buffer: bytearray = field(default_factory=lambda: bytearray(BLOCK))
    size: int = 0
    cast: bool = False

    @property
    def view(self) -> memoryview:
        return memoryview(self.buffer)[: self.size]


def _transcribe(reader: FileIO, writer: FileIO, how: Recast | None, advance: Advance) -> Derived:
    size = os.fstat(reader.fileno()).st_size
    os.posix_fadvise(reader.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
    found, written = hashlib.sha256(), hashlib.sha256()
    caster = None
    runs: tuple[Run, ...] = (Run(size, cast=False),)
    if how is not None:
        found.update(reader.read(how.old_header_size))
        _write(writer, memoryview(how.header))
        written.update(how.header)
        advance(how.old_header_size)
        caster, runs = Caster(), how.runs
    end = writer.tell()
    half = memoryview(bytearray(BLOCK // 2))
    with _read_ahead(reader, runs, found.update) as blocks:
        for block in blocks:
            output = block.view
            if caster and block.cast:
                output = half[: block.size // 2]
                caster.cast(block.view, output)
            if caster:
                written.update(output)
            _write(writer, output)
            _libc.sync_file_range(
                writer.fileno(), ctypes.c_int64(end), ctypes.c_int64(len(output)), _SYNC_FILE_RANGE_WRITE
            )
            end += len(output)
            advance(block.size)
    digest = found.hexdigest()
    return Derived(digest, written.hexdigest() if caster else digest)


@contextmanager
def _read_ahead(
    reader: FileIO, runs: tuple[Run, ...], update: Callable[[memoryview], None]
) -> Iterator[Iterator[_Block]]:
    """Yield the blocks of a file as another thread reads and hashes them; a file that is too short just ends.

    A block belongs to whoever iterates until the next one is asked for.
    """
    empty: SimpleQueue[_Block | None] = SimpleQueue()
    filled: SimpleQueue[_Block | None] = SimpleQueue()
    for _ in range(BUFFERS):
        empty.put(_Block())

    def read() -> None:
        offset = reader.tell()
        try:
            for run in runs:
                left = run.size
                while left:
                    block = empty.get()
                    if block is None:
                        return
                    block.size, block.cast = min(BLOCK, left), run.cast
                    os.posix_fadvise(reader.fileno(), offset + READ_AHEAD, BLOCK, os.POSIX_FADV_WILLNEED)
                    offset += block.size
                    if not _fill(reader, block.view):
                        return
                    update(block.view)
                    left -= block.size
                    filled.put(block)
        finally:
            filled.put(None)

    def blocks() -> Iterator[_Block]:
        while (block := filled.get()) is not None:
            yield block
            empty.put(block)

    with ThreadPoolExecutor(1, thread_name_prefix="slim-read") as pool:
        future = pool.submit(read)
        try:
            yield blocks()
        finally:
            empty.put(None)
        future.result()


def _fill(reader: FileIO, view: memoryview) -> bool:
    """Read exactly as much as fits; False at an early end of the file."""
    while view:
        count = reader.readinto(view)
        if not count:
            return False
        view = view[count:]
    return True


def _write(writer: FileIO, view: memoryview) -> None:
    while view:
        view = view[writer.write(view) :]
