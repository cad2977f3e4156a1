"""A drill: an archive restored into scratch space and compared with its manifest, the only proof of a backup."""

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from zops.archive.notes import Drilled, note_drill
from zops.archive.restore import Restored, restore
from zops.archive.staging import shortage
from zops.archive.store import StoredArchive
from zops.cache.hashing import digest_files
from zops.cache.manifest import few
from zops.cache.verify import judge, require_manifest
from zops.errors import ArchiveDamaged, SnapshotDamaged
from zops.events import Report, Warned, silent

_PREFIX = ".zops-drill-"
_LOCK = "lock"


@dataclass(frozen=True, slots=True)
class Drill:
    """What a drill proved. Sizes in bytes.

    `restore_seconds` is what a restore of this archive takes here, `seconds` the whole drill with reading it all again.
    """

    archive: str
    models: tuple[str, ...]
    digests: tuple[str, ...]
    """Digest of the manifest of each snapshot; every file of it was restored, read again and had its SHA-256."""
    files: int
    size: int
    restore_seconds: float
    seconds: float

    @property
    def rate(self) -> float:
        """Bytes a second of the restore."""
        return self.size / self.restore_seconds if self.restore_seconds else 0.0


def drill(archive: StoredArchive, scratch: Path, *, model: str | None = None, report: Report = silent) -> Drill:
    """Restore an archive into scratch space, read every file of it again, remove it, and note the outcome on it.

    Args:
        archive: the archive; one that builds on others is restored through its chain.
        scratch: a directory with room for its content.
        model: restore this one only, and name it for an archive that does not tell.
        report: told of the progress, and of what stops nothing.

    Raises:
        ArchiveDamaged, SnapshotDamaged: when a byte is wrong; that is noted too.
        HostShort: when the scratch space lacks room.
        SourceFailed: when the store does not deliver.
    """
    began = time.monotonic()
    try:
        with _scratch(scratch) as directory:
            result = restore(archive, directory, model=model, report=report)
            restored = time.monotonic() - began
            for snapshot in result.snapshots:
                _compare(snapshot, archive.location, report)
    except (ArchiveDamaged, SnapshotDamaged):
        _note(archive, Drilled(datetime.now(UTC), ok=False, seconds=time.monotonic() - began), report)
        raise
    done = Drill(
        archive=archive.location,
        models=tuple(snapshot.model for snapshot in result.snapshots),
        digests=tuple(snapshot.digest for snapshot in result.snapshots),
        files=sum(snapshot.files for snapshot in result.snapshots),
        size=sum(snapshot.size for snapshot in result.snapshots),
        restore_seconds=restored,
        seconds=time.monotonic() - began,
    )
    _note(archive, Drilled(datetime.now(UTC), ok=True, size=done.size, seconds=done.seconds), report)
    return done


def _compare(snapshot: Restored, location: str, report: Report) -> None:
    """Read what was restored from the disk, every file of it, and compare it with the manifest."""
    manifest = require_manifest(snapshot.path)
    paths = {entry.path: snapshot.path / entry.path for entry in manifest.files}
    found = digest_files(paths, ("sha256",), report, f"reading {len(paths)} files again")
    wrong = [e.path for e in manifest.files if judge(e, found[e.path], "sha256", e.sha256).status != "ok"]
    if manifest.digest != snapshot.digest or wrong:
        what = few(wrong) if wrong else "its manifest"
        raise ArchiveDamaged(f"{location} was restored and is not what its manifest says: {what}", files=wrong)


def _note(archive: StoredArchive, drilled: Drilled, report: Report) -> None:
    failed = note_drill(archive.store, archive.name, drilled)
    if failed:
        report(Warned(f"the drill is not noted on the archive: {failed.message}"))


@contextmanager
def _scratch(parent: Path) -> Iterator[Path]:
    """Make an empty directory, and remove it at the end, after what killed drills left."""
    with shortage(parent):
        parent.mkdir(parents=True, exist_ok=True)
        for left in parent.glob(f"{_PREFIX}*"):
            _remove_if_dead(left)
        directory = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
    # The kernel drops the lock with the process, so the next drill knows that nobody is at work here.
    descriptor = os.open(directory / _LOCK, os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield directory / "cache"
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        os.close(descriptor)


def _remove_if_dead(directory: Path) -> None:
    with suppress(OSError):
        descriptor = os.open(directory / _LOCK, os.O_RDWR)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(directory, ignore_errors=True)
        finally:
            os.close(descriptor)


__all__ = ["Drill", "drill"]
