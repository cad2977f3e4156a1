"""Whether a snapshot is what its manifest says: quickly by stat, deeply by hash, and mended where it is not."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from zops.cache.hashing import Hashed, hash_files
from zops.cache.incoming import is_unfinished
from zops.cache.layout import INDEX
from zops.cache.lock import TIMEOUT_S, hold
from zops.cache.manifest import (
    Finding,
    Manifest,
    clear_marker,
    damaged,
    quick_check,
    read_manifest,
    read_marker,
    sidecar,
    write_manifest,
    write_marker,
)
from zops.cache.safetensors import Header, check_shards, read_header
from zops.cache.source import local_manifest, walk
from zops.catalog import lookup
from zops.errors import SnapshotDamaged, SnapshotMissing
from zops.events import Report, Warned

SUFFIX = ".safetensors"
INDEX_SUFFIX = ".safetensors.index.json"


@dataclass(frozen=True, slots=True)
class Verification:
    """What a verification found: one finding a file, in the order of their paths."""

    path: Path
    manifest: Manifest
    findings: tuple[Finding, ...]
    deep: bool
    seconds: float
    verified_before: bool = True
    """Whether there was a record of an earlier verification to compare with; a quick one tells little without."""

    @property
    def bad(self) -> tuple[Finding, ...]:
        """The findings that make the snapshot unfit; a file too many does not."""
        return tuple(finding for finding in self.findings if finding.status not in {"ok", "extra"})

    @property
    def ok(self) -> bool:
        """Whether every file of the manifest is there and right."""
        return not self.bad

    def require(self) -> "Verification":
        """Return itself when all is well.

        Raises:
            SnapshotDamaged: naming every file that is not.
            SnapshotMissing: when all that is wrong is that nobody ever hashed the files.
        """
        if not self.verified_before and {finding.status for finding in self.bad} == {"changed"}:
            raise SnapshotMissing(
                f"the snapshot in {self.path} was never verified completely",
                code="snapshot-unverified",
                hint="verify it with: zops cache verify --deep",
            )
        if self.bad:
            raise damaged(self.path, self.findings)
        return self


def verify(snapshot: Path, *, deep: bool, report: Report) -> Verification:
    """Compare a snapshot with its manifest.

    Quick: a stat of each file against what was recorded when it was last verified, and the headers of the weights.
    Deep: the SHA-256 of each file; a clean one writes the marker that lets the snapshot be served, another clears it.

    Raises:
        SnapshotMissing: when there is no snapshot or no manifest to compare it with.
        SnapshotDamaged: when the manifest itself cannot be read.
    """
    began = time.monotonic()
    manifest = require_manifest(snapshot)
    marker = read_marker(snapshot)
    known = marker if marker and marker.manifest_digest == manifest.digest else None
    if deep:
        findings, hashed = findings_of(snapshot, manifest, report)
        _record(snapshot, manifest, findings, hashed, report)
    else:
        findings = _completed(snapshot, manifest, quick_check(snapshot, manifest, known))
    return Verification(snapshot, manifest, tuple(findings), deep, time.monotonic() - began, deep or known is not None)


def require_manifest(snapshot: Path) -> Manifest:
    """Return the manifest of a snapshot.

    Raises:
        SnapshotMissing: saying what is missing and how to get it.
    """
    manifest = read_manifest(snapshot)
    if manifest is not None:
        return manifest
    if is_unfinished(snapshot):
        raise SnapshotMissing(
            f"the pull of the snapshot in {snapshot} did not end",
            code="snapshot-incomplete",
            hint="go on with: zops cache pull",
        )
    if not (snapshot / INDEX).is_file():
        raise SnapshotMissing(f"{snapshot} holds no snapshot (no {INDEX})", hint="fetch it with: zops cache pull")
    raise SnapshotMissing(
        f"the snapshot in {snapshot} has no manifest to compare it with",
        code="manifest-missing",
        hint=f"take it as it is with: zops cache pin {snapshot}",
    )


def findings_of(snapshot: Path, manifest: Manifest, report: Report) -> tuple[list[Finding], dict[str, Hashed]]:
    """Hash every file of a manifest; return the findings, and the hash and stat of those that could be read."""
    paths = {entry.path: snapshot / entry.path for entry in manifest.files}
    results = hash_files(paths, report, f"hashing {len(paths)} files")
    hashed = {path: result for path, result in results.items() if not isinstance(result, OSError)}
    findings = []
    for entry in manifest.files:
        result = results[entry.path]
        if isinstance(result, FileNotFoundError | NotADirectoryError):
            findings.append(Finding(entry.path, "missing"))
        elif isinstance(result, OSError):
            findings.append(Finding(entry.path, "corrupt", f"cannot be read: {result.strerror}"))
        elif result[1][0] != entry.size:
            findings.append(Finding(entry.path, "wrong-size", f"{result[1][0]} bytes instead of {entry.size}"))
        elif result[0] != entry.sha256:
            findings.append(Finding(entry.path, "corrupt", f"SHA-256 {result[0][:12]} instead of {entry.sha256[:12]}"))
        else:
            findings.append(Finding(entry.path, "ok"))
    return _completed(snapshot, manifest, findings), hashed


def pin(snapshot: Path, model: str, revision: str, report: Report, *, lock_timeout_s: float = TIMEOUT_S) -> Manifest:
    """Take a snapshot as it is: hash every file, write a manifest for which this disk vouches, and the marker.

    Files that equal the catalog's pinned ones get the catalog's manifest instead, for which the hub vouches.

    Raises:
        SnapshotMissing: when the directory holds no snapshot.
        SnapshotDamaged: when its weights contradict their own headers or index.
        LockHeld: when another zops works on it.
    """
    if not (snapshot / INDEX).is_file():
        raise SnapshotMissing(f"{snapshot} holds no snapshot (no {INDEX})", hint="fetch one with: zops cache pull")
    known = lookup(model)
    with hold(sidecar(snapshot) / "lock", report, timeout_s=lock_timeout_s):
        manifest, stats = local_manifest(snapshot, known, revision, report)
        pinned = known.pinned()
        if pinned and Manifest.from_json(pinned).digest == manifest.digest:
            manifest = Manifest.from_json(pinned)
        findings = _completed(snapshot, manifest, [Finding(entry.path, "ok") for entry in manifest.files])
        if any(finding.status == "corrupt" for finding in findings):
            raise damaged(snapshot, findings)
        write_manifest(snapshot, manifest)
        write_marker(snapshot, manifest, stats)
    return manifest


def _completed(snapshot: Path, manifest: Manifest, findings: list[Finding]) -> list[Finding]:
    """Add what the headers of the weights tell, and the files that no manifest names."""
    by_path = {finding.path: finding for finding in findings}
    for path, wrong in _structure(snapshot, manifest, by_path):
        by_path[path] = Finding(path, "corrupt", wrong)
    names = {entry.path for entry in manifest.files}
    extra = [Finding(path, "extra") for path in walk(snapshot) if path not in names]
    return sorted([*by_path.values(), *extra], key=lambda finding: finding.path)


def _structure(snapshot: Path, manifest: Manifest, findings: Mapping[str, Finding]) -> list[tuple[str, str]]:
    """Check what can be told without reading the weights: headers, sizes, and indices against headers."""
    headers: dict[str, Header] = {}
    wrong = []
    judged = {path for path, finding in findings.items() if finding.status in {"ok", "changed"}}
    for entry in manifest.files:
        if entry.path.endswith(SUFFIX) and entry.path in judged:
            try:
                headers[entry.path] = read_header(snapshot / entry.path)
            except SnapshotDamaged as error:
                wrong.append((entry.path, str(error.details["reason"])))
            except OSError as error:
                wrong.append((entry.path, f"cannot be read: {error.strerror}"))
    broken = any(finding.status not in {"ok", "changed"} for finding in findings.values()) or wrong
    for entry in manifest.files:
        # With a shard broken anyway, its index would only repeat that.
        if entry.path.endswith(INDEX_SUFFIX) and entry.path in judged and not broken:
            wrong += check_shards(snapshot, entry.path, headers)
    return wrong


def _record(
    snapshot: Path, manifest: Manifest, findings: list[Finding], hashed: Mapping[str, Hashed], report: Report
) -> None:
    """Write or clear the marker; a snapshot on a read-only mount can still be verified."""
    try:
        if all(finding.status in {"ok", "extra"} for finding in findings):
            write_marker(snapshot, manifest, {path: stat for path, (_, stat) in hashed.items()})
        else:
            clear_marker(snapshot)
    except OSError as error:
        report(Warned(f"the result cannot be recorded in {snapshot}: {error.strerror}"))
