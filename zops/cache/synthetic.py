"""Make a synthetic model a verified snapshot from the start, and only where it is not there yet."""

from dataclasses import dataclass
from pathlib import Path

from zops.cache.lock import hold
from zops.cache.manifest import (
    FileEntry,
    Manifest,
    read_manifest,
    require_verified,
    stat_key,
    write_manifest,
    write_marker,
)
from zops.catalog.configs import Size
from zops.catalog.synthetic import MODEL_IDS, Synthetic, revision_of, synthesize
from zops.events import Report, silent


@dataclass(frozen=True, slots=True)
class Synthesized:
    """A synthetic snapshot. `changed` is False when it was there already."""

    path: Path
    manifest: Manifest
    changed: bool


def synthesize_snapshot(directory: Path, size: Size, *, seed: int = 0, report: Report = silent) -> Synthesized:
    """Make sure that a directory is a verified snapshot of a synthetic model.

    Raises:
        UsageError: when the directory holds something else or is a mount point.
        HostShort: when the disk has not enough room or may not be written.
        SnapshotDamaged: when the directory is this very snapshot, but files are damaged or missing.
        LockHeld: when another process makes it.
    """
    directory = directory.resolve()
    with hold(directory.parent / f".{directory.name}.lock", report):
        found = read_manifest(directory) if directory.is_dir() else None
        if found and (found.model, found.revision, found.origin) == (MODEL_IDS[size], revision_of(seed), "local"):
            return Synthesized(directory, require_verified(directory), changed=False)
        synthesize(directory, size, seed=seed, report=report, seal=_seal)
        return Synthesized(directory, require_verified(directory), changed=True)


def _seal(directory: Path, made: Synthetic) -> None:
    """Write manifest and marker; the hashes are of the bytes as they were written, so nothing needs reading again."""
    files = tuple(FileEntry(file.path, file.size, file.sha256) for file in made.files)
    manifest = Manifest(made.model, made.revision, files, origin="local", source="synthetic")
    write_manifest(directory, manifest)
    write_marker(directory, manifest, {entry.path: stat_key(directory / entry.path) for entry in files})
