"""The bytes of a file for a hash: out of the page cache where they are in it, from the disk itself where they are not.

A serving host keeps its warm cache: what is not in the page cache is read past it (O_DIRECT), into buffers in huge
pages, which a disk fills twice as fast as others. What is there already is hashed in place, without a copy.
"""

import ctypes
import errno
import fcntl
import mmap
import os
import signal
from collections.abc import Generator, Iterator
from contextlib import suppress
from pathlib import Path

from zops.cache.pages import resident_pages

CHUNK = 8 << 20
"""Bytes that are read and hashed at a time. Disks reach their speed with 4 MiB, larger ones gain nothing."""

HUGE_PAGE = 2 << 20
# Below this, finding out where a file is costs more than reading it.
SMALL = 1 << 20
# The kernel drops a page here and there from a warm file; reading all of a range past the cache for their sake costs
# more than reading them in, and little is added to the cache.
WARM_SHARE = 0.9
# Through the page cache in blocks that stay in a core's second-level cache between the copy and the hash.
BLOCK = 256 << 10

_POPULATE_READ = 22  # MADV_POPULATE_READ, since Linux 5.14; Python 3.11 does not name it


def new_buffer(size: int = CHUNK) -> memoryview:
    """Return `size` bytes on a border of huge pages and, where the kernel has some, in huge pages."""
    area = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):
        area.madvise(mmap.MADV_HUGEPAGE)
    start = -ctypes.addressof(ctypes.c_char.from_buffer(area)) % HUGE_PAGE
    return memoryview(area)[start : start + size]


class OpenFile:
    """A file that is read range by range, by one thread at a time.

    Attributes:
        stat: size, modification time in ns and inode when it was opened, and so before anything was read.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        found = os.fstat(self._descriptor)
        self.stat = (found.st_size, found.st_mtime_ns, found.st_ino)
        self._direct = self._refused = self._leased = False

    @property
    def size(self) -> int:
        """Bytes of the file when it was opened."""
        return self.stat[0]

    def close(self) -> None:
        """Close the file; what `cached` yielded must be released by then."""
        os.close(self._descriptor)

    def is_cached(self, start: int, stop: int) -> bool:
        """Tell whether nearly all of a range is in the page cache, or it is so small that it does not matter."""
        if self.size <= SMALL:
            return True
        pages = -(-(stop - start) // mmap.PAGESIZE)
        return resident_pages(self._descriptor, start, stop - start) >= WARM_SHARE * pages

    def from_disk(self, buffer: memoryview, start: int, count: int) -> int:
        """Fill a buffer of `new_buffer` from the disk, past the page cache where the file system can.

        Args:
            buffer: where to read to.
            start: where to read from, a multiple of 4 KiB.
            count: how many bytes.

        Returns:
            How many there were; fewer than `count` when the file was cut since it was opened.
        """
        got = self._past_cache(buffer, start, count)
        return self._read_fully(buffer, start, count) if got is None else got

    def _past_cache(self, buffer: memoryview, start: int, count: int) -> int | None:
        """Read by O_DIRECT; None where the file system cannot."""
        self._set_direct(wanted=True)
        if not self._direct:
            return None
        try:
            return self._read_fully(buffer, start, count)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._set_direct(wanted=False)
            self._refused = True
            return None

    def copy_cached(self, buffer: memoryview, start: int, count: int) -> int:
        """Fill a buffer through the page cache; otherwise as `from_disk`."""
        self._set_direct(wanted=False)
        return self._read_fully(buffer, start, count)

    def _read_fully(self, buffer: memoryview, start: int, count: int) -> int:
        done = 0
        # O_DIRECT wants whole blocks; at the end of the file there are just fewer bytes in the last one.
        end = -(-count // mmap.PAGESIZE) * mmap.PAGESIZE if self._direct else count
        while done < count and (got := os.preadv(self._descriptor, [buffer[done:end]], start + done)):
            done += got
        return min(done, count)

    def _cold_ranges(self, start: int, stop: int) -> Iterator[range]:
        """Yield what of a range is not in the page cache, in whole pages; `start` is a multiple of theirs."""
        pages = -(-(stop - start) // mmap.PAGESIZE)
        resident = resident_pages(self._descriptor, start, stop - start)
        if not resident:
            yield range(start, stop)
        elif resident < pages:
            middle = start + pages // 2 * mmap.PAGESIZE
            yield from self._cold_ranges(start, middle)
            yield from self._cold_ranges(middle, stop)

    def unobtrusively(self, buffer: memoryview, start: int, count: int) -> int:
        """Fill a buffer as `from_disk` does, and leave in the page cache what is in it, and nothing more.

        What is there already comes from there. Where the file system cannot read past the page cache, only the pages
        that were not there before are dropped from it.
        """
        if resident_pages(self._descriptor, start, count) < -(-count // mmap.PAGESIZE):
            got = self._past_cache(buffer, start, count)
            if got is not None:
                return got
            cold = list(self._cold_ranges(start, start + count))
        else:
            cold = []
        self._set_direct(wanted=False)
        # No read-ahead: it would bring in what nobody asked for.
        os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        got = self._read_fully(buffer, start, count)
        for part in cold:
            os.posix_fadvise(self._descriptor, part.start, len(part), os.POSIX_FADV_DONTNEED)
        return got

    def from_cache(self, buffer: memoryview, start: int, stop: int) -> Iterator[memoryview]:
        """Yield a range through the page cache, in place where that is safe; a view is good until the next one."""
        self._set_direct(wanted=False)
        if self.size > SMALL:
            start = yield from self._mapped(start, stop)
        while start < stop:
            got = os.preadv(self._descriptor, [buffer[: min(BLOCK, stop - start)]], start)
            if not got:
                return
            yield buffer[:got]
            start += got

    def _mapped(self, start: int, stop: int) -> Generator[memoryview, None, int]:
        """Yield the range in place as far as that is safe; its return value tells how far.

        A mapped file that is cut while it is read ends the process (SIGBUS). Hence the lease: while it holds, nobody
        can open the file for writing or cut it; whoever wants to waits until it is given back, at the next chunk.
        """
        try:
            while start < stop and self._holds_lease():
                length = min(CHUNK, stop - start)
                with mmap.mmap(
                    self._descriptor, length, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ, offset=start
                ) as area:
                    # Tells of what cannot be read by an error instead of a signal.
                    area.madvise(_POPULATE_READ)
                    with memoryview(area) as view:
                        yield view
                start += length
        except OSError:
            # Reading is the way out of everything here; what is wrong with the file is told by that.
            pass
        finally:
            self._end_lease()
        return start

    def _holds_lease(self) -> bool:
        """Take the lease or keep it; tell whether it holds, with nobody waiting. Only a file's owner gets one."""
        try:
            if not self._leased:
                # The signal that tells of a waiting writer is one that is ignored: the state is asked for instead.
                fcntl.fcntl(self._descriptor, fcntl.F_SETSIG, signal.SIGURG)
                fcntl.fcntl(self._descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)
                self._leased = True
            return fcntl.fcntl(self._descriptor, fcntl.F_GETLEASE) == fcntl.F_RDLCK
        except OSError:
            return False

    def _end_lease(self) -> None:
        if self._leased:
            self._leased = False
            with suppress(OSError):
                fcntl.fcntl(self._descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)

    def _set_direct(self, *, wanted: bool) -> None:
        if self._direct == wanted or (wanted and self._refused):
            return
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        try:
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags ^ os.O_DIRECT)
        except OSError:
            self._refused = True
        else:
            self._direct = wanted
