"""The manifest of a snapshot: its files with size and SHA-256, and the marker that says they were all verified.

Both lie in `.zops/` inside the snapshot, so that they travel with it when it is renamed, mounted or archived:
`manifest.json` says what must be there; `verified.json` exists only after every file was hashed and found right, and
records the size, modification time and inode that each file had then. Format: docs/reference/manifest.md.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from zops.errors import SnapshotDamaged, SnapshotMissing

SIDECAR = ".zops"
FORMAT = 1
Origin = Literal["upstream", "local"]
Status = Literal["ok", "missing", "wrong-size", "corrupt", "changed", "extra"]


@dataclass(frozen=True, slots=True, order=True)
class FileEntry:
    """One file of a snapshot: its path relative to the snapshot (POSIX), its size in bytes, its SHA-256 in hex."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a snapshot must contain. `origin` tells who vouches for it: a hub (upstream) or only this disk (local).

    A snapshot that was made from another one says how (`derived`: "bf16") and from which (`parent`: the digest of that
    one's manifest); both are empty for any other.
    """

    model: str
    revision: str
    files: tuple[FileEntry, ...]
    origin: Origin = "upstream"
    source: str = ""
    parent: str = ""
    derived: str = ""

    @property
    def base_revision(self) -> str:
        """The revision that was asked for at the hub: the parent's, for a snapshot that was derived from one."""
        return self.revision.removesuffix(f"-{self.derived}") if self.derived else self.revision

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the sorted `sha256  size  path` lines: equal files give equal digests, whoever lists them."""
        lines = "".join(f"{entry.sha256}  {entry.size}  {entry.path}\n" for entry in sorted(self.files))
        return hashlib.sha256(lines.encode()).hexdigest()

    @cached_property
    def sha256(self) -> dict[str, str]:
        """Path -> SHA-256 in hex of each file."""
        return {entry.path: entry.sha256 for entry in self.files}

    @cached_property
    def size(self) -> int:
        """Bytes of all files together."""
        return sum(entry.size for entry in self.files)

    def as_json(self) -> dict[str, Any]:
        """Return the manifest as it is written to disk and into archives."""
        return {
            "format": FORMAT,
            "model": self.model,
            "revision": self.revision,
            "origin": self.origin,
            "source": self.source,
            **({"parent": self.parent, "derived": self.derived} if self.derived else {}),
            "digest": self.digest,
            "files": [{"path": entry.path, "size": entry.size, "sha256": entry.sha256} for entry in sorted(self.files)],
        }

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> "Manifest":
        """Build a manifest from its JSON; the text may come from an archive or a mirror and is not trusted.

        Raises:
            SnapshotDamaged: when the body is not a manifest, names a path outside the snapshot or contradicts itself.
        """
        try:
            if body["format"] != FORMAT:
                raise SnapshotDamaged(
                    f"the manifest has format {body['format']!r}, this zops reads format {FORMAT}",
                    code="manifest-format",
                    hint="use the zops that wrote it, or a newer one",
                )
            files = tuple(FileEntry(str(f["path"]), int(f["size"]), str(f["sha256"])) for f in body["files"])
            manifest = cls(
                model=str(body["model"]),
                revision=str(body["revision"]),
                files=files,
                origin="local" if body["origin"] == "local" else "upstream",
                source=str(body.get("source", "")),
                parent=str(body.get("parent", "")),
                derived=str(body.get("derived", "")),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise SnapshotDamaged(f"not a manifest: {error!r}", code="manifest-invalid") from None
        for entry in files:
            check_entry(entry)
        if len({entry.path for entry in files}) != len(files):
            raise SnapshotDamaged("the manifest names a file twice", code="manifest-invalid")
        if body.get("digest", manifest.digest) != manifest.digest:
            raise SnapshotDamaged("the manifest's digest does not match its files", code="manifest-invalid")
        return manifest


def check_entry(entry: FileEntry) -> None:
    """Refuse an entry that leaves the snapshot, touches the sidecar or has no plausible size or hash.

    Raises:
        SnapshotDamaged: naming the path.
    """
    path = PurePosixPath(entry.path)
    inside = entry.path == str(path) and not path.is_absolute() and ".." not in path.parts and path.parts
    if not inside or path.parts[0] == SIDECAR or "\0" in entry.path:
        raise SnapshotDamaged(f"the manifest names {entry.path!r}, no path inside a snapshot", code="manifest-invalid")
    if entry.size < 0 or len(entry.sha256) != 64 or set(entry.sha256) - set("0123456789abcdef"):
        raise SnapshotDamaged(f"the manifest's size or SHA-256 of {entry.path!r} is none", code="manifest-invalid")


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found of one file: its status and, unless it is ok, what differs."""

    path: str
    status: Status
    detail: str = ""


@dataclass(frozen=True)
class Marker:
    """The record of the last complete verification: when, of which manifest, and how each file looked then."""

    manifest_digest: str
    verified_at: float
    stats: Mapping[str, tuple[int, int, int]] = field(repr=False)
    """Path -> (size, mtime in ns, inode)."""
    blake3: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Path -> BLAKE3 in hex of the bytes whose SHA-256 was right; empty when none were recorded."""


def sidecar(snapshot: Path) -> Path:
    """Return the directory in which zops keeps what it knows of a snapshot."""
    return snapshot / SIDECAR


def read_manifest(snapshot: Path) -> Manifest | None:
    """Return the manifest of a snapshot, None when it has none.

    Raises:
        SnapshotDamaged: when there is one that cannot be read.
    """
    body = read_json(sidecar(snapshot) / "manifest.json")
    return None if body is None else Manifest.from_json(body)


def write_manifest(snapshot: Path, manifest: Manifest) -> None:
    """Write the manifest durably; whatever was verified before no longer counts unless the files are the same."""
    marker = read_marker(snapshot)
    if marker and marker.manifest_digest != manifest.digest:
        clear_marker(snapshot)
    write_json(sidecar(snapshot) / "manifest.json", manifest.as_json())


def read_marker(snapshot: Path) -> Marker | None:
    """Return the record of the last complete verification, None when there is none (or none that can be read)."""
    try:
        body = read_json(sidecar(snapshot) / "verified.json")
        if body is None or body["format"] != FORMAT:
            return None
        stats = {str(path): (int(s[0]), int(s[1]), int(s[2])) for path, s in body["stats"].items()}
        blake3 = {str(path): str(digest) for path, digest in body.get("blake3", {}).items()}
        return Marker(str(body["manifest_digest"]), float(body["verified_at"]), stats, blake3)
    except (SnapshotDamaged, KeyError, TypeError, ValueError, AttributeError, IndexError):
        return None


def write_marker(
    snapshot: Path,
    manifest: Manifest,
    stats: Mapping[str, tuple[int, int, int]],
    *,
    blake3: Mapping[str, str] | None = None,
    verified_at: float | None = None,
) -> None:
    """Record that every file of the manifest was hashed and found right.

    Args:
        snapshot: the snapshot's directory.
        manifest: what was verified.
        stats: path -> `stat_key` of each file, taken *before* it was hashed, so that a later write is seen.
        blake3: path -> BLAKE3 of each file, where it is known.
        verified_at: when the SHA-256 was compared, in seconds since the epoch; now by default.
    """
    body: dict[str, object] = {
        "format": FORMAT,
        "manifest_digest": manifest.digest,
        "verified_at": time.time() if verified_at is None else verified_at,
        "stats": {path: list(stat) for path, stat in stats.items()},
    }
    if blake3:
        body["blake3"] = dict(blake3)
    write_json(sidecar(snapshot) / "verified.json", body)


def clear_marker(snapshot: Path) -> None:
    """Forget the last verification, durably; to be called before any file of the snapshot is touched."""
    try:
        (sidecar(snapshot) / "verified.json").unlink()
    except FileNotFoundError:
        return
    sync_directory(sidecar(snapshot))


def stat_key(path: Path) -> tuple[int, int, int]:
    """Return (size, mtime in ns, inode) of the file behind a path, links followed."""
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ino


def quick_check(snapshot: Path, manifest: Manifest, marker: Marker | None) -> list[Finding]:
    """Compare each file with what was recorded when it was last verified; reads no file, takes milliseconds."""
    findings = []
    for entry in manifest.files:
        try:
            size, mtime, inode = stat_key(snapshot / entry.path)
        except (FileNotFoundError, NotADirectoryError):
            findings.append(Finding(entry.path, "missing"))
            continue
        recorded = marker.stats.get(entry.path) if marker else None
        if size != entry.size:
            findings.append(Finding(entry.path, "wrong-size", f"{size} bytes instead of {entry.size}"))
        elif recorded != (size, mtime, inode):
            detail = "was touched since it was verified" if recorded else "was never verified"
            findings.append(Finding(entry.path, "changed", detail))
        else:
            findings.append(Finding(entry.path, "ok"))
    return findings


def require_verified(snapshot: Path) -> Manifest:
    """Return the manifest of a snapshot that is complete and was verified, by a quick check.

    Raises:
        SnapshotMissing: when the directory, its manifest, its marker or a file is missing.
        SnapshotDamaged: when a file differs from what was verified.
    """
    if not (snapshot / "model_index.json").is_file():
        raise SnapshotMissing(
            f"{snapshot} holds no snapshot (no model_index.json)", hint="fetch it with: zops cache pull"
        )
    manifest = read_manifest(snapshot)
    marker = read_marker(snapshot)
    if manifest is None or marker is None or marker.manifest_digest != manifest.digest:
        raise SnapshotMissing(
            f"the snapshot in {snapshot} was never verified completely",
            code="snapshot-unverified",
            hint="verify it with: zops cache verify --deep",
        )
    bad = [finding for finding in quick_check(snapshot, manifest, marker) if finding.status != "ok"]
    if bad:
        raise damaged(snapshot, bad)
    return manifest


def few(names: Sequence[str]) -> str:
    """Name the first three, and say how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def damaged(snapshot: Path, findings: Iterable[Finding]) -> SnapshotDamaged:
    """Build the error that names every file that is not ok."""
    bad = [finding for finding in findings if finding.status not in {"ok", "extra"}]
    shown = few([f"{f.path} ({f.status})" for f in bad])
    return SnapshotDamaged(
        f"{len(bad)} file(s) of the snapshot in {snapshot} do not match the manifest: {shown}",
        hint="repair it with: zops cache verify --deep --repair",
        files={f.path: f.status for f in bad},
    )


def write_json(path: Path, body: object) -> None:
    """Write JSON durably."""
    write_text(path, json.dumps(body, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text durably: temporary sibling, fsync, rename, fsync of the directory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make renames and creations in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the JSON object in a file, None when there is no file.

    Raises:
        SnapshotDamaged: when it cannot be read or is none.
    """
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise SnapshotDamaged(f"{path} cannot be read: {error}", code="manifest-invalid") from None
    if not isinstance(body, dict):
        raise SnapshotDamaged(f"{path} is no JSON object", code="manifest-invalid")
    return body
