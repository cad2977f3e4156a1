"""What goes into an archive: every member with its name, kind and size, before any data is read."""

import hashlib
import json
import os
import posixpath
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path

from zops.archive.format import (
    MANIFEST_NAME,
    SIDECAR_MANIFEST,
    ArchiveManifest,
    Base,
    Entry,
    check_identity,
    check_names,
)
from zops.archive.tar import LATEST_S, Member
from zops.cache.layout import place
from zops.cache.manifest import SIDECAR, Finding, Manifest, damaged


@dataclass(frozen=True, slots=True)
class Earlier:
    """What an incremental archive builds on: the earlier one, and (SHA-256, size) of every file in its chain."""

    base: Base
    files: Collection[tuple[str, int]]


@dataclass(frozen=True, slots=True)
class Source:
    """A file of a snapshot: where it is, its size and hash to be, and `stat_key` of it when the archive was planned."""

    snapshot: Path
    path: str
    size: int
    sha256: str
    stat: tuple[int, int, int]

    @property
    def file(self) -> Path:
        """The file on the disk."""
        return self.snapshot / self.path


@dataclass(frozen=True, slots=True)
class Planned:
    """A member and where its data comes from: bytes at hand, or a file."""

    member: Member
    content: bytes = b""
    source: Source | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """Every member of an archive in order.

    Attributes:
        manifest: the archive's first member.
        items: the members.
        elsewhere: files that an earlier archive holds.
        missing: names of files that are not there although a manifest names them.
    """

    manifest: ArchiveManifest
    items: tuple[Planned, ...]
    elsewhere: tuple[Entry, ...] = ()
    missing: tuple[str, ...] = ()

    @property
    def read_size(self) -> int:
        """Bytes of all files that are read from snapshots."""
        return sum(item.member.size for item in self.items if item.source)

    @property
    def data_size(self) -> int:
        """Bytes of all files' data."""
        return sum(item.member.size for item in self.items)


def root_of(manifest: Manifest) -> str:
    """Return the directory of a snapshot in an archive.

    Raises:
        ArchiveDamaged: when its model or revision is no name.
    """
    check_identity(manifest.model, manifest.revision)
    return place(Path(), manifest.model, manifest.revision).as_posix()


def plan(
    manifest: ArchiveManifest,
    paths: Sequence[Path],
    *,
    earlier: Earlier | None = None,
    allow_mismatch: bool = False,
) -> Plan:
    """Plan an archive: the manifest, then of each snapshot its directories, its own manifest, its files.

    Args:
        manifest: of the archive; its snapshots are those in `paths`, in the same order.
        paths: the snapshots' directories.
        earlier: files that it has are not stored again.
        allow_mismatch: take what is there, whatever the manifests say; links are not kept then, since they would stand
            for files that may be wrong.

    Raises:
        SnapshotDamaged: when a file is missing, unless `allow_mismatch`.
        ArchiveDamaged: when a name cannot be in an archive.
    """
    planned = _Planning(manifest, earlier.files if earlier else (), allow_mismatch=allow_mismatch)
    planned.add_bytes(MANIFEST_NAME, manifest.as_bytes())
    for (root, snapshot), path in zip(manifest.snapshots.items(), paths, strict=True):
        planned.add_snapshot(root, snapshot, path)
    check_names(item.member for item in planned.items)
    return Plan(manifest, tuple(planned.items), tuple(planned.elsewhere), tuple(planned.missing))


@dataclass
class _Planning:
    manifest: ArchiveManifest
    stored: Collection[tuple[str, int]]
    allow_mismatch: bool
    items: list[Planned] = field(default_factory=list)
    elsewhere: list[Entry] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    def add_bytes(self, name: str, content: bytes) -> None:
        mtime = int(datetime.fromisoformat(self.manifest.created).timestamp())
        self.items.append(Planned(Member(name, "file", len(content), 0o644, mtime), content))

    def add_snapshot(self, root: str, manifest: Manifest, path: Path) -> None:
        for directory in _directories(path, {entry.path for entry in manifest.files}):
            stat = (path / directory).stat()
            name = posixpath.normpath(f"{root}/{directory}")
            self.items.append(Planned(Member(name, "directory", 0, stat.st_mode & 0o777, _seconds(stat))))
        self.add_bytes(f"{root}/{SIDECAR_MANIFEST}", (json.dumps(manifest.as_json(), indent=1) + "\n").encode())
        links = {} if self.allow_mismatch else _symlinks(path, manifest)
        stored: dict[tuple[int, int], tuple[str, str]] = {}
        for entry in sorted(manifest.files):
            name = f"{root}/{entry.path}"
            found = self._stat(path, entry.path, name)
            if found is None:
                continue
            size = found.st_size if self.allow_mismatch else entry.size
            member = Member(name, "file", size, found.st_mode & 0o777, _seconds(found))
            inode = found.st_dev, found.st_ino
            if entry.path in links:
                self.items.append(Planned(replace(member, kind="symlink", size=0, mode=0o777, link=links[entry.path])))
            elif (entry.sha256, size) in self.stored:
                self.elsewhere.append(Entry(member, 0, entry.sha256))
            elif inode in stored and stored[inode][0] == entry.sha256 and not self.allow_mismatch:
                self.items.append(Planned(replace(member, kind="hardlink", size=0, link=stored[inode][1])))
            else:
                stored[inode] = entry.sha256, name
                key = found.st_size, found.st_mtime_ns, found.st_ino
                self.items.append(Planned(member, source=Source(path, entry.path, size, entry.sha256, key)))

    def _stat(self, snapshot: Path, path: str, name: str) -> os.stat_result | None:
        try:
            return (snapshot / path).stat()
        except (FileNotFoundError, NotADirectoryError):
            if not self.allow_mismatch:
                raise damaged(snapshot, [Finding(path, "missing")]) from None
            self.missing.append(name)
            return None


def _symlinks(snapshot: Path, manifest: Manifest) -> dict[str, str]:
    """Return the links that stay links, to other files of the snapshot; content elsewhere (Hugging Face's) does not."""
    regular = {entry.path: entry for entry in manifest.files if not (snapshot / entry.path).is_symlink()}
    links = {}
    for entry in manifest.files:
        if entry.path not in regular:
            link = str((snapshot / entry.path).readlink())
            target = regular.get(posixpath.normpath(posixpath.join(posixpath.dirname(entry.path), link)))
            if target and (target.size, target.sha256) == (entry.size, entry.sha256):
                links[entry.path] = link
    return links


def _directories(snapshot: Path, files: Collection[str]) -> list[str]:
    """Return the snapshot's directories that hold a file of it, or nothing at all; the snapshot itself is `.`."""
    found = {"."}
    for file in files:
        parent = posixpath.dirname(file)
        while parent:
            found.add(parent)
            parent = posixpath.dirname(parent)
    for parent, names, others in os.walk(snapshot):
        path = os.path.relpath(parent, snapshot)
        if path == ".":
            names[:] = [name for name in names if name != SIDECAR]
        elif not names and not others:
            while path:
                found.add(path)
                path = posixpath.dirname(path)
    return sorted(found)


def _seconds(stat: os.stat_result) -> int:
    """Return a modification time in whole seconds, as far as any tar program reads it: from 1970 to 2286."""
    return min(max(0, int(stat.st_mtime)), LATEST_S)


def sha256_of(item: Planned) -> str:
    """Return the SHA-256 in hex that the data of a member must have; empty for what has no data."""
    if item.member.kind != "file":
        return ""
    return item.source.sha256 if item.source else hashlib.sha256(item.content).hexdigest()


__all__ = ["Earlier", "Plan", "Planned", "Source", "plan", "root_of", "sha256_of"]
