"""The page cache: how much of a snapshot is in it, and bringing the rest in before a loader asks."""

import ctypes
import mmap
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from zops.cache.manifest import read_manifest
from zops.cache.source import walk
from zops.events import Report, Warned, task
from zops.host.memory import read_memory

# One WILLNEED or readahead over a whole file is cut to a few MiB by the kernel; in such steps it is not.
STEP = 8 << 20
# Two threads keep a local SSD busy: 2.5 GB/s against 0.7 GB/s of `cat` on the machine where this was measured.
THREADS = 2
# Left untouched: what an instance needs to start, and the share of memory that keeps a host responsive.
RESERVE_BYTES = 2 << 30
RESERVE_SHARE = 0.05
# In the order in which the pipeline's loader reads them.
LOADING_ORDER = ("text_encoder", "transformer", "vae")

OVERLAY_MAGIC = 0x794C7630  # linux/magic.h
_CACHESTAT = 451  # the same number on every architecture, since Linux 6.5
_libc = ctypes.CDLL(None, use_errno=True)


class Residency(NamedTuple):
    """Bytes of a snapshot in the page cache, and bytes of it altogether."""

    resident: int
    total: int

    @property
    def share(self) -> float:
        """Share in memory, from 0 to 1; an empty snapshot is all there."""
        return self.resident / self.total if self.total else 1.0


@dataclass(frozen=True, slots=True)
class Warming:
    """What warming did: residency before and after, whether the memory guard stopped it, and how long it took."""

    before: Residency
    after: Residency
    stopped: bool
    seconds: float

    @property
    def before_share(self) -> float:
        """Share in memory before."""
        return self.before.share

    @property
    def after_share(self) -> float:
        """Share in memory afterwards."""
        return self.after.share


def residency(snapshot: Path) -> Residency:
    """Return how much of a snapshot is in the page cache; reads none of it."""
    total = resident = 0
    for path in _in_loading_order(snapshot):
        size = path.stat().st_size
        total += size
        resident += min(size, resident_bytes(path)) if size else 0
    return Residency(resident, total)


def room() -> int:
    """Return the bytes that may be brought into the page cache before the memory guard says no."""
    memory = read_memory()
    return max(0, memory.usable_bytes - max(RESERVE_BYTES, int(memory.total_bytes * RESERVE_SHARE)))


def warm(snapshot: Path, report: Report, *, room_bytes: Callable[[], int] = room) -> Warming:
    """Bring a snapshot into the page cache, in loading order; stop before other things are pushed out.

    Args:
        snapshot: the snapshot's directory.
        report: told of the progress, and warned when the guard stops.
        room_bytes: asked before every step how many bytes may still be brought in.
    """
    began = time.monotonic()
    before = residency(snapshot)
    # What is cached counts as available, so the kernel's number does not fall while this warms: a budget must.
    guard = _Guard(room_bytes, room_bytes() - before.resident)

    def warm_file(path: Path, advance: Callable[[int], None]) -> None:
        size = path.stat().st_size
        if resident_bytes(path) >= size:
            advance(size)
            return
        with path.open("rb", buffering=0) as stream:
            for offset in range(0, size, STEP):
                count = min(STEP, size - offset)
                if not guard.allows(count):
                    return
                _read_ahead(stream.fileno(), offset, count)
                advance(count)

    with task(report, "warm", f"warming {snapshot.name}", total=before.total) as counter:
        pool = ThreadPoolExecutor(THREADS, thread_name_prefix="warm")
        try:
            futures = [pool.submit(warm_file, path, counter.advance) for path in _in_loading_order(snapshot)]
            for future in futures:
                future.result()
        except BaseException:
            guard.stopped.set()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
    after = residency(snapshot)
    if guard.stopped.is_set():
        report(Warned(f"stopped at {after.share:.0%} in memory: more would push out what this host needs"))
    return Warming(before, after, guard.stopped.is_set(), time.monotonic() - began)


class _Guard:
    """Lets warming go on while it stays within its budget and the host has room."""

    def __init__(self, room_bytes: Callable[[], int], budget: int) -> None:
        self.stopped = threading.Event()
        self._room_bytes = room_bytes
        self._budget = budget
        self._lock = threading.Lock()

    def allows(self, count: int) -> bool:
        """Take `count` bytes out of the budget; once refused, everything is."""
        with self._lock:
            self._budget -= count
            if self._budget < 0 or self._room_bytes() < count:
                self.stopped.set()
            return not self.stopped.is_set()


def resident_bytes(path: Path) -> int:
    """Return how many bytes of a file are in the page cache, rounded up to pages."""
    with path.open("rb", buffering=0) as stream:
        size = os.fstat(stream.fileno()).st_size
        if size == 0:
            return 0
        pages = None if _is_overlay(stream.fileno()) else _cachestat(stream.fileno(), size)
        if pages is None:
            pages = _mincore(stream.fileno(), size)
    return min(size, pages * mmap.PAGESIZE)


def _in_loading_order(snapshot: Path) -> list[Path]:
    """Return the snapshot's files as the loader reads them: small ones, then component by component, shard by shard."""
    manifest = read_manifest(snapshot)
    names = [entry.path for entry in manifest.files] if manifest else list(walk(snapshot))

    def order(name: str) -> tuple[int, str]:
        component = name.partition("/")[0]
        heavy = name.endswith(".safetensors")
        return (1 + LOADING_ORDER.index(component) if heavy and component in LOADING_ORDER else 0, name)

    return [snapshot / name for name in sorted(names, key=order) if (snapshot / name).is_file()]


def _read_ahead(descriptor: int, offset: int, count: int) -> None:
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


def _cachestat(descriptor: int, size: int) -> int | None:
    """Return the pages of a file in the page cache by cachestat(2), None where the kernel or a sandbox refuses."""
    answer = _Stat()
    status = _libc.syscall(_CACHESTAT, descriptor, ctypes.byref(_Range(0, size)), ctypes.byref(answer), 0)
    return int(answer.cache) if status == 0 else None


def _mincore(descriptor: int, size: int) -> int:
    """Return the same by mincore(2) over a mapping of the file; a thousand times slower, and everywhere."""
    _libc.mmap.restype = ctypes.c_void_p
    _libc.mmap.argtypes = (
        ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64,
    )  # fmt: skip
    address = _libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
    if address in {None, ctypes.c_void_p(-1).value}:
        return 0
    pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
    try:
        status = _libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), pages)
    finally:
        _libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(size))
    return sum(page & 1 for page in bytes(pages)) if status == 0 else 0
