"""Files as a restore makes them: room taken first, written past the page cache, durable when they are done."""

import errno
import fcntl
import mmap
import os
from pathlib import Path

from zops.archive.clone import clone_range
from zops.archive.tar import Member
from zops.cache.blocks import reserve as take_room
from zops.cache.reading import SMALL


class NewFile:
    """A file that is written from its beginning to its end, by one thread at a time."""

    def __init__(self, path: Path, member: Member, *, reserve: bool = True) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._member = member
        self._position = 0
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self._direct = False
        try:
            if member.size and reserve:
                take_room(self._descriptor, member.size)
            if member.size > SMALL:
                self._set_direct(wanted=True)
        except BaseException:
            self.close()
            raise

    def write(self, content: memoryview, buffer: memoryview | None = None) -> None:
        """Write the next bytes.

        Args:
            content: the bytes.
            buffer: what they lie at the beginning of, on a border of pages; without it they are copied.

        Raises:
            OSError: when the disk is full or fails.
        """
        direct = self._direct and buffer is not None and self._position % mmap.PAGESIZE == 0
        if self._direct and not direct:
            self._set_direct(wanted=False)
        # O_DIRECT wants whole blocks: behind the end of the file too much is written, and cut off at last.
        end = -(-len(content) // mmap.PAGESIZE) * mmap.PAGESIZE if direct else len(content)
        block = buffer[:end] if direct and buffer is not None else content
        done = 0
        while done < len(content):
            try:
                done += os.pwrite(self._descriptor, block[done:], self._position + done)
            except OSError as error:
                if error.errno != errno.EINVAL or not self._direct:
                    raise
                self._set_direct(wanted=False)
                block = content
        self._position += len(content)

    def share(self, reader: int, start: int, end: int) -> None:
        """Share the blocks of another file instead of writing.

        Args:
            reader: descriptor of that file.
            start: where the data begins in it, on a border of blocks.
            end: its size.

        Raises:
            OSError: when the file system cannot.
        """
        whole = -(-self._member.size // mmap.PAGESIZE) * mmap.PAGESIZE
        clone_range(reader, start, min(whole, end - start), self._descriptor, 0)
        os.ftruncate(self._descriptor, self._member.size)

    def done(self) -> None:
        """Give the file its size, mode and time, and make it durable."""
        os.ftruncate(self._descriptor, self._member.size)
        os.fchmod(self._descriptor, self._member.mode | 0o400)
        os.utime(self._descriptor, (self._member.mtime, self._member.mtime))
        os.fsync(self._descriptor)
        self.close()

    def close(self) -> None:
        """Close the file; may be called twice."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1

    def _set_direct(self, *, wanted: bool) -> None:
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        try:
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags | os.O_DIRECT if wanted else flags & ~os.O_DIRECT)
        except OSError:
            return  # a file system that refuses: through the page cache, then
        self._direct = wanted
