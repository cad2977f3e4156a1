"""What a cache holds and in which state it is, told by stat and headers alone."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from zops.cache.incoming import is_unfinished
from zops.cache.layout import INDEX, Snapshot, find
from zops.cache.manifest import Manifest, quick_check, read_manifest, read_marker
from zops.cache.remove import Used, users_of
from zops.cache.safetensors import read_header
from zops.cache.scrubbed import Result, read_record
from zops.cache.source import walk
from zops.cache.warm import Residency, residency
from zops.errors import SnapshotDamaged


@dataclass(frozen=True, slots=True)
class BackedUp:
    """The youngest archive of a snapshot, and the last time that one of its archives was restored to prove it."""

    at: datetime
    archive: str
    size_bytes: int
    seconds: float | None = None
    """How long it took to make; None when nobody noted it."""
    drilled_at: datetime | None = None
    drill_ok: bool | None = None


LastBackup = Callable[[Manifest], BackedUp | None]
"""How the snapshot of a manifest was last backed up."""

State = Literal["verified", "unverified", "incomplete", "damaged"]


@dataclass(frozen=True, slots=True)
class SnapshotStatus:
    """A snapshot and what is known of it. `verified_at` is in seconds since the epoch, None when it never was."""

    snapshot: Snapshot
    state: State
    size_bytes: int
    files: int
    dtypes: dict[str, tuple[str, ...]]
    """Component -> the types of its weights, as safetensors names them."""
    residency: Residency
    verified_at: float | None
    scrubbed_at: float | None
    """When the last round of a scrub ended or a scrub found a bad file; None when neither happened to this manifest."""
    scrub_result: Result
    origin: str
    """Who vouches for the manifest: upstream, local, or nobody (empty)."""
    manifest_digest: str
    slim_of: str = ""
    """The revision that a slim snapshot was made from, empty for any other."""
    parent: str = ""
    """The digest of that one's manifest."""
    used_by: tuple[str, ...] | None = None
    """The instances that have it mounted or serve it; None when nobody could be asked."""
    last_backup: BackedUp | None = None
    """Its newest archive; None when there is none or the store could not be asked."""

    def as_json(self) -> dict[str, Any]:
        """Return the JSON object documented in docs/reference/json.md."""
        return {
            "model": self.snapshot.model,
            "revision": self.snapshot.revision,
            "layout": self.snapshot.layout,
            "path": str(self.snapshot.path),
            "state": self.state,
            "size_bytes": self.size_bytes,
            "files": self.files,
            "dtypes": {component: list(dtypes) for component, dtypes in self.dtypes.items()},
            "resident_bytes": self.residency.resident,
            "share": round(self.residency.share, 4),
            "verified_at": self.verified_at,
            "scrubbed_at": self.scrubbed_at,
            "scrub_result": self.scrub_result,
            "origin": self.origin,
            "manifest_digest": self.manifest_digest,
            "slim_of": self.slim_of,
            "parent": self.parent,
            "used_by": None if self.used_by is None else list(self.used_by),
            "last_backup": self.last_backup.at.isoformat() if self.last_backup else None,
            **self._backup_as_json(),
        }

    def _backup_as_json(self) -> dict[str, Any]:
        backup = self.last_backup
        return {
            "last_backup_archive": backup.archive if backup else None,
            "last_backup_bytes": backup.size_bytes if backup else None,
            "last_backup_seconds": backup.seconds if backup else None,
            "last_drill": backup.drilled_at.isoformat() if backup and backup.drilled_at else None,
            "last_drill_ok": backup.drill_ok if backup else None,
        }


def status(
    cache_dir: Path, model: str | None = None, *, used: Used | None = None, last_backup: LastBackup | None = None
) -> list[SnapshotStatus]:
    """Return the state of every snapshot in a cache, or of those of one model; reads no weights.

    Args:
        cache_dir: root of the cache.
        model: owner/name, None for every model.
        used: what instances use, as the runtimes say; None when they could not be asked.
        last_backup: tells when a revision of a model was last backed up.
    """
    return [_status_of(snapshot, used, last_backup) for snapshot in find(cache_dir, model)]


def _status_of(snapshot: Snapshot, used: Used | None, last_backup: LastBackup | None) -> SnapshotStatus:
    path = snapshot.path
    state, manifest, verified_at = _state_of(path)
    scrubbed = read_record(path)
    if scrubbed and (manifest is None or manifest.digest != scrubbed.manifest_digest):
        scrubbed = None
    names = [name for name in walk(path) if (path / name).is_file()]
    return SnapshotStatus(
        snapshot=snapshot,
        state=state,
        size_bytes=sum((path / name).stat().st_size for name in names),
        files=len(names),
        dtypes=_dtypes(path, names),
        # A manifest that cannot be read makes the snapshot damaged, and then nobody loads it.
        residency=residency(path) if manifest or state != "damaged" else Residency(0, 0),
        verified_at=verified_at,
        scrubbed_at=scrubbed.ended_at if scrubbed else None,
        scrub_result=scrubbed.result if scrubbed else "",
        origin=manifest.origin if manifest else "",
        manifest_digest=manifest.digest if manifest else "",
        slim_of=manifest.base_revision if manifest and manifest.derived else "",
        parent=manifest.parent if manifest else "",
        used_by=None if used is None else users_of(path, used),
        last_backup=last_backup(manifest) if last_backup and manifest else None,
    )


def _state_of(path: Path) -> tuple[State, Manifest | None, float | None]:
    try:
        manifest = read_manifest(path)
    except SnapshotDamaged:
        return "damaged", None, None
    if manifest is None:
        unfinished = is_unfinished(path) or not (path / INDEX).is_file()
        return ("incomplete" if unfinished else "unverified"), None, None
    marker = read_marker(path)
    if marker and marker.manifest_digest != manifest.digest:
        marker = None
    statuses = {finding.status for finding in quick_check(path, manifest, marker)}
    verified_at = marker.verified_at if marker else None
    if statuses & {"missing", "wrong-size"} or (marker and "changed" in statuses):
        return "damaged", manifest, verified_at
    return ("verified" if marker else "unverified"), manifest, verified_at


def _dtypes(path: Path, names: list[str]) -> dict[str, tuple[str, ...]]:
    found: dict[str, set[str]] = {}
    for name in names:
        if name.endswith(".safetensors"):
            try:
                found.setdefault(name.partition("/")[0], set()).update(read_header(path / name).dtypes)
            except (SnapshotDamaged, OSError):
                continue
    return {component: tuple(sorted(dtypes)) for component, dtypes in sorted(found.items())}
