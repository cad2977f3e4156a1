"""How two archives, or an archive and a snapshot, differ: file by file, by SHA-256."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from zops.archive.contents import Contained
from zops.archive.encryption import NO_KEYS, Keys
from zops.archive.format import Entry
from zops.archive.opened import opened
from zops.archive.reader import Archive, OwnArchive
from zops.archive.store import open_archive
from zops.archive.unpack import Nowhere
from zops.cache.hashing import hash_files
from zops.cache.manifest import FileEntry, read_manifest, require_verified
from zops.cache.source import walk
from zops.errors import SnapshotDamaged, SnapshotMissing, SourceFailed, UsageError
from zops.events import Report, silent, task

Contents = Mapping[str, FileEntry]


@dataclass(frozen=True)
class Difference:
    """How the second of two differs from the first: paths in the snapshot, sorted."""

    first: str
    second: str
    added: tuple[str, ...]
    removed: tuple[str, ...]
    changed: tuple[str, ...]
    same: int

    @property
    def equal(self) -> bool:
        """Whether both hold the same files."""
        return not (self.added or self.removed or self.changed)


def compare(first: str, second: str, model: str, *, keys: Keys = NO_KEYS, report: Report = silent) -> Difference:
    """Compare what two places hold of a model; each is an archive or the directory of a snapshot.

    No data is read of an archive that zops made, nor of a snapshot that is verified and untouched since.

    Args:
        first: a directory, or what `open_archive` takes.
        second: the same.
        model: the model.
        keys: open what is encrypted.
        report: is told of the progress where data must be read.

    Raises:
        ArchiveDamaged: when an archive is cut, damaged or hostile.
        SnapshotMissing: when an archive holds nothing of the model.
        SourceFailed: when one is not there, or a file cannot be read.
    """
    old, new = (_contents(place, model, keys, report) for place in (first, second))
    both = old.keys() & new.keys()
    changed = {path for path in both if (old[path].size, old[path].sha256) != (new[path].size, new[path].sha256)}
    return Difference(
        first,
        second,
        added=tuple(sorted(new.keys() - old.keys())),
        removed=tuple(sorted(old.keys() - new.keys())),
        changed=tuple(sorted(changed)),
        same=len(both - changed),
    )


def _contents(place: str, model: str, keys: Keys, report: Report) -> Contents:
    if not place.startswith("s3://") and Path(place).expanduser().is_dir():
        return _of_snapshot(Path(place).expanduser(), report)
    with opened(open_archive(place, keys)) as source:
        found = source.archive.snapshots(model)
        if len(found) > 1:
            names = ", ".join(contained.revision for contained in found)
            raise UsageError(f"{place} holds several revisions of {model}: {names}", hint="extract the one you mean")
        return _of_archive(source.archive, found[0], report)


def _of_archive(archive: Archive, contained: Contained, report: Report) -> Contents:
    if contained.manifest is None or not isinstance(archive, OwnArchive):
        return _by_reading(archive, contained, report)
    entries = {entry.path: entry for entry in contained.manifest.files if entry.path not in contained.mismatched}
    for path in contained.mismatched & contained.files.keys():
        found = archive.entries[contained.files[path]]
        entries[path] = FileEntry(path, found.member.size, found.sha256)
    return entries


class _Noted(Nowhere):
    """Takes what a file hashes to."""

    def __init__(self, entry: Entry, found: dict[str, FileEntry]) -> None:
        self._entry, self._found = entry, found

    def done(self, sha256: str) -> None:
        name = self._entry.member.name
        self._found[name] = FileEntry(name, self._entry.member.size, sha256)


def _by_reading(archive: Archive, contained: Contained, report: Report) -> Contents:
    names = set(contained.files.values())
    found: dict[str, FileEntry] = {}
    total = sum(member.size for member in archive.members if member.name in names)
    with task(report, "hash", "hashing what is in the archive", total=total) as progress:
        archive.unpack(names, lambda entry: _Noted(entry, found), progress.advance)
    return {path: FileEntry(path, found[name].size, found[name].sha256) for path, name in contained.files.items()}


def _of_snapshot(snapshot: Path, report: Report) -> Contents:
    try:
        return {entry.path: entry for entry in require_verified(snapshot).files}
    except (SnapshotMissing, SnapshotDamaged):
        pass  # nobody vouches for what is there now, so it is read
    manifest = read_manifest(snapshot)
    named = [entry.path for entry in manifest.files] if manifest else list(walk(snapshot))
    paths = {path: snapshot / path for path in named if (snapshot / path).is_file()}
    entries = {}
    for path, found in hash_files(paths, report, f"hashing {snapshot}").items():
        if isinstance(found, OSError):
            raise SourceFailed(f"{paths[path]} cannot be read: {found.strerror}", code="source-unreadable")
        entries[path] = FileEntry(path, found[1][0], found[0])
    return entries


__all__ = ["Difference", "compare"]
