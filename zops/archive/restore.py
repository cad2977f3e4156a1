"""Bringing snapshots back from an archive: everything checked first, staged beside the target, verified, renamed."""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import BinaryIO

from zops.archive.contents import Contained
from zops.archive.format import ArchiveManifest
from zops.archive.reader import Archive, MemberData, open_stream
from zops.archive.staging import check_room, put_in_place, recover, room, shortage, staging
from zops.archive.store import StoredArchive, open_archive
from zops.archive.tar import Member
from zops.cache.layout import is_verified, place
from zops.cache.lock import hold
from zops.cache.manifest import (
    FileEntry,
    Manifest,
    read_manifest,
    stat_key,
    sync_directory,
    write_manifest,
    write_marker,
)
from zops.errors import ArchiveDamaged
from zops.events import Report, Task, Warned, silent, task

Location = StoredArchive | Path | str


@dataclass(frozen=True, slots=True)
class Restored:
    """A snapshot after a restore. `changed` is False where it was there already, verified and equal."""

    model: str
    revision: str
    path: Path
    digest: str
    files: int
    size: int
    changed: bool


@dataclass(frozen=True, slots=True)
class RestoreResult:
    """What a restore did. `size` is in bytes, `seconds` the time of all of it."""

    archive: str
    snapshots: tuple[Restored, ...]
    seconds: float

    @property
    def changed(self) -> bool:
        """Whether anything had to be restored."""
        return any(snapshot.changed for snapshot in self.snapshots)

    @property
    def files(self) -> int:
        """Files of all snapshots together."""
        return sum(snapshot.files for snapshot in self.snapshots)

    @property
    def size(self) -> int:
        """Bytes of all snapshots together."""
        return sum(snapshot.size for snapshot in self.snapshots)


@dataclass(frozen=True, slots=True)
class ArchiveCheck:
    """What reading a whole archive told; `verified` is False where nothing in it vouches for its content."""

    archive: str
    manifest: ArchiveManifest | None
    members: int
    size: int
    verified: bool
    seconds: float


def restore(
    archive: Location,
    cache_dir: Path,
    *,
    model: str | None = None,
    manifest: Manifest | None = None,
    report: Report = silent,
) -> RestoreResult:
    """Restore the snapshots of an archive into a cache, each verified against its manifest, or change nothing.

    A snapshot that is there, verified and equal, is left alone. One that differs is replaced, after the one from the
    archive is complete. Archives of other programs are restored too; what the catalog does not know gets a manifest of
    its own, with a warning, for nobody vouches for it.

    Args:
        archive: where it is.
        cache_dir: the cache's root.
        model: restore only this one; also names the one of an archive that does not tell.
        manifest: what that model must contain, for archives that do not tell.
        report: is told of progress by bytes read.

    Raises:
        ArchiveDamaged: when the archive is cut, flipped, hostile, or not what its manifest says.
        SnapshotMissing: when it holds no snapshot (of that model).
        HostShort: when space, inodes or permissions are short.
        LockHeld: when another process works on the same snapshot.
    """
    began = time.monotonic()
    with _opened(archive) as (stream, name), shortage(cache_dir):
        opened = open_stream(stream, room=room(cache_dir))
        contents = opened.snapshots(model, manifest)
        with ExitStack() as locks:
            targets = [place(cache_dir, c.model, c.revision) for c in contents]
            for target in sorted(targets):
                locks.enter_context(_locked(target, report))
            found = [_present(c, target) for c, target in zip(contents, targets, strict=True)]
            missing = [(c, target) for c, target, there in zip(contents, targets, found, strict=True) if there is None]
            _warn(missing, report)
            made = iter(_restore_missing(opened, missing, cache_dir, name, report) if missing else ())
            snapshots = tuple(there or next(made) for there in found)
    return RestoreResult(name, snapshots, time.monotonic() - began)


def read_manifest_of(archive: Location) -> ArchiveManifest | None:
    """Return what an archive says of itself, without reading it whole; None when zops did not make it.

    Raises:
        ArchiveDamaged: when it is cut, damaged or hostile.
    """
    with _opened(archive) as (stream, _):
        return open_stream(stream).manifest


def verify_archive(archive: Location, report: Report = silent) -> ArchiveCheck:
    """Read an archive whole and check every byte of it against its index and manifest.

    Raises:
        ArchiveDamaged: at the first thing that is wrong.
    """
    began = time.monotonic()
    with _opened(archive) as (stream, name):
        opened = open_stream(stream)
        with task(report, "verify-archive", f"verifying {name}", total=opened.size) as progress:
            for _, data in opened.read():
                for block in data:
                    progress.advance(len(block))
    vouched = opened.manifest is not None
    return ArchiveCheck(name, opened.manifest, len(opened.members), opened.size, vouched, time.monotonic() - began)


@contextmanager
def _opened(archive: Location) -> Iterator[tuple[BinaryIO, str]]:
    stored = archive if isinstance(archive, StoredArchive) else open_archive(archive)
    with stored.open() as stream:
        yield stream, stored.location


@contextmanager
def _locked(target: Path, report: Report) -> Iterator[None]:
    """Hold the lock of a snapshot; directories that had to be made for the lock alone are removed with it."""
    made = [parent for parent in target.parents if not parent.exists()]
    try:
        with hold(target.with_name(f".{target.name}.lock"), report):
            recover(target)
            yield
    finally:
        for parent in made:
            with suppress(OSError):  # not empty, as it should be
                parent.rmdir()


def _present(contained: Contained, target: Path) -> Restored | None:
    """Return the snapshot in the target when it is verified and equal to the one in the archive."""
    if contained.manifest is None or not is_verified(target):
        return None
    there = read_manifest(target)
    if there is None or there.digest != contained.manifest.digest:
        return None
    return Restored(
        contained.model, contained.revision, target, there.digest, len(there.files), there.size, changed=False
    )


def _warn(missing: Sequence[tuple[Contained, Path]], report: Report) -> None:
    for contained, _ in missing:
        if contained.manifest is None:
            report(
                Warned(
                    f"nothing vouches for {contained.model} in this archive: it gets a manifest of what was restored"
                )
            )
        if contained.left_out:
            shown = ", ".join(contained.left_out[:3])
            report(Warned(f"{len(contained.left_out)} file(s) that no pipeline needs are left out: {shown}"))


def _restore_missing(
    opened: Archive, missing: Sequence[tuple[Contained, Path]], cache_dir: Path, name: str, report: Report
) -> list[Restored]:
    members = {member.name: member for member in opened.members}
    size = sum(members[source].size for c, _ in missing for source in c.files.values())
    check_room(cache_dir, size, sum(len(c.files) + len(c.directories) + 4 for c, _ in missing))
    with ExitStack() as stack:
        staged = [_Staged(c, stack.enter_context(staging(target)), target) for c, target in missing]
        with task(report, "restore", f"restoring from {name}", total=opened.size) as progress:
            _write_all(opened, staged, progress)
            for snapshot in staged:
                snapshot.complete()
        return [snapshot.put_in_place() for snapshot in staged]


def _write_all(opened: Archive, staged: "Sequence[_Staged]", progress: Task) -> None:
    wanted: dict[str, list[tuple[_Staged, str]]] = {}
    for snapshot in staged:
        for path, source in snapshot.contained.files.items():
            wanted.setdefault(source, []).append((snapshot, path))
    for member, data in opened.read():
        places = wanted.get(member.name, [])
        _write(member, data, [snapshot.directory / path for snapshot, path in places], progress)
        for snapshot, path in places:
            snapshot.accept(path, member, data.sha256)


def _write(member: Member, data: MemberData, paths: Sequence[Path], progress: Task) -> None:
    """Write a member's data to new files, durably; the bytes that are hashed are those that are written."""
    with ExitStack() as stack:
        files = []
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            files.append(stack.enter_context(path.open("xb", buffering=0)))
        for block in data:
            for file in files:
                _write_fully(file, block)
            progress.advance(len(block))
        for file in files:
            os.fchmod(file.fileno(), member.mode | 0o400)
            os.utime(file.fileno(), (member.mtime, member.mtime))
            os.fsync(file.fileno())


def _write_fully(file: FileIO, block: memoryview) -> None:
    while block:
        block = block[file.write(block) :]


class _Staged:
    """A snapshot on its way: the directory beside its target, and what was found to be right so far."""

    def __init__(self, contained: Contained, directory: Path, target: Path) -> None:
        self.contained = contained
        self.directory = directory
        self.target = target
        self._expected = {f.path: f for f in contained.manifest.files} if contained.manifest else None
        self._entries: dict[str, FileEntry] = {}

    def accept(self, path: str, member: Member, sha256: str) -> None:
        """Take a written file for good.

        Raises:
            ArchiveDamaged: when it is not what the manifest says.
        """
        entry = FileEntry(path, member.size, sha256)
        if self._expected is not None and self._expected[path] != entry:
            raise ArchiveDamaged(
                f"{path!r} in the archive has another SHA-256 than the manifest of {self.contained.model} says",
                hint="the archive is damaged, or of another revision; take another one, or fetch with: zops cache pull",
                member=member.name,
            )
        self._entries[path] = entry

    def complete(self) -> None:
        """Make links, set the directories' modes, write manifest and marker: the marker last."""
        contained, directory = self.contained, self.directory
        for path, link in contained.links.items():
            (directory / path).parent.mkdir(parents=True, exist_ok=True)
            (directory / path).symlink_to(link)
        for path in contained.directories:
            (directory / path).mkdir(parents=True, exist_ok=True)
        manifest = contained.manifest or Manifest(
            contained.model, contained.revision, tuple(sorted(self._entries.values())), "local", "archive"
        )
        if self._entries.keys() | contained.links.keys() != {entry.path for entry in manifest.files}:
            raise ArchiveDamaged(f"the archive does not hold every file of {contained.model}")
        write_manifest(directory, manifest)
        write_marker(directory, manifest, {e.path: stat_key(directory / e.path) for e in manifest.files})
        for path in sorted(contained.directories, reverse=True):
            (directory / path).chmod(contained.directories[path] | 0o700)
        for parent, _, _ in os.walk(directory):
            sync_directory(Path(parent))
        self._manifest = manifest

    def put_in_place(self) -> Restored:
        put_in_place(self.target)
        m = self._manifest
        return Restored(m.model, m.revision, self.target, m.digest, len(m.files), m.size, changed=True)


__all__ = ["ArchiveCheck", "RestoreResult", "Restored", "read_manifest_of", "restore", "verify_archive"]
