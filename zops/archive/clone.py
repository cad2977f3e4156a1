"""Ranges of files that share their blocks on the disk: on XFS and btrfs a copy that copies nothing."""

import errno
import fcntl
import os
import struct
import tempfile
from pathlib import Path

from zops.archive.format import ALIGNMENT
from zops.archive.pieces import Layout
from zops.archive.pipeline import wrong
from zops.archive.plan import Source
from zops.archive.tar import padding
from zops.cache.blocks import clone

# ioctl number of FICLONERANGE, from linux/fs.h: _IOW(0x94, 13, struct file_clone_range).
FICLONERANGE = 0x4020940D
_RANGE = struct.Struct("=qQQQ")
LEAST = 64 << 10
"""Smaller files are copied: file systems keep some of them in their metadata, where nothing can be shared."""


def can_clone(source: Path, directory: Path) -> bool:
    """Tell, by trying, whether files in a directory can share the blocks of a file."""
    try:
        with source.open("rb") as reader, tempfile.TemporaryFile(dir=directory) as writer:
            return clone(reader.fileno(), writer.fileno())
    except OSError:
        return False


def clone_range(reader: int, start: int, count: int, writer: int, target: int) -> None:
    """Let a range of one file share the blocks of a range of another; all three numbers are multiples of 4096.

    Raises:
        OSError: when the file system cannot, or refuses.
    """
    fcntl.ioctl(writer, FICLONERANGE, _RANGE.pack(reader, start, count, target))


def clone_tar(layout: Layout, descriptor: int) -> bool:
    """Make a tar whose files share the blocks of the snapshot's, in an empty file; what is not whole blocks is copied.

    Returns:
        Whether the file system could; where not, the file holds something or nothing.

    Raises:
        SnapshotDamaged: when a file is not there, or not as it was when it was planned.
        OSError: when the disk is full or fails.
    """
    try:
        position = 0
        for item, header in zip(layout.items, layout.headers, strict=True):
            _pwrite(descriptor, header, position)
            position += len(header)
            if item.source and item.member.size:
                _clone_file(item.source, descriptor, position)
            else:
                _pwrite(descriptor, item.content, position)
            position += item.member.size + padding(item.member.size)
        os.ftruncate(descriptor, layout.end)
    except OSError as error:
        if error.errno not in {errno.EINVAL, errno.EOPNOTSUPP, errno.EXDEV, errno.ENOTTY}:
            raise
        return False
    return True


def _clone_file(source: Source, descriptor: int, position: int) -> None:
    try:
        stream = source.file.open("rb", buffering=0)
    except (FileNotFoundError, NotADirectoryError):
        raise wrong(source, "missing") from None
    with stream:
        if os.fstat(stream.fileno()).st_size != source.size:
            raise wrong(source, "wrong-size")
        whole = source.size // ALIGNMENT * ALIGNMENT if source.size >= LEAST else 0
        if whole:
            clone_range(stream.fileno(), 0, whole, descriptor, position)
        done = whole
        while done < source.size and (block := os.pread(stream.fileno(), source.size - done, done)):
            _pwrite(descriptor, block, position + done)
            done += len(block)


def _pwrite(descriptor: int, data: bytes, position: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], position + done)
