"""Looking at archives: what one says of itself, whether every byte of it is right, how it differs from another."""

import time
from dataclasses import dataclass

from zops.archive.format import ArchiveManifest, Entry
from zops.archive.opened import Location, opened
from zops.archive.unpack import Nowhere
from zops.cache.manifest import few
from zops.errors import ArchiveDamaged
from zops.events import Report, silent, task


@dataclass(frozen=True, slots=True)
class ArchiveCheck:
    """What reading a whole archive told; `verified` is False where nothing in it vouches for its content."""

    archive: str
    manifest: ArchiveManifest | None
    members: int
    size: int
    verified: bool
    seconds: float


def read_manifest_of(archive: Location) -> ArchiveManifest | None:
    """Return what an archive says of itself, without reading it whole; None when zops did not make it.

    Raises:
        ArchiveDamaged: when it is cut, damaged or hostile.
    """
    with opened(archive, chain=False) as source:
        return source.archive.manifest


def verify_archive(archive: Location, report: Report = silent) -> ArchiveCheck:
    """Read an archive whole and check every byte of it against its index and manifest; the chain must be complete.

    Raises:
        ArchiveDamaged: naming every member that is wrong, as far as they can be told apart.
        SourceFailed: when an archive that it builds on is not there.
    """
    began = time.monotonic()
    damage: dict[str, ArchiveDamaged] = {}

    def note(entry: Entry, error: ArchiveDamaged) -> None:
        damage.setdefault(str(error.details.get("member", entry.member.name)), error)

    with opened(archive) as source:
        found = source.archive
        files = [member.name for member in found.members if member.kind == "file"]
        with task(report, "verify-archive", f"verifying {source.location}", total=found.size) as progress:
            found.unpack(files, lambda _: Nowhere(), progress.advance, on_damage=note)
    if len(damage) == 1:
        raise next(iter(damage.values()))
    if damage:
        names = sorted(damage)
        raise ArchiveDamaged(f"{len(names)} members of {source.location} are damaged: {few(names)}", members=names)
    vouched = found.manifest is not None
    return ArchiveCheck(
        source.location, found.manifest, len(found.members), found.size, vouched, time.monotonic() - began
    )
