"""What an archive holds, as far as restoring it needs to know: its snapshots, and which member becomes which file."""

import posixpath
from collections.abc import Collection, Mapping, Sequence
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
from zops.archive.tar import BLOCK, END
from zops.cache.manifest import FileEntry, Manifest
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
        files: path in the snapshot -> name of the member with its content; hard links name the same one.
        links: path in the snapshot -> relative target, another file of the same snapshot.
        directories: path in the snapshot -> permission bits; the snapshot itself is the empty path.
        left_out: names of members below the root that are not restored.
        elsewhere: path in the snapshot -> the file in an earlier archive of the chain, to be found by its SHA-256.
        mismatched: paths whose content is not what the manifest says, or that are missing; backed up so by order.
    """

    root: str
    model: str
    revision: str
    manifest: Manifest | None
    files: Mapping[str, str]
    links: Mapping[str, str] = field(default_factory=dict)
    directories: Mapping[str, int] = field(default_factory=dict)
    left_out: Sequence[str] = ()
    elsewhere: Mapping[str, Entry] = field(default_factory=dict)
    mismatched: frozenset[str] = frozenset()


def check_index(index: Index) -> None:
    """Check that an index can be true: names, sizes and places of members and frames fit each other.

    Raises:
        ArchiveDamaged: naming what does not.
    """
    if not index.entries or index.entries[0].member.name != MANIFEST_NAME:
        raise ArchiveDamaged("the archive's index does not begin with its manifest")
    if len(index.entries) + len(index.elsewhere) > MEMBER_LIMIT:
        raise ArchiveDamaged(f"the archive has more than {MEMBER_LIMIT} members", code="archive-hostile")
    check_names(entry.member for entry in (*index.entries, *index.elsewhere))
    position = 0
    for entry in index.entries:
        if entry.member.kind == "file":
            if entry.offset < position:
                raise ArchiveDamaged(f"the index places {entry.member.name!r} inside another member")
            position = entry.offset + blocks(entry.member.size)
    if position > index.end:
        raise ArchiveDamaged("the index places a member behind the end of the archive")
    _check_frames(index)


def _check_frames(index: Index) -> None:
    """Check that the frames are those of exactly this tar: whose end is in a frame, or behind the index."""
    if bool(index.frames) != (index.compression != "none"):
        raise ArchiveDamaged("the archive's index contradicts itself on its compression")
    if not index.frames:
        return
    sizes = [frame.size for frame in index.frames]
    end = index.end + (len(END) if index.compression == "zstd" else 0)
    if max(sizes) > CHUNK or min(sizes) < 1 or sum(sizes) != end:
        raise ArchiveDamaged("the frames in the index do not add up to the archive")
    # What cannot be compressed grows by some thousandths; a frame that is much longer than its content hides something.
    if any(frame.compressed > frame.size + frame.size // 64 + BLOCK for frame in index.frames):
        raise ArchiveDamaged("the archive has a frame that is longer than what it holds")


def contained(index: Index, manifest: ArchiveManifest) -> tuple[Contained, ...]:
    """Match the index with the archive's manifest: every file of every snapshot, and nothing else.

    Raises:
        ArchiveDamaged: naming the member that is missing, too many, or contradicts its manifest.
    """
    if index.archive != manifest.id:
        raise ArchiveDamaged("the archive's index belongs to another archive")
    if index.elsewhere and manifest.base is None:
        raise ArchiveDamaged("the archive has files elsewhere, but builds on no other archive")
    rest = _Rest(index)
    snapshots = tuple(_contained(root, m, rest) for root, m in manifest.snapshots.items())
    rest.check_empty()
    return snapshots


class _Rest:
    """What no snapshot has claimed yet of an index."""

    def __init__(self, index: Index) -> None:
        self.here = {entry.member.name: entry for entry in index.entries[1:]}
        self.elsewhere = {entry.member.name: entry for entry in index.elsewhere}
        self.mismatched = set(index.mismatched)

    def check_empty(self) -> None:
        """Refuse what belongs to no snapshot."""
        strays = [name for name, entry in self.here.items() if entry.member.kind != "directory"]
        for name in (*strays, *self.elsewhere, *self.mismatched):
            raise ArchiveDamaged(f"{name!r} belongs to no snapshot in the archive", code="archive-hostile", member=name)


def _contained(root: str, manifest: Manifest, rest: _Rest) -> Contained:
    """Claim the members of one snapshot."""
    files: dict[str, str] = {}
    links: dict[str, str] = {}
    hard: dict[str, str] = {}
    elsewhere: dict[str, Entry] = {}
    mismatched: set[str] = set()
    known = {file.path: file for file in manifest.files}
    for path, file in known.items():
        name = f"{root}/{path}"
        entry, other = rest.here.pop(name, None), rest.elsewhere.pop(name, None)
        if name in rest.mismatched:
            rest.mismatched.remove(name)
            mismatched.add(path)
            if other or (entry and entry.member.kind != "file"):
                raise ArchiveDamaged(f"{path!r} in the archive is called mismatched, but is no file", member=path)
            if entry:
                files[path] = name
        elif other:
            _check_same(path, file, other)
            elsewhere[path] = other
        elif entry is None:
            raise ArchiveDamaged(f"{path!r} of {manifest.model} is not in the archive", member=path)
        elif entry.member.kind == "symlink":
            links[path] = entry.member.link
        elif entry.member.kind == "hardlink":
            files[path] = hard[path] = entry.member.link
        else:
            _check_same(path, file, entry)
            files[path] = name
    # A symlink may lead to a hard link, which is a file too.
    _check_symlinks(known, links, {*elsewhere, *files} - mismatched)
    _check_hardlinks(root, known, hard, files.keys() - hard.keys() - mismatched)
    side = rest.here.pop(f"{root}/{SIDECAR_MANIFEST}", None)
    if side is None or side.member.kind != "file":
        raise ArchiveDamaged(f"the archive holds {manifest.model} without its {SIDECAR_MANIFEST}")
    directories = {
        name.removeprefix(root).removeprefix("/"): entry.member.mode
        for name, entry in rest.here.items()
        if entry.member.kind == "directory" and (name == root or name.startswith(f"{root}/"))
    }
    return Contained(
        root,
        manifest.model,
        manifest.revision,
        manifest,
        files,
        links,
        directories,
        elsewhere=elsewhere,
        mismatched=frozenset(mismatched),
    )


def _check_same(path: str, file: FileEntry, entry: Entry) -> None:
    if entry.member.kind != "file" or (entry.member.size, entry.sha256) != (file.size, file.sha256):
        raise ArchiveDamaged(f"index and manifest of the archive contradict each other on {path!r}", member=path)


def _check_symlinks(known: Mapping[str, FileEntry], links: Mapping[str, str], sound: Collection[str]) -> None:
    """Check that every symlink leads to a file of the same snapshot with the content that it stands for."""
    for path, link in links.items():
        target = posixpath.normpath(posixpath.join(posixpath.dirname(path), link))
        if target not in sound or not _stands_for(known[path], known[target]):
            raise _bad_link(path)


def _check_hardlinks(
    root: str, known: Mapping[str, FileEntry], hard: Mapping[str, str], sound: Collection[str]
) -> None:
    """Check the same of every hard link, whose target is a member that comes before it."""
    order = {path: number for number, path in enumerate(known)}
    for path, name in hard.items():
        target = name.removeprefix(f"{root}/")
        inside = name != target and target in sound and order[target] < order[path]
        if not inside or not _stands_for(known[path], known[target]):
            raise _bad_link(path)


def _stands_for(file: FileEntry, other: FileEntry) -> bool:
    return (other.size, other.sha256) == (file.size, file.sha256)


def _bad_link(path: str) -> ArchiveDamaged:
    return ArchiveDamaged(
        f"the link {path!r} does not lead to a file that it can stand for", code="archive-hostile", member=path
    )
