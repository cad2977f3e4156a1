"""Mending a snapshot: only what is bad is fetched, and it replaces nothing before it was verified."""

from dataclasses import dataclass
from pathlib import Path

from zops.cache.hubs import Listed
from zops.cache.incoming import Incoming
from zops.cache.lock import TIMEOUT_S, hold
from zops.cache.manifest import Finding, sidecar
from zops.cache.pull import bring
from zops.cache.source import Offer, deliver_for
from zops.cache.verify import Verification, findings_of, require_manifest, verify
from zops.errors import UsageError
from zops.events import Report
from zops.spec import Source


@dataclass(frozen=True, slots=True)
class Repair:
    """What was bad, what was fetched for it, and how the snapshot is now."""

    found: tuple[Finding, ...]
    fetched: tuple[str, ...]
    verification: Verification


def repair(snapshot: Path, source: Source, report: Report, *, lock_timeout_s: float = TIMEOUT_S) -> Repair:
    """Hash every file of a snapshot and fetch those that are not right; all other files stay untouched.

    Raises:
        SnapshotMissing: when there is no manifest to mend it by.
        SourceFailed: when the source does not deliver; the old files are still in place then.
        UsageError: when the source is an archive.
        LockHeld: when another zops works on the snapshot.
    """
    if source.kind == "archive":
        raise UsageError(
            "a snapshot is not repaired from an archive", code="source-is-archive", hint="use: zops cache restore"
        )
    manifest = require_manifest(snapshot)
    with hold(sidecar(snapshot) / "lock", report, timeout_s=lock_timeout_s):
        findings, hashed = findings_of(snapshot, manifest, report)
        right = {finding.path for finding in findings if finding.status == "ok"}
        bad = tuple(finding for finding in findings if finding.status not in {"ok", "extra"})
        incoming = Incoming(snapshot)
        # What is sound is not hashed again; a file whose hash is right and whose header is not cannot be mended.
        incoming.remember_all(
            {e.path: hashed[e.path] for e in manifest.files if e.path in right or _same(hashed, e.path, e.sha256)}
        )
        files = tuple(Listed(entry.path, entry.size, entry.sha256) for entry in manifest.files)
        fetched: tuple[str, ...] = ()
        if all(_same(hashed, entry.path, entry.sha256) for entry in manifest.files):
            incoming.install(manifest)
        else:
            deliver = deliver_for(manifest, source)
            offer = Offer(manifest.model, manifest.revision, files, deliver, manifest.source, manifest)
            _, fetched, _ = bring(snapshot, offer, report)
    return Repair(bad, fetched, verify(snapshot, deep=False, report=report))


def _same(hashed: dict[str, tuple[str, tuple[int, int, int]]], path: str, sha256: str) -> bool:
    return path in hashed and hashed[path][0] == sha256
