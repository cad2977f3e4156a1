"""Whether a snapshot is what its manifest says: quickly by stat, deeply by hash, and mended where it is not."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from zops.cache.hashing import Algorithm, Digests, Hashed, digest_files
from zops.cache.incoming import is_unfinished
from zops.cache.layout import INDEX
from zops.cache.lock import TIMEOUT_S, hold
from zops.cache.manifest import (
    FileEntry,
    Finding,
    Manifest,
    Marker,
    clear_marker,
    damaged,
    few,
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

Depth = Literal["quick", "reread", "deep"]

SUFFIX = ".safetensors"
INDEX_SUFFIX = ".safetensors.index.json"


@dataclass(frozen=True, slots=True)
class Verification:
    """What a verification found: one finding a file, in the order of their paths."""

    path: Path
    manifest: Manifest
    findings: tuple[Finding, ...]
    depth: Depth
    seconds: float
    verified_before: bool = True
    """Whether there was a record of an earlier verification to compare with; a quick one tells little without."""

    @property
    def deep(self) -> bool:
        """Whether every SHA-256 was compared."""
        return self.depth == "deep"

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
            SnapshotMissing: when all that is wrong is that files are missing, or that nobody ever hashed them.
        """
        missing = [finding.path for finding in self.bad if finding.status == "missing"]
        if missing and len(missing) == len(self.bad):
            raise SnapshotMissing(
                f"{len(missing)} file(s) of the snapshot in {self.path} are missing: {few(missing)}",
                code="snapshot-incomplete",
                hint="fetch them with: zops cache pull",
                files=missing,
            )
        if not self.verified_before and {finding.status for finding in self.bad} == {"changed"}:
            raise SnapshotMissing(
                f"the snapshot in {self.path} was never verified completely",
                code="snapshot-unverified",
                hint="verify it with: zops cache verify --deep",
            )
        if self.bad:
            raise damaged(self.path, self.findings)
        return self


def verify(snapshot: Path, *, deep: bool, report: Report, reread: bool = False) -> Verification:
    """Compare a snapshot with its manifest.

    Quick: a stat of each file against what was recorded when it was last verified, and the headers of the weights.
    Deep: the SHA-256 of each file; a clean one writes the marker that lets the snapshot be served, another clears it.
    Reread: every byte too, but against the BLAKE3 that a deep one recorded, which takes a third of the time or less;
    it believes `verified.json`, as a quick one does, and so finds what disks do, not what somebody does who can write
    there. A clean one takes the files as they are now for the known ones, another clears the marker.

    Raises:
        SnapshotMissing: when there is no snapshot, no manifest to compare it with, or no BLAKE3 to reread it by.
        SnapshotDamaged: when the manifest itself cannot be read.
    """
    began = time.monotonic()
    manifest = require_manifest(snapshot)
    marker = read_marker(snapshot)
    known = marker if marker and marker.manifest_digest == manifest.digest else None
    depth: Depth = "deep" if deep else "reread" if reread else "quick"
    match depth:
        case "deep":
            findings = _deeply(snapshot, manifest, known, report)
        case "reread":
            findings = _again(snapshot, manifest, known, report)
        case "quick":
            findings = complete(snapshot, manifest, quick_check(snapshot, manifest, known))
    before = depth != "quick" or known is not None
    return Verification(snapshot, manifest, tuple(findings), depth, time.monotonic() - began, before)


def _deeply(snapshot: Path, manifest: Manifest, known: Marker | None, report: Report) -> list[Finding]:
    """Compare every SHA-256; record the BLAKE3 of the same bytes unless it is known, for it costs a sixth more."""
    recorded = known.blake3 if known else {}
    missing = {entry.path for entry in manifest.files} - recorded.keys()
    found = _digests(snapshot, manifest, ("sha256", "blake3") if missing else ("sha256",), report)
    findings = complete(snapshot, manifest, _judge(manifest, found, "sha256", manifest.sha256))
    # With the same SHA-256 they are the same bytes: what was recorded of them stays true.
    blake3 = (
        {path: each.hex["blake3"] for path, each in found.items() if isinstance(each, Digests)} if missing else recorded
    )
    _record(snapshot, manifest, findings, found, report, blake3=blake3)
    return findings


def _again(snapshot: Path, manifest: Manifest, known: Marker | None, report: Report) -> list[Finding]:
    """Compare every recorded BLAKE3."""
    recorded = known.blake3 if known else {}
    if known is None or {entry.path for entry in manifest.files} - recorded.keys():
        raise SnapshotMissing(
            f"nobody recorded digests by which the snapshot in {snapshot} could be reread",
            code="digests-missing",
            hint="record them with: zops cache verify --deep",
        )
    found = _digests(snapshot, manifest, ("blake3",), report)
    findings = complete(snapshot, manifest, _judge(manifest, found, "blake3", recorded))
    _record(snapshot, manifest, findings, found, report, blake3=recorded, verified_at=known.verified_at)
    return findings


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
    found = _digests(snapshot, manifest, ("sha256",), report)
    hashed = {path: (each.hex["sha256"], each.stat) for path, each in found.items() if isinstance(each, Digests)}
    return complete(snapshot, manifest, _judge(manifest, found, "sha256", manifest.sha256)), hashed


def _digests(
    snapshot: Path, manifest: Manifest, algorithms: tuple[Algorithm, ...], report: Report
) -> dict[str, Digests | OSError]:
    paths = {entry.path: snapshot / entry.path for entry in manifest.files}
    return digest_files(paths, algorithms, report, f"hashing {len(paths)} files")


def _judge(
    manifest: Manifest, found: Mapping[str, Digests | OSError], algorithm: Algorithm, expected: Mapping[str, str]
) -> list[Finding]:
    return [judge(entry, found[entry.path], algorithm, expected[entry.path]) for entry in manifest.files]


def judge(entry: FileEntry, found: Digests | OSError, algorithm: Algorithm, expected: str) -> Finding:
    """Return what a file's digest, or the failure to get it, says of the file."""
    if isinstance(found, FileNotFoundError | NotADirectoryError):
        return Finding(entry.path, "missing")
    if isinstance(found, OSError):
        return Finding(entry.path, "corrupt", f"cannot be read: {found.strerror}")
    size, digest = found.stat[0], found.hex[algorithm]
    if size != entry.size:
        return Finding(entry.path, "wrong-size", f"{size} bytes instead of {entry.size}")
    if digest != expected:
        name = {"sha256": "SHA-256", "blake3": "BLAKE3"}[algorithm]
        return Finding(entry.path, "corrupt", f"{name} {digest[:12]} instead of {expected[:12]}")
    return Finding(entry.path, "ok")


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
        findings = complete(snapshot, manifest, [Finding(entry.path, "ok") for entry in manifest.files])
        if any(finding.status == "corrupt" for finding in findings):
            raise damaged(snapshot, findings)
        write_manifest(snapshot, manifest)
        write_marker(snapshot, manifest, stats)
    return manifest


def complete(snapshot: Path, manifest: Manifest, findings: list[Finding]) -> list[Finding]:
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
    snapshot: Path,
    manifest: Manifest,
    findings: list[Finding],
    found: Mapping[str, Digests | OSError],
    report: Report,
    *,
    blake3: Mapping[str, str],
    verified_at: float | None = None,
) -> None:
    """Write or clear the marker; a snapshot on a read-only mount can still be verified."""
    try:
        if all(finding.status in {"ok", "extra"} for finding in findings):
            stats = {path: each.stat for path, each in found.items() if isinstance(each, Digests)}
            write_marker(snapshot, manifest, stats, blake3=blake3, verified_at=verified_at)
        else:
            clear_marker(snapshot)
    except OSError as error:
        report(Warned(f"the result cannot be recorded in {snapshot}: {error.strerror}"))
