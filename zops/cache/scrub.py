"""Deep verification in the background: slowly, at idle priority, a part at a time, going on where it stopped.

It reads the disk itself and not the page cache, so a byte that rotted is found while memory still has the right one.
What was read in this round is kept beside the snapshot, or in the host's state directory where that is read-only.
"""

import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from zops.cache import textfile
from zops.cache.background import Pace, stand_back
from zops.cache.hashing import Digests, Stat, new_digest
from zops.cache.lock import TIMEOUT_S, hold
from zops.cache.manifest import (
    FileEntry,
    Finding,
    Manifest,
    clear_marker,
    damaged,
    read_manifest,
    read_marker,
    sidecar,
    write_marker,
)
from zops.cache.reading import OpenFile, new_buffer
from zops.cache.scrubbed import Record, Result, Seen, is_writable, look, read_record, write_record
from zops.cache.textfile import Metric, render
from zops.cache.verify import complete, judge, require_manifest
from zops.events import Report, Task, Warned, task

RATE = 200_000_000
"""Bytes a second unless told otherwise: a tenth of what a local SSD does, and three minutes for 33 GB."""

# What was found is made durable after each file, but not more often than this: a snapshot may have many small ones.
SAVE_INTERVAL_S = 1.0


@dataclass(frozen=True, slots=True)
class Scrub:
    """What one run did, and where its round is.

    `findings` are of all files seen in this round, `read_files` and `read_bytes` what this run read.
    """

    path: Path
    manifest: Manifest
    findings: tuple[Finding, ...]
    read_files: int
    read_bytes: int
    left_files: int
    finished: bool
    result: Result
    scrubbed_at: float | None
    seconds: float

    @property
    def bad(self) -> tuple[Finding, ...]:
        """The findings that make the snapshot unfit."""
        return tuple(finding for finding in self.findings if finding.status not in {"ok", "extra"})

    def require(self) -> "Scrub":
        """Return itself when nothing bad was found in this round.

        Raises:
            SnapshotDamaged: naming every file that is not what it must be.
        """
        if self.bad:
            raise damaged(self.path, self.findings)
        return self


def scrub(
    snapshot: Path,
    report: Report,
    *,
    rate: float = RATE,
    limit_s: float | None = None,
    lock_timeout_s: float = TIMEOUT_S,
) -> Scrub:
    """Compare the SHA-256 of a snapshot's files on the disk, going on where the last run stopped.

    A bad file ends the trust in the snapshot at once (its marker is removed); the run goes on, to name all of them. A
    round that ends well renews the marker.

    Args:
        snapshot: the snapshot's directory.
        report: told of the progress.
        rate: bytes a second, on average.
        limit_s: begin no file after so many seconds; one file is always read, so that every round ends some day.
        lock_timeout_s: how long to wait for another zops that works on the snapshot.

    Raises:
        SnapshotMissing: when there is no snapshot or no manifest to compare it with.
        SnapshotDamaged: when the manifest itself cannot be read.
        LockHeld: when another scrub of this snapshot runs.
    """
    manifest = require_manifest(snapshot)
    pace = Pace(rate)
    run = _Run(snapshot, manifest, report, pace, lock_timeout_s)
    locked = hold(sidecar(snapshot) / "scrub.lock", report, timeout_s=0) if run.writable else nullcontext()
    with locked, ThreadPoolExecutor(1, "scrub", initializer=stand_back) as pool:
        try:
            return pool.submit(run.go, limit_s).result()
        finally:
            pace.stopped.set()


class _Run:
    """One run of a scrub."""

    def __init__(self, snapshot: Path, manifest: Manifest, report: Report, pace: Pace, lock_timeout_s: float) -> None:
        self.writable = is_writable(snapshot)
        self._snapshot = snapshot
        self._manifest = manifest
        self._report = report
        self._pace = pace
        self._lock_timeout_s = lock_timeout_s
        self._buffer = new_buffer()
        self._saved_at = 0.0
        record = read_record(snapshot)
        if record is None or record.manifest_digest != manifest.digest:
            record = Record(manifest.digest, began_at=time.time())
        elif not record.seen:
            record = replace(record, began_at=time.time())
        self._record = record

    def go(self, limit_s: float | None) -> Scrub:
        """Read what is left of the round, as far as the limit goes."""
        began = time.monotonic()
        pending = [entry for entry in self._manifest.files if not self._is_seen(entry)]
        total = sum(entry.size for entry in pending)
        read = 0
        with task(self._report, "scrub", f"scrubbing {self._snapshot.name}", total=total) as counter:
            try:
                for entry in pending:
                    if read and limit_s is not None and time.monotonic() - began >= limit_s:
                        break
                    self._look_at(entry, counter)
                    read += 1
            finally:
                self._save()
        left = sum(not self._is_seen(entry) for entry in self._manifest.files)
        findings = [Finding(path, seen.status, seen.detail) for path, seen in sorted(self._record.seen.items())]
        if not left:
            findings = self._end_round(findings)
        return Scrub(
            path=self._snapshot, manifest=self._manifest, findings=tuple(findings), read_files=read,
            read_bytes=counter.done, left_files=left, finished=not left, result=self._record.result,
            scrubbed_at=self._record.ended_at, seconds=time.monotonic() - began,
        )  # fmt: skip

    def _is_seen(self, entry: FileEntry) -> bool:
        """Tell whether this round has read the file as it is now."""
        seen = self._record.seen.get(entry.path)
        return seen is not None and seen.stat == look(self._snapshot / entry.path)

    def _look_at(self, entry: FileEntry, counter: Task) -> None:
        found = self._digest(entry, counter)
        finding = judge(entry, found, "sha256", entry.sha256)
        stat = found.stat if isinstance(found, Digests) else look(self._snapshot / entry.path)
        if finding.status != "ok" and not self._is_bad(entry, stat):
            self._report(Warned(f"{entry.path} changed while it was read; it is left for the next run"))
            return
        seen = {**self._record.seen, entry.path: Seen(finding.status, finding.detail, stat)}
        self._record = replace(self._record, seen=seen)
        if finding.status != "ok":
            self._condemn()
        elif time.monotonic() - self._saved_at >= SAVE_INTERVAL_S:
            self._save()

    def _digest(self, entry: FileEntry, counter: Task) -> Digests | OSError:
        """Read a file from the disk, slowly."""
        digest = new_digest("sha256")
        try:
            file = OpenFile(self._snapshot / entry.path)
        except OSError as error:
            return error
        try:
            for start in range(0, file.size, self._pace.step):
                count = min(self._pace.step, file.size - start)
                self._pace.spend(count)
                digest.update(self._buffer[: file.from_disk(self._buffer, start, count)])
                counter.advance(count)
        except OSError as error:
            return error
        finally:
            file.close()
        return Digests(file.stat, {"sha256": digest.hexdigest()})

    def _is_bad(self, entry: FileEntry, stat: Stat) -> bool:
        """Tell whether nobody was just replacing what looks bad: the file and the manifest are still the same."""
        with self._undisturbed():
            manifest = read_manifest(self._snapshot)
            same = manifest is not None and manifest.digest == self._manifest.digest
            return same and stat == look(self._snapshot / entry.path)

    def _condemn(self) -> None:
        """End the trust in the snapshot."""
        self._conclude("damaged", self._record.seen)
        try:
            clear_marker(self._snapshot)
        except OSError as error:
            self._report(Warned(f"the marker in {self._snapshot} cannot be removed: {error.strerror}"))

    def _end_round(self, findings: list[Finding]) -> list[Finding]:
        """Judge all files together; renew the marker when all is well."""
        findings = complete(self._snapshot, self._manifest, findings)
        stats = {path: seen.stat for path, seen in self._record.seen.items()}
        if any(finding.status not in {"ok", "extra"} for finding in findings):
            self._condemn()
            self._conclude("damaged", {})
            return findings
        if self.writable:
            with self._undisturbed():
                manifest, marker = read_manifest(self._snapshot), read_marker(self._snapshot)
                if manifest and manifest.digest == self._manifest.digest:
                    known = marker if marker and marker.manifest_digest == manifest.digest else None
                    # Every file was read since the round began, which may be some days ago.
                    at = max(self._record.began_at, known.verified_at if known else 0.0)
                    blake3 = known.blake3 if known else None
                    write_marker(self._snapshot, manifest, stats, blake3=blake3, verified_at=at)
        self._conclude("ok", {})
        return findings

    def _undisturbed(self) -> AbstractContextManager[None]:
        """Keep other zopses from changing the snapshot, where anybody can."""
        if not self.writable:
            return nullcontext()
        return hold(sidecar(self._snapshot) / "lock", self._report, timeout_s=self._lock_timeout_s)

    def _conclude(self, result: Result, seen: Mapping[str, Seen]) -> None:
        self._record = replace(self._record, result=result, ended_at=time.time(), seen=seen)
        self._save()

    def _save(self) -> None:
        try:
            write_record(self._snapshot, self._record)
        except OSError as error:
            self._report(Warned(f"how far the scrub came cannot be recorded: {error}"))
        self._saved_at = time.monotonic()


def write_metrics(path: Path, scrub: Scrub) -> None:
    """Write the outcome of a run for node_exporter's textfile collector, which never sees half of it.

    Raises:
        HostShort: when the file cannot be written.
    """
    textfile.write_metrics(path, metrics(scrub))


def metrics(scrub: Scrub) -> str:
    """Return the outcome of a run in Prometheus' text format."""
    return render("zops_cache_scrub_", (_labels(scrub), _metrics(scrub)))


def _labels(scrub: Scrub) -> dict[str, str]:
    return {"model": scrub.manifest.model, "revision": scrub.manifest.revision, "path": str(scrub.path)}


def _metrics(scrub: Scrub) -> list[Metric]:
    ok = "1 when the last scrub found nothing wrong, 0 when it did or none has ended yet."
    ended = "When the last round ended or a bad file was found."
    return [
        Metric("ok", ok, scrub.result == "ok"),
        Metric("bad_files", "Files that were found wrong in this round.", len(scrub.bad)),
        Metric("left_files", "Files that this round has not read yet.", scrub.left_files),
        Metric("scrubbed_timestamp_seconds", ended, scrub.scrubbed_at or 0),
        Metric("run_timestamp_seconds", "When the last run ended.", time.time()),
        Metric("run_duration_seconds", "How long the last run took.", scrub.seconds),
        Metric("run_bytes", "What the last run read.", scrub.read_bytes),
    ]
