"""What a pull or repair has brought so far: a staging directory in the sidecar, and what was found right.

Nothing gets into the snapshot proper before everything is there, so a reader that knows nothing of markers (an SDK in
offline mode) never sees half a snapshot. After a kill, files that were hashed right are not hashed or fetched again.
"""

import json
import shutil
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from zops.cache.hashing import Hashed
from zops.cache.manifest import (
    FORMAT,
    Manifest,
    clear_marker,
    sidecar,
    stat_key,
    sync_directory,
    write_json,
    write_manifest,
    write_marker,
)

DIRECTORY = "incoming"
RECORD = "incoming.json"
# What the hubs' SDKs and we ourselves (zops.cache.ranges) put behind the name of a file that is not complete.
INCOMPLETE = ".incomplete"
PARTIAL = ".partial"
LEFTOVER_AGE_S = 3600.0


class Incoming:
    """The unfinished part of a snapshot. To be used under the snapshot's lock only."""

    def __init__(self, snapshot: Path) -> None:
        self.snapshot = snapshot
        self.directory = sidecar(snapshot) / DIRECTORY
        self._record = sidecar(snapshot) / RECORD
        self._checked = _read(self._record)
        self._lock = threading.Lock()

    def checked(self, path: str) -> Hashed | None:
        """Return what is known of a file, in staging or in place, unless it changed since it was hashed."""
        known = self._checked.get(path)
        with suppress(OSError):
            if known and stat_key(self.where(path)) == known[1]:
                return known
        return None

    def where(self, path: str) -> Path:
        """Return where a file is: in staging when it is there, else in the snapshot."""
        staged = self.directory / path
        return staged if staged.is_file() else self.snapshot / path

    def remember(self, path: str, hashed: Hashed) -> None:
        """Record durably what a file was found to be."""
        self.remember_all({path: hashed})

    def remember_all(self, hashed: Mapping[str, Hashed]) -> None:
        """Record durably what several files were found to be."""
        with self._lock:
            self._checked.update(hashed)
            body = {key: [sha256, *stat] for key, (sha256, stat) in self._checked.items()}
            write_json(self._record, {"format": FORMAT, "checked": body})

    def install(self, manifest: Manifest) -> None:
        """Move what was staged into the snapshot, then write manifest and marker; every file must have been checked."""
        marked = {}
        for entry in manifest.files:
            known = self.checked(entry.path)
            assert known is not None and known[0] == entry.sha256, entry.path  # noqa: PT018 - one invariant
            marked[entry.path] = known[1]
        clear_marker(self.snapshot)
        folders = {self.snapshot}
        for entry in manifest.files:
            staged = self.directory / entry.path
            if staged.is_file():
                target = self.snapshot / entry.path
                target.parent.mkdir(parents=True, exist_ok=True)
                staged.replace(target)
                folders.add(target.parent)
        for folder in folders:
            sync_directory(folder)
        write_manifest(self.snapshot, manifest)
        write_marker(self.snapshot, manifest, marked)
        self.discard()

    def forget_begun(self, path: str) -> None:
        """Remove the unfinished part of a file, for want of a hash that would tell whether the rest fits to it."""
        for suffix in (INCOMPLETE, PARTIAL, f"{PARTIAL}.json"):
            (self.directory / f"{path}{suffix}").unlink(missing_ok=True)

    def discard(self) -> None:
        """Forget everything that was brought, and what dead processes left half-written beside it."""
        for part in sidecar(self.snapshot).glob(".*.part"):
            with suppress(OSError):
                # A living one writes for milliseconds, and need not hold the lock to record a verification.
                if time.time() - part.stat().st_mtime > LEFTOVER_AGE_S:
                    part.unlink()
        shutil.rmtree(self.directory, ignore_errors=True)
        self._record.unlink(missing_ok=True)
        self._checked = {}

    def discard_if_empty(self) -> None:
        """Forget an attempt of which nothing came; what did come stays for the next one."""
        if not self._checked and not any(p.is_file() for p in self.directory.rglob("*") if p.parent.name != ".lock"):
            self.discard()


def prune_empty(snapshot: Path) -> None:
    """Remove the directories of a snapshot that hold nothing, so that a failed pull leaves nothing half-made."""
    with suppress(OSError):
        for directory in (sidecar(snapshot), snapshot, *snapshot.parents[:3]):
            directory.rmdir()


def is_unfinished(snapshot: Path) -> bool:
    """Tell whether a pull or repair of this snapshot began and did not end."""
    return (sidecar(snapshot) / DIRECTORY).is_dir() or (sidecar(snapshot) / RECORD).is_file()


def _read(record: Path) -> dict[str, Hashed]:
    """Read what an earlier run recorded; anything that cannot be read only costs hashing again."""
    try:
        body = json.loads(record.read_text(encoding="utf-8"))
        return {str(p): (str(h), (int(a), int(b), int(c))) for p, (h, a, b, c) in body["checked"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
