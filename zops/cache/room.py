"""Whether a disk can take what is about to be written: asked before the first byte, told when it runs out after all."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from zops.errors import HostShort
from zops.events import Report, Warned
from zops.host.disk import disk_of, nearest_existing

# Left free beside the snapshot: manifest, marker, directories, and what else writes to the disk meanwhile.
RESERVE_BYTES = 64 << 20
RESERVE_INODES = 64

FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_CLOSED = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})


def check_room(place: Path, size: int, files: int, report: Report) -> None:
    """Refuse to begin what cannot end: `files` files of `size` bytes altogether, under `place`.

    Raises:
        HostShort: when bytes, inodes or write access lack.
    """
    existing = nearest_existing(place)
    if not os.access(existing, os.W_OK | os.X_OK):
        raise HostShort(f"cannot write in {existing}", code="cache-not-writable", hint="set another cache.dir")
    disk = disk_of(place)
    needed = size + RESERVE_BYTES
    if disk.free_bytes < needed:
        raise HostShort(
            f"{existing} has {disk.free_bytes / 1e9:.2f} GB free, {needed / 1e9:.2f} GB are needed",
            code="disk-full",
            hint="free space or set another cache.dir",
            free_bytes=disk.free_bytes,
            needed_bytes=needed,
        )
    if disk.free_inodes is not None and disk.free_inodes < files + RESERVE_INODES:
        raise HostShort(
            f"{existing} has {disk.free_inodes} inodes free, {files + RESERVE_INODES} are needed",
            code="disk-full",
            hint="remove small files there or set another cache.dir",
        )
    if disk.is_network:
        report(Warned(f"{existing} is on a network file system ({disk.mount.system}); loading from it is slow"))
    if disk.is_volatile:
        report(
            Warned(
                f"{existing} is in memory ({disk.mount.system}): it takes what instances need, and ends with the host"
            )
        )


def shortage(error: OSError) -> HostShort | None:
    """Return what an operating system's error means for the operator, None when it says nothing of room or access."""
    if error.errno in FULL:
        hint = "free space or set another cache.dir; what arrived is kept"
        return HostShort(f"the disk is full: {error}", code="disk-full", hint=hint)
    if error.errno in _CLOSED:
        return HostShort(f"cannot write: {error}", code="cache-not-writable", hint="set another cache.dir")
    return None


@contextmanager
def shortage_told() -> Iterator[None]:
    """Turn errors of a full or closed disk in the block into `HostShort`."""
    try:
        yield
    except OSError as error:
        short = shortage(error)
        if short is None:
            raise
        raise short from error
