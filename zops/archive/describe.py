"""What an archive is, told without reading its data: members, sizes, how much was saved, and what it builds on."""

from dataclasses import dataclass

from zops.archive.contents import Contained
from zops.archive.format import ArchiveManifest
from zops.archive.opened import Location, opened
from zops.archive.reader import OwnArchive
from zops.archive.tar import Member


@dataclass(frozen=True)
class Description:
    """What an archive says of itself.

    Attributes:
        archive: where it is.
        size: its bytes, as stored; of an encrypted one, as decrypted.
        compression: zstd, gzip or none; unknown for one that zops did not make.
        manifest: who made it, when, of what; None for one that zops did not make.
        members: everything in it, in order.
        snapshots: what can be restored from it.
        chain: ids and names of the archives that it builds on, youngest first.
    """

    archive: str
    size: int
    compression: str
    manifest: ArchiveManifest | None
    members: tuple[Member, ...]
    snapshots: tuple[Contained, ...]
    chain: tuple[tuple[str, str], ...] = ()

    @property
    def content_size(self) -> int:
        """Bytes of all files in it."""
        return sum(member.size for member in self.members)

    @property
    def ratio(self) -> float:
        """Its size as a share of what is in it."""
        return self.size / self.content_size if self.content_size else 1.0


def describe(archive: Location, *, model: str | None = None) -> Description:
    """Describe an archive. Of one that zops made, only the end and the beginning are read.

    Args:
        archive: where it is.
        model: names the snapshot of an archive that does not tell.

    Raises:
        ArchiveDamaged: when it is cut, damaged or hostile.
        SourceFailed: when it, or one that it builds on, is not there.
    """
    with opened(archive) as source:
        found = source.archive
        own = isinstance(found, OwnArchive)
        chain = []
        manifest = found.manifest
        for older in source.older:
            assert manifest is not None
            assert manifest.base is not None  # it is what led there
            chain.append((manifest.base.id, manifest.base.name))
            manifest = older.manifest
        return Description(
            source.location,
            found.stored_size,
            found.index.compression if isinstance(found, OwnArchive) else "unknown",
            found.manifest,
            found.members,
            found.snapshots() if own else found.snapshots(model),
            tuple(chain),
        )


__all__ = ["Description", "describe"]
