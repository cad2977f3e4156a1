"""Pinning by the hub: what lies on the disk must be what the hub lists, and then the hub's word is written down."""

from pathlib import Path

from zops.cache.arrival import warn_without_digests
from zops.cache.hashing import git_sha1_file, sha256_file
from zops.cache.hubs import Listed
from zops.cache.layout import INDEX
from zops.cache.lock import TIMEOUT_S, hold
from zops.cache.manifest import FileEntry, Finding, Manifest, Origin, few, sidecar, write_manifest, write_marker
from zops.cache.source import Offer, offer_of_hub
from zops.cache.verify import findings_of
from zops.catalog import lookup
from zops.errors import SnapshotDamaged, SnapshotMissing
from zops.events import Report
from zops.spec import Source


def pin_from_hub(
    snapshot: Path, model: str, source: Source, report: Report, *, lock_timeout_s: float = TIMEOUT_S
) -> Manifest:
    """Write the manifest of a snapshot from the hub's listing, and the marker, after every file was found to be so.

    A branch or tag is resolved to its commit. At the catalog's commit the catalog's own listing is taken and no hub is
    asked. Nothing is fetched, and nothing is written when a file differs.

    Args:
        snapshot: its directory.
        model: owner/name.
        source: a hub; its `revision` is the one to pin.
        report: is told of progress.
        lock_timeout_s: longest wait for another zops that works on the snapshot.

    Raises:
        SnapshotMissing: when the directory holds no snapshot.
        SnapshotDamaged: naming every file that is not as the hub lists it.
        SourceFailed: when the hub cannot be asked.
        LockHeld: when another zops works on the snapshot.
    """
    if not (snapshot / INDEX).is_file():
        raise SnapshotMissing(f"{snapshot} holds no snapshot (no {INDEX})", hint="fetch one with: zops cache pull")
    known = lookup(model)
    pinned = known.pinned() if source.revision in {None, known.commit} else None
    offer = None if pinned else offer_of_hub(source, known, report)
    with hold(sidecar(snapshot) / "lock", report, timeout_s=lock_timeout_s):
        manifest, wrong = manifest_of(snapshot, offer) if offer else (Manifest.from_json(pinned or {}), [])
        findings, hashed = findings_of(snapshot, manifest, report)
        bad = [*wrong, *(finding for finding in findings if finding.status not in {"ok", "extra"})]
        if bad:
            raise _differs(snapshot, manifest, bad)
        if offer:
            warn_without_digests(offer.files, report)
        write_manifest(snapshot, manifest)
        write_marker(snapshot, manifest, {path: stat for path, (_, stat) in hashed.items()})
    return manifest


def manifest_of(root: Path, offer: Offer) -> tuple[Manifest, list[Finding]]:
    """Return the manifest that an offer makes of a directory, and the files that contradict the offer already.

    Hugging Face lists git's SHA-1 of small files: those are held to it here, and the SHA-256 of what is there is taken.
    The files with a listed SHA-256 are not looked at.
    """
    if offer.manifest:
        return offer.manifest, []
    entries, wrong = [], []
    for file in offer.files:
        try:
            sha256 = file.sha256 or _held_to_git(root / file.path, file)
        except FileNotFoundError:
            wrong.append(Finding(file.path, "missing"))
            continue
        if sha256:
            entries.append(FileEntry(file.path, file.size, sha256))
        else:
            wrong.append(Finding(file.path, "corrupt", "its size or git hash is not the listed one"))
    vouched = all(file.sha256 or file.git_sha1 for file in offer.files)
    origin: Origin = "upstream" if vouched else "local"
    return Manifest(offer.model, offer.revision, tuple(sorted(entries)), origin, offer.text), wrong


def _held_to_git(path: Path, file: Listed) -> str:
    """Return the SHA-256 of a file whose size and git hash (where one is listed) are right, else nothing."""
    right = path.stat().st_size == file.size and file.git_sha1 in {None, git_sha1_file(path)}
    return sha256_file(path) if right else ""


def _differs(snapshot: Path, manifest: Manifest, bad: list[Finding]) -> SnapshotDamaged:
    shown = few([f"{f.path} ({f.status})" for f in bad])
    return SnapshotDamaged(
        f"{len(bad)} file(s) in {snapshot} are not those of {manifest.model} at {manifest.revision}: {shown}",
        code="pin-differs",
        hint="fetch the hub's files with: zops cache pull; or take these as they are with: zops cache pin --from-disk",
        files={f.path: f.status for f in bad},
    )
