"""What the kernel tells of its page cache: how much of a file is in it, and bringing the rest in."""

import ctypes
import mmap
import os
from pathlib import Path

OVERLAY_MAGIC = 0x794C7630  # linux/magic.h
_CACHESTAT = 451  # the same number on every architecture, since Linux 6.5
_libc = ctypes.CDLL(None, use_errno=True)


def resident_bytes(path: Path) -> int:
    """Return how many bytes of a file are in the page cache, rounded up to pages; reads none of them."""
    with path.open("rb", buffering=0) as stream:
        size = os.fstat(stream.fileno()).st_size
        return min(size, resident_pages(stream.fileno(), 0, size) * mmap.PAGESIZE)


def resident_pages(descriptor: int, offset: int, length: int) -> int:
    """Return how many pages of a range of a file are in the page cache; `offset` is a multiple of the page size."""
    if length == 0:
        return 0
    pages = None if _is_overlay(descriptor) else _cachestat(descriptor, offset, length)
    return _mincore(descriptor, offset, length) if pages is None else pages


def read_ahead(descriptor: int, offset: int, count: int) -> None:
    """Bring a range in: readahead(2) starts the reads and waits for most of them; what cannot is read for real."""
    status = _libc.readahead(descriptor, ctypes.c_int64(offset), ctypes.c_size_t(count))
    if status != 0:
        os.pread(descriptor, count, offset)


def _is_overlay(descriptor: int) -> bool:
    """Tell whether a file lies on overlayfs, whose own inodes hold no pages: they are with the file below.

    A mapping leads to the file below, cachestat(2) does not, and would call a warm file cold.
    """
    answer = ctypes.create_string_buffer(256)  # struct statfs is 120 bytes on 64-bit Linux; its first word is the type
    if _libc.fstatfs(descriptor, answer) != 0:
        return False
    return ctypes.c_long.from_buffer(answer).value == OVERLAY_MAGIC


class _Range(ctypes.Structure):
    _fields_ = (("offset", ctypes.c_uint64), ("length", ctypes.c_uint64))


class _Stat(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint64) for name in ("cache", "dirty", "writeback", "evicted", "recently_evicted"))


def _cachestat(descriptor: int, offset: int, length: int) -> int | None:
    """Return the pages of a range in the page cache by cachestat(2), None where the kernel or a sandbox refuses."""
    answer = _Stat()
    status = _libc.syscall(_CACHESTAT, descriptor, ctypes.byref(_Range(offset, length)), ctypes.byref(answer), 0)
    return int(answer.cache) if status == 0 else None


def _mincore(descriptor: int, offset: int, length: int) -> int:
    """Return the same by mincore(2) over a mapping of the file; a thousand times slower, and everywhere."""
    _libc.mmap.restype = ctypes.c_void_p
    _libc.mmap.argtypes = (
        ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64,
    )  # fmt: skip
    address = _libc.mmap(None, length, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, offset)
    if address in {None, ctypes.c_void_p(-1).value}:
        return 0
    pages = (ctypes.c_ubyte * -(-length // mmap.PAGESIZE))()
    try:
        status = _libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(length), pages)
    finally:
        _libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(length))
    return sum(page & 1 for page in bytes(pages)) if status == 0 else 0
