"""A snapshot on its way out of an archive: what is right already, what must come, and what makes it whole."""

import os
import stat
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from zops.archive.contents import Contained
from zops.archive.journal import Journal
from zops.archive.staging import put_in_place
from zops.archive.tar import Member
from zops.archive.writing import NewFile
from zops.cache.hashing import hash_files
from zops.cache.manifest import (
    FileEntry,
    Manifest,
    read_manifest,
    read_marker,
    stat_key,
    sync_directory,
    write_manifest,
    write_marker,
)
from zops.errors import ArchiveDamaged, SnapshotDamaged
from zops.events import Report


class Staged:
    """The directory beside a snapshot's target, and what was found to be right in it so far."""

    def __init__(self, contained: Contained, directory: Path, target: Path, journal: Journal | None) -> None:
        self.contained = contained
        self.directory = directory
        self.target = target
        self._journal = journal
        self._expected = {entry.path: entry for entry in contained.manifest.files} if contained.manifest else None
        self._entries: dict[str, FileEntry] = {}
        self._lock = threading.Lock()

    def take_up(self, found: Mapping[str, FileEntry]) -> None:
        """Take what an earlier run completed for good."""
        self._entries |= {path: entry for path, entry in found.items() if path not in self.contained.links}

    @property
    def paths(self) -> set[str]:
        """The files that are there."""
        return self._entries.keys() | self.contained.links.keys()

    def lacks(self, path: str) -> bool:
        """Tell whether a file must still come."""
        return path not in self._entries

    def reuse(self, modes: Mapping[str, int], report: Report) -> None:
        """Take the files that the target has already and that are right, by links to them.

        Args:
            modes: path -> permission bits that it must have.
            report: is told of the progress when files must be hashed because nobody vouches for them.
        """
        for path, key in _right_ones(self.contained, self.target, modes, self.lacks, report).items():
            new = self.directory / path
            with suppress(OSError):
                new.parent.mkdir(parents=True, exist_ok=True)
                os.link(self.target / path, new, follow_symlinks=False)
                if stat_key(new) == key:
                    self._accept(self._known(path))
                else:
                    new.unlink()  # somebody changed it meanwhile

    def accept(self, path: str, member: Member, sha256: str) -> None:
        """Take a file that was written and is durable for good; may be called from several threads.

        Raises:
            ArchiveDamaged: when it is not what the manifest says.
        """
        entry = FileEntry(path, member.size, sha256)
        if self._expected is not None and path not in self.contained.mismatched and self._expected[path] != entry:
            raise ArchiveDamaged(
                f"{path!r} in the archive has another SHA-256 than the manifest of {self.contained.model} says",
                hint="the archive is damaged, or of another revision; take another one, or fetch with: zops cache pull",
                member=member.name,
            )
        self._accept(entry)

    def complete(self) -> None:
        """Make links, set the directories' modes, write manifest and marker: the marker last.

        Raises:
            ArchiveDamaged: when a file is missing.
        """
        contained, directory = self.contained, self.directory
        for path, link in contained.links.items():
            (directory / path).parent.mkdir(parents=True, exist_ok=True)
            (directory / path).symlink_to(link)
        for path in contained.directories:
            (directory / path).mkdir(parents=True, exist_ok=True)
        manifest = contained.manifest or Manifest(
            contained.model, contained.revision, tuple(sorted(self._entries.values())), "local", "archive"
        )
        there = self._entries.keys() | contained.links.keys()
        if there | contained.mismatched != {entry.path for entry in manifest.files}:
            raise ArchiveDamaged(f"the archive does not hold every file of {contained.model}")
        write_manifest(directory, manifest)
        if not contained.mismatched:
            write_marker(directory, manifest, {e.path: stat_key(directory / e.path) for e in manifest.files})
        for path in sorted(contained.directories, reverse=True):
            (directory / path).chmod(contained.directories[path] | 0o700)
        for parent, _, _ in os.walk(directory):
            sync_directory(Path(parent))
        self.manifest = manifest

    def put_in_place(self) -> None:
        """Let the snapshot take its target's name."""
        put_in_place(self.target)

    def _known(self, path: str) -> FileEntry:
        assert self._expected is not None  # nothing is reused of a snapshot for which nobody vouches
        return self._expected[path]

    def _accept(self, entry: FileEntry) -> None:
        with self._lock:
            self._entries[entry.path] = entry
        if self._journal and entry.path not in self.contained.mismatched:
            self._journal.record(entry)


Place = tuple[Staged, str, Member]
"""A file that shall be: the snapshot, its path in it, and what it shall look like."""


class StagedFile:
    """Takes the data of one member, for every file that shall have it."""

    def __init__(self, places: Sequence[Place], *, reserve: bool = True) -> None:
        self._files: dict[Staged, NewFile] = {}
        self._places = places
        try:
            for staged, path, member in places:
                if staged not in self._files:
                    self._files[staged] = NewFile(staged.directory / path, member, reserve=reserve)
        except BaseException:
            self.close()
            raise

    def write(self, content: memoryview, buffer: memoryview | None = None) -> None:
        """See `Target`."""
        for file in self._files.values():
            file.write(content, buffer)

    def done(self, sha256: str) -> None:
        """See `Target`."""
        self.each(lambda file: file.done())
        for staged, path, member in self._places:
            file = self._files[staged]
            if file.path != staged.directory / path:
                (staged.directory / path).parent.mkdir(parents=True, exist_ok=True)
                os.link(file.path, staged.directory / path)
            staged.accept(path, member, sha256)

    def each(self, function: Callable[[NewFile], None]) -> None:
        """Do something with every file that is written."""
        for file in self._files.values():
            function(file)

    @property
    def path(self) -> Path:
        """The first of the files."""
        return next(iter(self._files.values())).path

    def remove(self) -> None:
        """Undo it all."""
        self.close()
        self.each(lambda file: file.path.unlink())

    def close(self) -> None:
        """See `Target`."""
        self.each(lambda file: file.close())


def _right_ones(
    contained: Contained, target: Path, modes: Mapping[str, int], lacks: Callable[[str], bool], report: Report
) -> dict[str, tuple[int, int, int]]:
    """Return the files of the target that are what the archive's are: path -> `stat_key`."""
    if contained.manifest is None or not target.is_dir() or target.is_symlink():
        return {}
    vouched = _vouched(target)
    right: dict[str, tuple[int, int, int]] = {}
    unknown: dict[str, Path] = {}
    for entry in contained.manifest.files:
        file = target / entry.path
        wanted = entry.path in modes and entry.path not in contained.mismatched and lacks(entry.path)
        if not wanted or not _is_own(target, file, entry.size, modes[entry.path]):
            continue
        sha256, key = vouched.get(entry.path, ("", (0, 0, 0)))
        if sha256 and key == stat_key(file):
            if sha256 == entry.sha256:
                right[entry.path] = key
        else:
            unknown[entry.path] = file
    if unknown:
        known = contained.manifest.sha256
        for path, found in hash_files(unknown, report, f"looking for what is right in {target}").items():
            if not isinstance(found, OSError) and found[0] == known[path]:
                right[path] = found[1]
    return right


def _vouched(target: Path) -> dict[str, tuple[str, tuple[int, int, int]]]:
    """Return what is known of a snapshot's files since they were last verified: path -> SHA-256 and `stat_key`."""
    try:
        manifest, marker = read_manifest(target), read_marker(target)
    except SnapshotDamaged:
        return {}
    if manifest is None or marker is None or marker.manifest_digest != manifest.digest:
        return {}
    return {path: (manifest.sha256[path], key) for path, key in marker.stats.items() if path in manifest.sha256}


def _is_own(target: Path, file: Path, size: int, mode: int) -> bool:
    """Tell whether a path is a plain file below a target, reached through no link, of this size and mode."""
    with suppress(OSError):
        found = file.lstat()
        inside = file.parent.resolve() == (target.resolve() / file.relative_to(target)).parent
        return (
            stat.S_ISREG(found.st_mode)
            and inside
            and found.st_size == size
            and stat.S_IMODE(found.st_mode) == mode | 0o400
        )
    return False
