"""Single files out of an archive into a directory, each verified before it takes its name."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from zops.archive.format import Entry
from zops.archive.opened import Location, Opened, opened
from zops.archive.reader import Archive
from zops.archive.staging import check_room, room, shortage
from zops.archive.tar import Member
from zops.archive.writing import NewFile
from zops.cache.manifest import few, sync_directory
from zops.errors import ArchiveDamaged, SnapshotMissing, UsageError
from zops.events import Report, silent, task


@dataclass(frozen=True, slots=True)
class Picked:
    """Files that were taken out of an archive. `verified` is False where nothing vouches for them."""

    archive: str
    model: str
    revision: str
    paths: tuple[Path, ...]
    size: int
    verified: bool


@dataclass(frozen=True)
class _Wanted:
    path: Path
    archive: Archive
    member: Member
    sha256: str


def pick(
    archive: Location, files: Sequence[str], directory: Path, *, model: str | None = None, report: Report = silent
) -> Picked:
    """Take files of a snapshot out of an archive, under their own paths; only what holds them is read.

    A file that is there already is replaced once the one from the archive is complete and right.

    Args:
        archive: where it is.
        files: paths in the snapshot.
        directory: where they shall lie.
        model: the model, where the archive holds several or does not tell.
        report: is told of progress by bytes read.

    Raises:
        SnapshotMissing: when the archive has no such file or snapshot.
        ArchiveDamaged: when it is cut, damaged or hostile.
        UsageError: when the archive holds several snapshots of the model.
        HostShort: when there is no room.
    """
    with opened(archive, room=room(directory)) as source, shortage(directory):
        found = source.archive.snapshots(model)
        if len(found) > 1:
            raise UsageError(
                f"the archive holds {len(found)} snapshots", hint=f"name a model: {few([c.model for c in found])}"
            )
        wanted = [_wanted(source, path, directory, model) for path in dict.fromkeys(files)]
        size = sum(each.member.size for each in wanted)
        check_room(directory, size, 2 * len(wanted))
        with task(report, "restore", f"restoring from {source.location}", total=size) as progress:
            for each in {id(w.archive): w.archive for w in wanted}.values():
                targets = {w.member.name: _Beside(w) for w in wanted if w.archive is each}
                each.unpack(targets.keys(), partial(_begun, targets), progress.advance, whole=False)
        first = found[0]
        return Picked(
            source.location,
            first.model,
            first.revision,
            tuple(each.path for each in wanted),
            size,
            verified=first.manifest is not None,
        )


def _begun(targets: "dict[str, _Beside]", entry: Entry) -> "_Beside":
    target = targets[entry.member.name]
    target.begin()
    return target


def _wanted(source: Opened, path: str, directory: Path, model: str | None) -> _Wanted:
    contained = source.archive.snapshots(model)[0]
    expected = {entry.path: entry.sha256 for entry in contained.manifest.files} if contained.manifest else {}
    archive, name = source.archive, contained.files.get(path, "")
    if path in contained.elsewhere:
        archive, name = source.find(contained.elsewhere[path])
    elif path in contained.links:
        linked = (Path(path).parent / contained.links[path]).as_posix()
        return replace(_wanted(source, str(Path(linked)), directory, model), path=directory / path)
    if not name:
        raise SnapshotMissing(
            f"{source.location} holds no file {path!r} of {contained.model}",
            code="archive-without-file",
            hint="look at what it holds with: zops archive show",
        )
    member = next(member for member in archive.members if member.name == name)
    sha256 = "" if path in contained.mismatched else expected.get(path, "")
    return _Wanted(directory / path, archive, member, sha256)


class _Beside:
    """Takes a file's data beside its name, which it takes when all of it is right."""

    def __init__(self, wanted: _Wanted) -> None:
        self._wanted = wanted
        self._part = wanted.path.with_name(f".{wanted.path.name}.part")
        self._file: NewFile | None = None

    def begin(self) -> None:
        """Make the file."""
        with suppress(FileNotFoundError, NotADirectoryError):
            self._part.unlink()
        self._file = NewFile(self._part, self._wanted.member)

    def write(self, content: memoryview, buffer: memoryview | None = None) -> None:
        """See `Target`."""
        assert self._file is not None
        self._file.write(content, buffer)

    def done(self, sha256: str) -> None:
        """See `Target`."""
        if self._wanted.sha256 and sha256 != self._wanted.sha256:
            raise ArchiveDamaged(
                f"{self._wanted.member.name!r} in the archive has another SHA-256 than its manifest says",
                member=self._wanted.member.name,
            )
        assert self._file is not None
        self._file.done()
        self._part.rename(self._wanted.path)
        sync_directory(self._wanted.path.parent)

    def close(self) -> None:
        """See `Target`."""
        if self._file:
            self._file.close()
        self._part.unlink(missing_ok=True)


__all__ = ["Picked", "pick"]
