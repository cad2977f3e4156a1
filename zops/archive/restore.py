"""Bringing snapshots back from an archive: everything checked first, staged beside the target, verified, renamed."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from zops.archive.check import ArchiveCheck, read_manifest_of, verify_archive
from zops.archive.contents import Contained
from zops.archive.journal import journal
from zops.archive.opened import Location, Opened, opened
from zops.archive.reader import Archive, OwnArchive
from zops.archive.share import share
from zops.archive.staged import Place, Staged, StagedFile
from zops.archive.staging import check_room, discard, recover, room, shortage, staging
from zops.archive.tar import Member
from zops.cache.layout import is_verified, place
from zops.cache.lock import hold
from zops.cache.manifest import Manifest, few, read_manifest
from zops.errors import ArchiveDamaged, UsageError
from zops.events import Report, Warned, silent, task


@dataclass(frozen=True, slots=True)
class Restored:
    """A snapshot after a restore.

    Attributes:
        changed: False where it was there already, verified and equal.
        verified: whether every file is what its manifest says; not so for a mismatched snapshot that was allowed.
        kept: files that were there and right, in the cache or from an earlier run that was cut short.
    """

    model: str
    revision: str
    path: Path
    digest: str
    files: int
    size: int
    changed: bool
    verified: bool = True
    kept: int = 0


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


def restore(
    archive: Location,
    cache_dir: Path,
    *,
    model: str | None = None,
    manifest: Manifest | None = None,
    into: Path | None = None,
    allow_mismatch: bool = False,
    report: Report = silent,
) -> RestoreResult:
    """Restore the snapshots of an archive into a cache, each verified against its manifest, or change nothing.

    A snapshot that is there, verified and equal, is left alone. Of one that differs, the files that are right stay, and
    it is replaced after the new one is complete. A restore that was killed goes on with what it had completed. Archives
    of other programs are restored too; what the catalog does not know gets a manifest of its own, with a warning, for
    nobody vouches for it.

    Args:
        archive: where it is.
        cache_dir: the cache's root.
        model: restore only this one; also names the one of an archive that does not tell.
        manifest: what that model must contain, for archives that do not tell.
        into: the directory that shall become the snapshot, instead of its place in the cache.
        allow_mismatch: restore also what was backed up although it did not match its manifest; it counts as unverified.
        report: is told of progress by bytes read.

    Raises:
        ArchiveDamaged: when the archive is cut, flipped, hostile, or not what its manifest says.
        SnapshotMissing: when it holds no snapshot (of that model).
        SourceFailed: when it, or one that it builds on, is not there.
        HostShort: when space, inodes or permissions are short.
        LockHeld: when another process works on the same snapshot.
    """
    began = time.monotonic()
    where = into or cache_dir
    with opened(archive, room=room(where)) as source, shortage(where):
        contents = source.archive.snapshots(model, manifest)
        _check_mismatched(contents, allow=allow_mismatch)
        targets = _targets(contents, cache_dir, into)
        with ExitStack() as locks:
            for target in sorted(targets):
                locks.enter_context(_locked(target, report))
            found = [_present(c, target) for c, target in zip(contents, targets, strict=True)]
            missing = [(c, target) for c, target, there in zip(contents, targets, found, strict=True) if there is None]
            _warn(missing, report)
            made = iter(_restore_missing(source, missing, where, report) if missing else ())
            snapshots = tuple(there or next(made) for there in found)
    return RestoreResult(source.location, snapshots, time.monotonic() - began)


def _check_mismatched(contents: Sequence[Contained], *, allow: bool) -> None:
    bad = [path for contained in contents for path in sorted(contained.mismatched)]
    if bad and not allow:
        raise ArchiveDamaged(
            f"{len(bad)} file(s) did not match their manifest when they were backed up: {few(bad)}",
            code="archive-mismatched",
            hint="restore them as they were with --allow-mismatch, or take another archive",
            files=bad,
        )


def _targets(contents: Sequence[Contained], cache_dir: Path, into: Path | None) -> list[Path]:
    """Return what each snapshot shall become.

    Raises:
        UsageError: when `into` cannot be that.
    """
    if into is None:
        return [place(cache_dir, c.model, c.revision) for c in contents]
    if len(contents) > 1:
        raise UsageError(
            f"the archive holds {len(contents)} snapshots, which cannot be one directory",
            hint=f"name one with --model: {few([c.model for c in contents])}",
        )
    occupied = into.is_symlink() or (into.exists() and not into.is_dir())
    if occupied or (into.is_dir() and any(into.iterdir()) and read_manifest(into) is None):
        raise UsageError(f"{into} holds something that is no snapshot of zops", hint="name a new or empty directory")
    return [into.absolute()]


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
    if contained.manifest is None or contained.mismatched or not is_verified(target):
        return None
    there = read_manifest(target)
    if there is None or there.digest != contained.manifest.digest:
        return None
    discard(target)
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
            shown = few(contained.left_out)
            report(Warned(f"{len(contained.left_out)} file(s) that no pipeline needs are left out: {shown}"))
        if contained.mismatched:
            shown = few(sorted(contained.mismatched))
            report(Warned(f"{len(contained.mismatched)} file(s) do not match the manifest, and stay so: {shown}"))


def _restore_missing(
    source: Opened, missing: Sequence[tuple[Contained, Path]], where: Path, report: Report
) -> list[Restored]:
    with ExitStack() as stack:
        staged = []
        for contained, target in missing:
            directory = stack.enter_context(staging(target))
            record, found = stack.enter_context(journal(directory, contained.manifest))
            snapshot = Staged(contained, directory, target, record)
            snapshot.take_up(found)
            snapshot.reuse({path: m.mode for path, m in _members(source, contained).items()}, report)
            staged.append(snapshot)
        kept = [sum(not snapshot.lacks(path) for path in _members(source, snapshot.contained)) for snapshot in staged]
        orders = _orders(source, staged)
        names = sum(len(s.contained.directories) + len(s.contained.links) + 4 for s in staged)
        copies = [member.size for order in orders for places in order.places.values() for _, _, member in places]
        check_room(where, sum(copies), names + len(copies))
        with task(
            report, "restore", f"restoring from {source.location}", total=sum(o.size for o in orders)
        ) as progress:
            for order in orders:
                order.fetch(progress.advance, report)
            for snapshot in staged:
                snapshot.complete()
        return [_put_in_place(snapshot, number) for snapshot, number in zip(staged, kept, strict=True)]


def _put_in_place(snapshot: Staged, kept: int) -> Restored:
    snapshot.put_in_place()
    m = snapshot.manifest
    verified = not snapshot.contained.mismatched
    size = sum((snapshot.target / path).stat().st_size for path in snapshot.paths)
    return Restored(
        m.model,
        m.revision,
        snapshot.target,
        m.digest,
        len(snapshot.paths),
        size,
        changed=True,
        verified=verified,
        kept=kept,
    )


@dataclass
class _Order:
    """What is to come out of one archive: member -> every file that shall have its data."""

    archive: Archive
    whole: bool
    places: dict[str, list[Place]] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes that are read."""
        return sum(places[0][2].size for places in self.places.values())

    def fetch(self, advance: Callable[[int], None], report: Report) -> None:
        """Bring it all."""
        shared = share(self.archive, self.places, advance, report) if isinstance(self.archive, OwnArchive) else set()
        left = {name: places for name, places in self.places.items() if name not in shared}
        self.archive.unpack(left.keys(), lambda entry: StagedFile(left[entry.member.name]), advance, whole=self.whole)


def _orders(source: Opened, staged: Sequence[Staged]) -> list[_Order]:
    """Return what must come from which archive: the archive itself, read whole, and those that it builds on."""
    orders: dict[int, _Order] = {id(source.archive): _Order(source.archive, whole=True)}
    for snapshot in staged:
        for path, member in _members(source, snapshot.contained).items():
            if not snapshot.lacks(path):
                continue
            archive, name = source.archive, snapshot.contained.files.get(path, "")
            if path in snapshot.contained.elsewhere:
                archive, name = source.find(snapshot.contained.elsewhere[path])
            order = orders.setdefault(id(archive), _Order(archive, whole=False))
            order.places.setdefault(name, []).append((snapshot, path, member))
    return list(orders.values())


def _members(source: Opened, contained: Contained) -> Mapping[str, Member]:
    """Return the file that each path of a snapshot becomes, links apart."""
    members = {member.name: member for member in source.archive.members}
    here = {path: members[name] for path, name in contained.files.items()}
    return here | {path: entry.member for path, entry in contained.elsewhere.items()}


__all__ = ["ArchiveCheck", "RestoreResult", "Restored", "read_manifest_of", "restore", "verify_archive"]
