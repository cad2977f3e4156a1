"""What an archive holds, as far as restoring it needs to know: its snapshots, and which member becomes which file."""

import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from zops.archive.format import (
    CHUNK,
    MANIFEST_NAME,
    SIDECAR_MANIFEST,
    ArchiveManifest,
    Entry,
    Index,
    blocks,
    check_names,
)
from zops.archive.tar import END
from zops.cache.manifest import Manifest
from zops.errors import ArchiveDamaged

MEMBER_LIMIT = 200_000
"""More members than this are no cache of models: a snapshot has twenty files, a busy cache some thousand."""


@dataclass(frozen=True)
class Contained:
    """A snapshot in an archive.

    Attributes:
        root: its directory in the archive.
        model, revision: what it is.
        manifest: what it must contain; None when nobody vouches for it, and it is described after it was read.
        files: path in the snapshot -> name of the member with its content.
        links: path in the snapshot -> relative target, another file of the same snapshot.
        directories: path in the snapshot -> permission bits; the snapshot itself is the empty path.
        left_out: names of members below the root that are not restored.
    """

    root: str
    model: str
    revision: str
    manifest: Manifest | None
    files: Mapping[str, str]
    links: Mapping[str, str] = field(default_factory=dict)
    directories: Mapping[str, int] = field(default_factory=dict)
    left_out: Sequence[str] = ()


def check_index(index: Index) -> None:
    """Check that an index can be true: names, sizes and places of members and frames fit each other.

    Raises:
        ArchiveDamaged: naming what does not.
    """
    if not index.entries or index.entries[0].member.name != MANIFEST_NAME or len(index.entries) > MEMBER_LIMIT:
        raise ArchiveDamaged("the archive's index does not begin with its manifest, or has too many members")
    check_names(entry.member for entry in index.entries)
    position = 0
    for entry in index.entries:
        if entry.member.kind == "file":
            if entry.offset < position:
                raise ArchiveDamaged(f"the index places {entry.member.name!r} inside another member")
            position = entry.offset + blocks(entry.member.size)
    if position > index.end:
        raise ArchiveDamaged("the index places a member behind the end of the archive")
    if index.frames:
        sizes = [frame.size for frame in index.frames]
        if max(sizes) > CHUNK or min(sizes) < 1 or sum(sizes) != index.end + len(END):
            raise ArchiveDamaged("the frames in the index do not add up to the archive")


def contained(index: Index, manifest: ArchiveManifest) -> tuple[Contained, ...]:
    """Match the index with the archive's manifest: every file of every snapshot, and nothing else.

    Raises:
        ArchiveDamaged: naming the member that is missing, too many, or contradicts its manifest.
    """
    if index.archive != manifest.id:
        raise ArchiveDamaged("the archive's index belongs to another archive")
    entries = {entry.member.name: entry for entry in index.entries[1:]}
    snapshots = tuple(_contained(root, m, entries) for root, m in manifest.snapshots.items())
    stray = next((name for name, e in entries.items() if e.member.kind != "directory"), None)
    if stray:
        raise ArchiveDamaged(f"{stray!r} belongs to no snapshot in the archive", code="archive-hostile", member=stray)
    return snapshots


def _contained(root: str, manifest: Manifest, entries: dict[str, Entry]) -> Contained:
    """Take the members of one snapshot out of `entries`."""
    files: dict[str, str] = {}
    links: dict[str, str] = {}
    known = {file.path: file for file in manifest.files}
    for path, file in known.items():
        entry = entries.pop(f"{root}/{path}", None)
        if entry is None:
            raise ArchiveDamaged(f"{path!r} of {manifest.model} is not in the archive", member=path)
        if entry.member.kind == "symlink":
            target = known.get(posixpath.normpath(posixpath.join(posixpath.dirname(path), entry.member.link)))
            if target is None or (target.size, target.sha256) != (file.size, file.sha256) or target.path == path:
                raise ArchiveDamaged(
                    f"the link {path!r} does not lead to the file that it stands for",
                    code="archive-hostile",
                    member=path,
                )
            links[path] = entry.member.link
        elif entry.member.kind != "file" or (entry.member.size, entry.sha256) != (file.size, file.sha256):
            raise ArchiveDamaged(f"index and manifest of the archive contradict each other on {path!r}", member=path)
        else:
            files[path] = entry.member.name
    for path, link in links.items():
        if posixpath.normpath(posixpath.join(posixpath.dirname(path), link)) not in files:
            raise ArchiveDamaged(f"the link {path!r} leads to another link", code="archive-hostile", member=path)
    directories = {
        name.removeprefix(root).removeprefix("/"): entry.member.mode
        for name, entry in entries.items()
        if entry.member.kind == "directory" and (name == root or name.startswith(f"{root}/"))
    }
    side = entries.pop(f"{root}/{SIDECAR_MANIFEST}", None)
    if side is None or side.member.kind != "file":
        raise ArchiveDamaged(f"the archive holds {manifest.model} without its {SIDECAR_MANIFEST}")
    return Contained(root, manifest.model, manifest.revision, manifest, files, links, directories)
