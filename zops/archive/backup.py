"""Making an archive of verified snapshots: every byte is read once, and hashed and compressed on the way."""

import hashlib
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

from zops.archive.clone import clone_tar
from zops.archive.closing import close
from zops.archive.format import Compression, Frame, Index
from zops.archive.frames import compress_frame, compress_member
from zops.archive.order import Draft, Order
from zops.archive.pipeline import Done, Pace, Pack, stream, wrong
from zops.archive.plan import Earlier, Source, root_of
from zops.archive.resume import Journal, Leftover
from zops.archive.sinks import FileSink, Sink, open_sink
from zops.archive.store import DirectoryStore, Store, Writer, join
from zops.cache.layout import Snapshot
from zops.cache.lock import hold
from zops.cache.manifest import Manifest, require_verified, sidecar, stat_key
from zops.errors import UsageError
from zops.events import Report, Task, silent, task

_PACKS: dict[Compression, Pack | None] = {"zstd": compress_frame, "gzip": compress_member, "none": None}
_EMPTY = hashlib.sha256(b"").hexdigest()


@dataclass(frozen=True, slots=True)
class BackupResult:
    """An archive that was written. Sizes in bytes; `ratio` is the archive's size by that of what is in it."""

    location: str
    name: str
    size: int
    content_size: int
    seconds: float
    files: int
    digests: tuple[str, ...]
    """Digest of each snapshot's manifest."""
    stored_size: int = 0
    """Bytes of the files whose data is in this archive, not in an earlier one nor behind a link."""
    resumed_size: int = 0
    """Bytes of the archive that an earlier, killed run had written, or sent."""
    cloned: bool = False
    """Whether the archive shares the blocks of the snapshot's files."""
    mismatched: tuple[str, ...] = ()
    """Files that are not what their manifest says, by their names in the archive."""

    @property
    def ratio(self) -> float:
        """Size of the archive by the size of the files in it."""
        return self.size / self.content_size if self.content_size else 1.0


def backup(
    snapshots: Sequence[Path | Snapshot],
    store: Store,
    *,
    compression: Compression = "zstd",
    earlier: Earlier | None = None,
    limit: float | None = None,
    allow_mismatch: bool = False,
    trust_marker: bool = False,
    report: Report = silent,
) -> BackupResult:
    """Write one archive of verified snapshots into a store, or none at all.

    Files that a manifest does not name are left out. Every file is read once; its SHA-256 must be the manifest's. While
    this goes on, other zops may read the snapshots but not change them. What a killed run left of the same archive in
    a directory is gone on with.

    Args:
        snapshots: their directories.
        store: where the archive goes.
        compression: `zstd`, `gzip`, or `none` for a plain tar that shares the files' blocks where the disk can do that.
        earlier: an archive in the same store, whose files are not stored again.
        limit: bytes a second that are read at most; None for no limit.
        allow_mismatch: write what is there, whatever the manifests say, and record what differs.
        trust_marker: where blocks are shared, believe the last verification of files that look untouched since,
            instead of reading them; the archive says so.
        report: is told of progress by bytes read.

    Raises:
        SnapshotMissing: when a snapshot was never verified.
        SnapshotDamaged: when a file changed since, or is read with another SHA-256.
        HostShort, SourceFailed: when the store has no room or fails.
        LockHeld: when another zops changes a snapshot for too long.
    """
    if not snapshots:
        raise UsageError("there is no snapshot to back up", hint="name a model that is in the cache")
    began = time.monotonic()
    paths = [snapshot.path if isinstance(snapshot, Snapshot) else snapshot for snapshot in snapshots]
    with ExitStack() as locks:
        for path in sorted(set(paths)):
            locks.enter_context(_steady(path, report))
        manifests = [_manifest_of(path, allow_mismatch=allow_mismatch) for path in paths]
        if len({root_of(manifest) for manifest in manifests}) != len(paths):
            raise UsageError("the same snapshot is to be backed up twice", hint="name it once")
        order = Order(paths, manifests, store, compression, earlier, limit, allow_mismatch)
        order = order.sharing(report, trust_marker=trust_marker)
        draft, leftover = order.begin()
        text = f"backing up to {join(store, draft.name)}"
        with task(report, "backup", text, total=draft.plan.read_size) as progress:
            written = _Writing(order, draft, leftover, progress, report).run()
    return BackupResult(
        location=join(store, draft.name),
        name=draft.name,
        size=written.size,
        content_size=sum(m.size for m in manifests),
        seconds=time.monotonic() - began,
        files=sum(len(m.files) for m in manifests),
        digests=tuple(m.digest for m in manifests),
        stored_size=draft.plan.read_size,
        resumed_size=written.resumed_size,
        cloned=order.share,
        mismatched=written.mismatched,
    )


def _manifest_of(snapshot: Path, *, allow_mismatch: bool) -> Manifest:
    if not allow_mismatch:
        return require_verified(snapshot)
    from zops.cache.verify import require_manifest  # noqa: PLC0415 - it knows the hubs, which no other backup asks for

    return require_manifest(snapshot)


def _steady(snapshot: Path, report: Report) -> AbstractContextManager[None]:
    """Keep other zops from changing a snapshot; where this one cannot write, what it reads is told by its SHA-256."""
    directory = sidecar(snapshot)
    if not os.access(directory, os.W_OK):
        return nullcontext()
    return hold(directory / "lock", report, shared=True)


@dataclass
class _Writing:
    """An archive while it is written.

    Attributes:
        size: of the archive in bytes, when it is done.
        resumed_size: bytes of it that an earlier run had written or sent.
        found: SHA-256 in hex of the files that are not what their manifest says.
    """

    order: Order
    draft: Draft
    leftover: Leftover | None
    progress: Task
    report: Report
    size: int = 0
    resumed_size: int = 0
    found: dict[Source, str] = field(default_factory=dict)

    def run(self) -> "_Writing":
        """Write it all; an error leaves nothing behind."""
        self._judge_empty()
        with self._journal() as journal, self._open() as writer:
            if self.order.share and clone_tar(self.draft.layout, writer.fileno()):  # type: ignore[attr-defined] # it is a file: a directory is needed to share
                self._hash_sources()
                sink, shared = open_sink(writer, self.draft.layout.end), True
            else:
                sink, shared = open_sink(writer, self.leftover.size if self.leftover else 0), False
            with closing(sink):
                frames = [] if shared else self._stream(sink, journal)
                for data in close(self._index(frames)):
                    sink.write(data)
                sink.finish()
                self.size = sink.position
        # A bucket's writer tells what it did not have to send; it knows when it is done.
        kept: int = getattr(writer, "kept_size", 0)
        self.resumed_size = kept or (self.leftover.size if self.leftover else 0)
        return self

    @property
    def mismatched(self) -> tuple[str, ...]:
        """Names of the files that are not what their manifest says, and of those that are missing."""
        wrong = {item.member.name for item in self.draft.layout.items if item.source in self.found}
        return tuple(sorted({*wrong, *self.draft.plan.missing}))

    def _open(self) -> AbstractContextManager[Writer]:
        store, name = self.order.store, self.draft.name
        if self.leftover and isinstance(store, DirectoryStore):
            return store.open_writer(name, resume=True)
        # What closes an archive takes some hundred bytes a member and thirty a frame.
        closing_size = (1 << 20) + 1024 * len(self.draft.layout.items) + 64 * self.draft.piece_count
        size = self.draft.layout.end + closing_size
        return store.open_writer(name, size=size, plan=None if self.order.allow_mismatch else self._plan)

    @property
    def _plan(self) -> dict[str, str]:
        """What a run must have in common with this one to go on with what it leaves."""
        manifest = self.draft.manifest
        return {"id": manifest.id, "created": manifest.created, "fingerprint": self.draft.fingerprint}

    @contextmanager
    def _journal(self) -> Iterator[Journal | None]:
        directory = self.order.directory
        if directory is None or self.order.share or self.order.allow_mismatch:
            yield None
            return
        journal = Journal(directory, self.draft.name, self._plan, self.leftover)
        try:
            yield journal
        finally:
            # The archive has its name, or is gone.
            journal.remove()

    def _stream(self, sink: Sink, journal: Journal | None) -> list[Frame]:
        """Read, hash, compress and write the pieces that are not there yet; return all frames."""
        pack, draft = _PACKS[self.order.compression], self.draft
        done, size, frames = 0, 0, []
        if self.leftover:
            done, size, frames = self.leftover.pieces, self.leftover.size, list(self.leftover.frames)
            self.progress.advance(sum(piece.count for piece in islice(draft.pieces(), done)))
        if pack is None and isinstance(sink, FileSink):
            sink.reserve(self.draft.layout.end)
        # The hash of a file in whose middle a run was killed needs its beginning again.
        following = next(draft.pieces(done), None)
        cut_file = following.source if following else None
        before = (piece for piece in islice(draft.pieces(), done) if cut_file and piece.source is cut_file)
        with closing(stream(draft.pieces(done), pack, sink, Pace(self.order.limit), before=before)) as running:
            for each in running:
                self._judge(each)
                done, size = done + 1, size + each.frame.compressed
                if pack:
                    frames.append(each.frame)
                self.progress.advance(each.piece.count)
                if journal and journal.due and isinstance(sink, FileSink):
                    sink.make_durable()
                    journal.note(done, size, frames)
        return frames

    def _judge_empty(self) -> None:
        for item in self.draft.layout.items:
            if item.source and not item.member.size:
                self._compare(item.source, _EMPTY)

    def _judge(self, done: Done) -> None:
        if done.sha256 and done.piece.source:
            self._compare(done.piece.source, done.sha256)

    def _compare(self, source: Source, sha256: str) -> None:
        if sha256 == source.sha256:
            return
        if not self.order.allow_mismatch:
            raise wrong(source, "corrupt", f"SHA-256 {sha256[:12]} instead of {source.sha256[:12]}")
        self.found[source] = sha256

    def _hash_sources(self) -> None:
        """Hash the files whose blocks are shared; whoever changed one since it was looked at would be seen."""
        from zops.cache.hashing import digest_files  # noqa: PLC0415 - only archives that share blocks pay for it

        sources = {item.member.name: item.source for item in self.draft.layout.items if item.source}
        if not self.order.trusted:
            text = f"hashing {len(sources)} files"
            hashed = digest_files({name: s.file for name, s in sources.items()}, ("sha256",), self.report, text)
            for name, source in sources.items():
                digests = hashed[name]
                if isinstance(digests, OSError):
                    raise wrong(source, "corrupt", f"cannot be read: {digests.strerror}")
                if not digests.stat == stat_key(source.file) == source.stat:
                    raise wrong(source, "changed", "was written to while it was backed up")
                self._compare(source, digests.hex["sha256"])
        self.progress.advance(self.draft.plan.read_size)

    def _index(self, frames: Sequence[Frame]) -> Index:
        layout = self.draft.layout
        return Index(
            archive=self.draft.manifest.id,
            end=layout.end,
            structure_sha256=layout.structure_sha256,
            entries=tuple(
                replace(entry, sha256=self.found[item.source]) if item.source in self.found else entry
                for item, entry in zip(layout.items, layout.entries, strict=True)
            ),
            frames=tuple(frames),
            compression=self.order.compression,
            elsewhere=self.draft.plan.elsewhere,
            mismatched=self.mismatched,
        )


__all__ = ["BackupResult", "Compression", "Earlier", "backup"]
