"""Mending a snapshot: only what is bad is fetched, and it replaces nothing before it was verified."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from zops.cache.fetch import Delivery
from zops.cache.hashing import Hashed
from zops.cache.hubs import Listed
from zops.cache.incoming import Incoming
from zops.cache.lock import TIMEOUT_S, hold
from zops.cache.manifest import Finding, Manifest, clear_marker, sidecar
from zops.cache.pull import bring
from zops.cache.room import shortage_told
from zops.cache.source import Offer, delivery_for
from zops.cache.verify import Verification, findings_of, require_manifest, verify
from zops.errors import ArchiveDamaged, SnapshotMissing, SourceFailed, UsageError
from zops.events import Report, Warned
from zops.spec import Source


@dataclass(frozen=True, slots=True)
class Repair:
    """What was bad, what was fetched for it, and how the snapshot is now."""

    found: tuple[Finding, ...]
    fetched: tuple[str, ...]
    verification: Verification


@dataclass(frozen=True, slots=True)
class Spring:
    """Something that single files can be had from: its name for people, and what opens it for a manifest."""

    text: str
    open: Callable[[Manifest, Report], Delivery]


def repair(
    snapshot: Path,
    source: Source | None,
    report: Report,
    *,
    archive: Spring | None = None,
    lock_timeout_s: float = TIMEOUT_S,
) -> Repair:
    """Hash every file of a snapshot and fetch those that are not right; all other files stay untouched.

    Args:
        snapshot: its directory.
        source: where its files can be had; None (or one of kind archive) to ask the archive only.
        report: is told of progress.
        archive: what is asked for the files that the source does not deliver; opened only then.
        lock_timeout_s: longest wait for another zops that works on the snapshot.

    Raises:
        SnapshotMissing: when there is no manifest to mend it by.
        SourceFailed: when nobody delivers; the old files are still in place then.
        UsageError: when there is nothing to fetch from.
        LockHeld: when another zops works on the snapshot.
    """
    manifest = require_manifest(snapshot)
    springs = list(_springs(manifest, source, archive))
    with hold(sidecar(snapshot) / "lock", report, timeout_s=lock_timeout_s), shortage_told():
        findings, hashed = findings_of(snapshot, manifest, report)
        bad = tuple(finding for finding in findings if finding.status not in {"ok", "extra"})
        if bad:
            # Before anything is written: on a full disk this is the last that can be done.
            clear_marker(snapshot)
        incoming = Incoming(snapshot)
        # By hash, not by finding: a file whose hash is right and whose header is not cannot be mended.
        sound = {e.path: hashed[e.path] for e in manifest.files if _same(hashed, e.path, e.sha256)}
        incoming.remember_all(sound)
        fetched: tuple[str, ...] = ()
        if len(sound) == len(manifest.files):
            incoming.install(manifest)
        else:
            fetched = _mend(snapshot, manifest, springs, report)
    return Repair(bad, fetched, verify(snapshot, deep=False, report=report))


def _springs(manifest: Manifest, source: Source | None, archive: Spring | None) -> Iterator[Spring]:
    if manifest.derived:
        # No hub has what was made here.
        if archive is None:
            raise UsageError(
                f"this snapshot was made here ({manifest.derived}); no hub has its files",
                code="source-lacks-derived",
                hint="make it anew with: zops cache slim",
            )
    elif source is not None and source.kind != "archive":
        yield Spring(source.kind, lambda manifest, report: delivery_for(manifest, source, report))
    elif archive is None:
        raise UsageError(
            "there is nothing to repair the snapshot from",
            code="source-is-archive",
            hint="name an archive with --from, or set another source.kind",
        )
    if archive is not None:
        yield archive


def _mend(snapshot: Path, manifest: Manifest, springs: list[Spring], report: Report) -> tuple[str, ...]:
    """Fetch from the first spring, and what it does not deliver from the next; return the files that were fetched."""
    files = tuple(Listed(entry.path, entry.size, entry.sha256) for entry in manifest.files)
    missing = _missing(snapshot, manifest)
    failures: list[SourceFailed | ArchiveDamaged | SnapshotMissing] = []
    for spring in springs:
        try:
            offer = Offer(
                manifest.model, manifest.revision, files, spring.open(manifest, report), manifest.source, manifest
            )
            bring(snapshot, offer, report)
        except (SourceFailed, ArchiveDamaged, SnapshotMissing) as error:
            failures.append(error)
            if spring is not springs[-1]:
                report(
                    Warned(f"{spring.text}: {error.message}; going on with {springs[springs.index(spring) + 1].text}")
                )
        else:
            return missing
    if len(failures) == 1:
        only = failures[0]
        way = "mend it from a backup with: zops cache verify --deep --repair --from ARCHIVE"
        raise SourceFailed(
            only.message, code=only.code, hint=f"{only.hint}; or {way}" if only.hint else way, **only.details
        ) from only
    told = "; ".join(f"{spring.text}: {error.message}" for spring, error in zip(springs, failures, strict=True))
    raise SourceFailed(
        f"nobody delivers what is bad in {snapshot}: {told}",
        code="repair-sources-failed",
        hint="the files are as they were; make one of the two reachable, or name another with --from ARCHIVE",
        files=dict.fromkeys(_missing(snapshot, manifest), "was not delivered"),
    ) from failures[-1]


def _missing(snapshot: Path, manifest: Manifest) -> tuple[str, ...]:
    """Return the files that are neither in place nor in staging as they must be."""
    incoming = Incoming(snapshot)
    known = {entry.path: incoming.checked(entry.path) for entry in manifest.files}
    return tuple(e.path for e in manifest.files if (now := known[e.path]) is None or now[0] != e.sha256)


def _same(hashed: dict[str, Hashed], path: str, sha256: str) -> bool:
    return path in hashed and hashed[path][0] == sha256
