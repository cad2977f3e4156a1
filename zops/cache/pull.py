"""From a source to a verified snapshot: fetch what is missing, check everything, and only then say that it is there."""

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from zops.cache.arrival import warn_without_digests
from zops.cache.fetch import fetch
from zops.cache.hashing import Hashed, hash_files
from zops.cache.hubs import Listed
from zops.cache.incoming import INCOMPLETE, PARTIAL, Incoming, is_unfinished, prune_empty
from zops.cache.layout import Snapshot, find, is_verified, place
from zops.cache.lock import TIMEOUT_S, hold
from zops.cache.manifest import FileEntry, Manifest, clear_marker, damaged, read_manifest, sidecar
from zops.cache.pin import manifest_of
from zops.cache.room import check_room, shortage_told
from zops.cache.source import Offer, offer_of_directory, offer_of_hub
from zops.cache.verify import findings_of
from zops.catalog import Model, lookup
from zops.errors import HostShort, SnapshotDamaged, UsageError
from zops.events import Report
from zops.spec import Spec

# Unit of st_blocks, whatever the file system's own is; stat(2).
STAT_BLOCK = 512


@dataclass(frozen=True, slots=True)
class PullResult:
    """What a pull did: the snapshot, the files it fetched, the files it found right, and the bytes of the former."""

    snapshot: Snapshot
    manifest: Manifest
    fetched: tuple[str, ...]
    found: tuple[str, ...]
    bytes: int

    @property
    def changed(self) -> bool:
        """Whether anything had to be fetched."""
        return bool(self.fetched)


def pull(spec: Spec, report: Report, *, lock_timeout_s: float = TIMEOUT_S) -> PullResult:
    """Bring the specification's model from its source into the cache, complete and verified.

    A snapshot that is complete and untouched since it was verified is found without asking the source, unless the
    revision is one that moves (a branch or a tag).

    Raises:
        SourceFailed: when the source does not deliver, naming the files; what arrived is kept for the next run.
        HostShort: when space, inodes or write access lack, before anything is fetched.
        LockHeld: when another zops works on the snapshot for longer than `lock_timeout_s`.
        UsageError: for an archive, which is restored, not pulled.
    """
    if spec.source.kind == "archive":
        raise UsageError(
            "an archive is restored, not pulled", code="source-is-archive", hint="restore it with: zops cache restore"
        )
    model = lookup(spec.model)
    present = _present(spec, model, spec.source.revision or model.commit)
    if not present:
        offer = _offer(spec, model, report)
        present = _present(spec, model, offer.revision)
    if present:
        _tidy(present.snapshot.path, report, lock_timeout_s)
        return present
    adopted = _adopt(spec, offer, report)
    if adopted:
        return adopted
    path = place(spec.cache.dir, model.id, offer.revision)
    try:
        with hold(sidecar(path) / "lock", report, timeout_s=lock_timeout_s):
            manifest, fetched, size = bring(path, offer, report)
    finally:
        prune_empty(path)
    kept = tuple(entry.path for entry in manifest.files if entry.path not in set(fetched))
    return PullResult(Snapshot(model.id, manifest.revision, "modelscope", path), manifest, fetched, kept, size)


def bring(path: Path, offer: Offer, report: Report) -> tuple[Manifest, tuple[str, ...], int]:
    """Complete the snapshot in `path` from an offer; return its manifest, the files fetched and their bytes.

    Files that are right already are kept, wrong ones replaced only after all of their successors were verified. To be
    called under the snapshot's lock.

    Raises:
        SourceFailed: naming every file that could not be had.
        HostShort: when space, inodes or write access lack.
    """
    incoming = Incoming(path)
    try:
        with shortage_told():
            missing, size = _fill(incoming, offer, report)
            incoming.install(offer.manifest or _manifest_of(incoming, offer, report))
    except BaseException:
        incoming.discard_if_empty()
        raise
    manifest = read_manifest(path)
    assert manifest is not None
    return manifest, tuple(file.path for file in missing), size


def _fill(incoming: Incoming, offer: Offer, report: Report) -> tuple[list[Listed], int]:
    """Bring what is missing into staging; return those files and their bytes."""
    right = _right_already(incoming, offer.files, report)
    missing = [file for file in offer.files if file.path not in right]
    size = sum(file.size for file in missing)
    if missing:
        # A bit that the disk flipped does not show in a stat, so the marker would go on to vouch for it.
        clear_marker(incoming.snapshot)
        check_room(incoming.snapshot, max(0, size - _partial_bytes(incoming)), len(missing), report)
        for file in missing:
            if file.sha256 is None and file.git_sha1 is None:
                incoming.forget_begun(file.path)
        fetch(offer.delivery, missing, incoming.directory, report, arrived=incoming.remember)
    return missing, size


def admit(path: Path, manifest: Manifest, report: Report, *, lock_timeout_s: float = TIMEOUT_S) -> None:
    """Make a directory that somebody else filled (a restored archive) a verified snapshot: hash everything first.

    Raises:
        SnapshotDamaged: naming every file that does not match; nothing is written then.
        LockHeld: when another zops works on the snapshot.
    """
    with hold(sidecar(path) / "lock", report, timeout_s=lock_timeout_s):
        findings, hashed = findings_of(path, manifest, report)
        if any(finding.status not in {"ok", "extra"} for finding in findings):
            raise damaged(path, findings)
        incoming = Incoming(path)
        incoming.remember_all(hashed)
        incoming.install(manifest)


def _offer(spec: Spec, model: Model, report: Report) -> Offer:
    if spec.source.kind == "directory":
        return offer_of_directory(spec.source, model, report)
    return offer_of_hub(spec.source, model, report)


def _present(spec: Spec, model: Model, revision: str) -> PullResult | None:
    """Find a verified snapshot of a commit in any layout; one that was derived from it stands for it."""
    if not revision:
        return None
    for snapshot in find(spec.cache.dir, model.id):
        if is_verified(snapshot.path):
            manifest = read_manifest(snapshot.path)
            if manifest and (manifest.model, manifest.base_revision) == (model.id, revision):
                return PullResult(snapshot, manifest, (), tuple(entry.path for entry in manifest.files), 0)
    return None


def _tidy(path: Path, report: Report, lock_timeout_s: float) -> None:
    """Remove what a run left that was killed after everything was in place, between its last steps."""
    if is_unfinished(path):
        with hold(sidecar(path) / "lock", report, timeout_s=lock_timeout_s):
            if is_verified(path):
                Incoming(path).discard()


def _adopt(spec: Spec, offer: Offer, report: Report) -> PullResult | None:
    """Take what another tool fetched into the cache, where it lies, when every file of it is right."""
    own = place(spec.cache.dir, offer.model, offer.revision)
    if any(file.sha256 is None and file.git_sha1 is None for file in offer.files):
        return None
    for snapshot in find(spec.cache.dir, offer.model):
        if snapshot.path != own and all(_has_size(snapshot.path / file.path, file.size) for file in offer.files):
            manifest, wrong = manifest_of(snapshot.path, offer)
            if wrong or read_manifest(snapshot.path) not in {None, manifest}:
                continue
            # Damaged (bad, or another revision of the same sizes) or read-only: everything is fetched to its own place.
            with suppress(SnapshotDamaged, HostShort):
                admit(snapshot.path, manifest, report)
                return PullResult(snapshot, manifest, (), tuple(entry.path for entry in manifest.files), 0)
    return None


def _right_already(incoming: Incoming, files: Iterable[Listed], report: Report) -> dict[str, Hashed]:
    """Return the files that are there and right, in staging or in place; what was hashed before is not hashed again."""
    right: dict[str, Hashed] = {}
    unknown: dict[str, Listed] = {}
    for file in files:
        known = incoming.checked(file.path)
        if known:
            if file.sha256 in {None, known[0]}:
                right[file.path] = known
        elif _has_size(incoming.where(file.path), file.size):
            unknown[file.path] = file
    if unknown:
        paths = {path: incoming.where(path) for path in unknown}
        for path, result in hash_files(paths, report, f"hashing {len(paths)} file(s) that are there").items():
            # One without a listed SHA-256 cannot be judged here; it is small, and fetched again.
            if not isinstance(result, OSError) and result[0] == unknown[path].sha256:
                incoming.remember(path, result)
                right[path] = result
            elif paths[path].is_relative_to(incoming.directory):
                paths[path].unlink(missing_ok=True)
    return right


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _manifest_of(incoming: Incoming, offer: Offer, report: Report) -> Manifest:
    """Write down what arrived; a hub vouches for it only where it listed a hash of every file."""
    entries = []
    for file in offer.files:
        known = incoming.checked(file.path)
        assert known is not None, file.path
        entries.append(FileEntry(file.path, known[1][0], known[0]))
    origin = "local" if warn_without_digests(offer.files, report) else "upstream"
    return Manifest(offer.model, offer.revision, tuple(sorted(entries)), origin, offer.text)  # type: ignore[arg-type] # both are an Origin


def _partial_bytes(incoming: Incoming) -> int:
    """Return the bytes of the disk that files which an earlier run began have taken already."""
    begun = (path for suffix in (INCOMPLETE, PARTIAL) for path in incoming.directory.rglob(f"*{suffix}"))
    return sum(path.stat().st_blocks * STAT_BLOCK for path in begun if path.is_file())
