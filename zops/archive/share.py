"""Restoring without copying: on XFS and btrfs, files share the blocks of an uncompressed archive."""

import errno
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

from zops.archive.clone import LEAST
from zops.archive.format import ALIGNMENT
from zops.archive.reader import OwnArchive
from zops.archive.staged import Place, StagedFile
from zops.cache.hashing import hash_files
from zops.cache.room import FULL
from zops.errors import ArchiveDamaged
from zops.events import Report


def share(
    archive: OwnArchive, places: Mapping[str, Sequence[Place]], advance: Callable[[int], None], report: Report
) -> set[str]:
    """Make the files that can share the blocks of an archive, each hashed from its own name afterwards.

    Args:
        archive: where they are.
        places: member -> the files that shall have its data.
        advance: is told of the bytes that are there.
        report: is told of the progress of hashing.

    Returns:
        The members that need not be unpacked any more.

    Raises:
        ArchiveDamaged: when the data is not what the index says.
        OSError: when the disk is full.
    """
    reader = archive.descriptor
    if reader is None:
        return set()
    with ExitStack() as stack:
        shared: dict[str, StagedFile] = {}
        for name, wanted in places.items():
            entry = archive.entries[name]
            if entry.member.size < LEAST or entry.offset % ALIGNMENT:
                continue
            file = StagedFile(wanted, reserve=False)
            stack.callback(file.close)
            if not _shared(file, reader, entry.offset):
                file.remove()
                break
            shared[name] = file
        found = hash_files({name: file.path for name, file in shared.items()}, report, "hashing what was cloned")
        for name, result in found.items():
            if isinstance(result, OSError):
                raise result
            if result[0] != archive.entries[name].sha256:
                raise ArchiveDamaged(
                    f"{name!r} in the archive has another SHA-256 than it was written with",
                    hint="take another archive, or fetch with: zops cache pull",
                    member=name,
                )
            shared[name].done(result[0])
            advance(result[1][0])
        return set(shared)


def _shared(file: StagedFile, reader: int, start: int) -> bool:
    """Tell whether the files share their blocks with the archive now; False where the file system cannot."""
    end = os.fstat(reader).st_size
    try:
        file.each(lambda new: new.share(reader, start, end))
    except OSError as error:
        if error.errno in FULL or error.errno == errno.EIO:
            raise
        return False
    return True
