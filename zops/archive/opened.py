"""An archive with all that it builds on, open: where every file of its snapshots really is."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from zops.archive.access import ReadRange
from zops.archive.age import Opener
from zops.archive.format import Entry
from zops.archive.reader import Archive, OwnArchive, open_stream
from zops.archive.store import DirectoryStore, StoredArchive, open_archive
from zops.errors import ArchiveDamaged, SourceFailed

Location = StoredArchive | Path | str


@dataclass(frozen=True)
class Opened:
    """An open archive.

    Attributes:
        location: where it is, as a path or URL.
        archive: what is in it.
        older: the archives that it builds on, as far down as anything of it is there.
    """

    location: str
    archive: Archive
    older: tuple[OwnArchive, ...] = ()

    def find(self, entry: Entry) -> tuple[OwnArchive, str]:
        """Return where a file that is elsewhere is: the archive and the member's name."""
        found = _find(self.older, entry)
        assert found is not None  # every one was looked for when the archive was opened
        return found


@contextmanager
def opened(location: Location, *, room: int = 1 << 62, chain: bool = True) -> Iterator[Opened]:
    """Open an archive and, unless told not to, those that it builds on.

    Args:
        location: where it is.
        room: bytes of data above which an archive that does not tell its size beforehand is not read on.
        chain: whether to open what it builds on too.

    Raises:
        ArchiveDamaged: when one of them is cut, damaged or hostile, or not the one that was built on.
        SourceFailed: when one of them is not there.
        HostShort: when it holds more than `room`.
    """
    stored = location if isinstance(location, StoredArchive) else open_archive(location)
    with ExitStack() as stack:
        archive = _open(stored, stack, room)
        older = tuple(_older(stored, archive, stack)) if chain and isinstance(archive, OwnArchive) else ()
        yield Opened(stored.location, archive, older)


def _open(stored: StoredArchive, stack: ExitStack, room: int = 1 << 62) -> Archive:
    stream = stack.enter_context(stored.open())
    return open_stream(stream, room=room, read_range=_ranges(stored, stream))


def _ranges(stored: StoredArchive, stream: BinaryIO) -> ReadRange | None:
    """Return what reads ranges of an archive; a file is read better as a file."""
    if stored.encrypted:
        opener = getattr(stream, "raw", None)
        return opener.read_range if isinstance(opener, Opener) else None
    if isinstance(stored.store, DirectoryStore):
        return None
    return lambda start, end: stored.store.read_range(stored.name, start, end)


def _older(stored: StoredArchive, archive: OwnArchive, stack: ExitStack) -> Iterator[OwnArchive]:
    """Open what an archive builds on, one after the other, until all that is elsewhere was found."""
    missing = list(archive.index.elsewhere)
    ids = {archive.manifest.id}
    base = archive.manifest.base
    while missing:
        if base is None:
            raise ArchiveDamaged(
                f"{missing[0].member.name!r} is in no archive that {stored.name} builds on",
                hint="restore an archive that stands alone",
                member=missing[0].member.name,
            )
        below = replace(stored, name=base.name)
        try:
            found = _open(below, stack)
        except SourceFailed as error:
            raise SourceFailed(
                f"{stored.name} builds on {below.location}, which cannot be had: {error.message}",
                code="archive-base-missing" if error.code == "archive-not-found" else error.code,
                hint="bring it back into the store, or restore an archive that stands alone",
            ) from error
        if not isinstance(found, OwnArchive) or found.manifest.id != base.id or found.manifest.id in ids:
            raise ArchiveDamaged(
                f"{below.location} is not the archive that {stored.name} builds on", hint="bring that one back"
            )
        ids.add(found.manifest.id)
        yield found
        missing = [entry for entry in missing if _find([found], entry) is None]
        base = found.manifest.base


def _find(archives: "tuple[OwnArchive, ...] | list[OwnArchive]", entry: Entry) -> tuple[OwnArchive, str] | None:
    for archive in archives:
        name = archive.by_content.get((entry.sha256, entry.member.size))
        if name is not None:
            return archive, name
    return None
