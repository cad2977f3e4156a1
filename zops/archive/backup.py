"""Making an archive of verified snapshots: every byte read once, and hashed and compressed on the way."""

import hashlib
import json
import os
import posixpath
import time
import uuid
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path, PurePosixPath
from typing import Literal

from zops import __version__
from zops.archive.format import (
    ALIGNMENT,
    CHUNK,
    INDEX_MAGIC,
    INDEX_NAME,
    MANIFEST_NAME,
    SIDECAR_MANIFEST,
    SKIPPABLE_HEADER,
    TRAILER_SIZE,
    ArchiveManifest,
    Entry,
    Frame,
    Index,
    check_identity,
    check_names,
    seek_table,
    trailer,
)
from zops.archive.frames import compress_frame, in_order
from zops.archive.store import Store, Writer, archive_name, join
from zops.archive.tar import BLOCK, END, LATEST_S, Member, encode_header, padding
from zops.cache.layout import Snapshot, place
from zops.cache.manifest import Finding, Manifest, damaged, require_verified
from zops.errors import UsageError
from zops.events import Report, Task, silent, task

Compression = Literal["zstd", "none"]


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

    @property
    def ratio(self) -> float:
        """Size of the archive by the size of the files in it."""
        return self.size / self.content_size if self.content_size else 1.0


@dataclass(frozen=True, slots=True)
class _Planned:
    """A member and where its data comes from: bytes at hand, or a file that must have this SHA-256."""

    member: Member
    content: bytes = b""
    source: Path | None = None
    path: str = ""
    snapshot: Path | None = None
    sha256: str = ""


def backup(
    snapshots: Sequence[Path | Snapshot],
    store: Store,
    *,
    compression: Compression = "zstd",
    report: Report = silent,
) -> BackupResult:
    """Write one archive of verified snapshots into a store, or none at all.

    Files that a manifest does not name are left out. Every file is read once; its SHA-256 must be the manifest's.

    Args:
        snapshots: their directories.
        store: where the archive goes.
        compression: `zstd`, or `none` for a plain tar whose data is aligned for file systems that share blocks.
        report: is told of progress by bytes read.

    Raises:
        SnapshotMissing: when a snapshot was never verified.
        SnapshotDamaged: when a file changed since, or is read with another SHA-256.
        HostShort, SourceFailed: when the store has no room or fails.
    """
    if not snapshots:
        raise UsageError("there is no snapshot to back up", hint="name a model that is in the cache")
    began = time.monotonic()
    paths = [snapshot.path if isinstance(snapshot, Snapshot) else snapshot for snapshot in snapshots]
    manifests = [require_verified(path) for path in paths]
    created, name = _free_name(manifests, store, compressed=compression == "zstd")
    manifest = ArchiveManifest(
        id=uuid.uuid4().hex,
        created=created.isoformat(),
        zops=__version__,
        snapshots={_root(m): m for m in manifests},
    )
    if len(manifest.snapshots) != len(paths):
        raise UsageError("the same snapshot is to be backed up twice", hint="name it once")
    planned = list(_plan(manifest, paths))
    check_names(item.member for item in planned)
    content_size = sum(m.size for m in manifests)
    write = _write_compressed if compression == "zstd" else _write_plain
    text = f"backing up to {join(store, name)}"
    with task(report, "backup", text, total=content_size) as progress, store.open_writer(name) as writer:
        counting = _Counting(writer)
        write(_Tar(manifest.id, planned, progress), counting)
    return BackupResult(
        location=join(store, name),
        name=name,
        size=counting.size,
        content_size=content_size,
        seconds=time.monotonic() - began,
        files=sum(len(m.files) for m in manifests),
        digests=tuple(m.digest for m in manifests),
    )


def _free_name(manifests: Sequence[Manifest], store: Store, *, compressed: bool) -> tuple[datetime, str]:
    """Return the time and name of a new archive; a second one in the same second is dated one later."""
    created = datetime.now(UTC).replace(microsecond=0)
    while store.exists(name := archive_name(manifests, created, compressed=compressed)):
        created += timedelta(seconds=1)
    return created, name


def _root(manifest: Manifest) -> str:
    check_identity(manifest.model, manifest.revision)
    return place(Path(), manifest.model, manifest.revision).as_posix()


def _plan(manifest: ArchiveManifest, paths: Sequence[Path]) -> Iterator[_Planned]:
    """Yield every member in order: the manifest, then of each snapshot its directories, its sidecar, its files."""
    yield _from_bytes(MANIFEST_NAME, manifest.as_bytes(), manifest)
    for (root, snapshot), path in zip(manifest.snapshots.items(), paths, strict=True):
        directories = {"."} | {str(p) for entry in snapshot.files for p in PurePosixPath(entry.path).parents}
        for directory in sorted(directories):
            stat = (path / directory).stat()
            name = posixpath.normpath(f"{root}/{directory}")
            yield _Planned(Member(name, "directory", 0, stat.st_mode & 0o777, _seconds(stat)))
        text = json.dumps(snapshot.as_json(), indent=1) + "\n"
        yield _from_bytes(f"{root}/{SIDECAR_MANIFEST}", text.encode(), manifest)
        regular = {entry.path: entry for entry in snapshot.files if not (path / entry.path).is_symlink()}
        for entry in sorted(snapshot.files):
            source = path / entry.path
            with _presence(path, entry.path):
                stat = source.stat()
            member = Member(f"{root}/{entry.path}", "file", entry.size, stat.st_mode & 0o777, _seconds(stat))
            link = "" if entry.path in regular else str(source.readlink())
            target = regular.get(posixpath.normpath(posixpath.join(posixpath.dirname(entry.path), link)))
            # A link to another file of the snapshot stays one; content elsewhere (Hugging Face's blobs) becomes a file.
            if link and target and (target.size, target.sha256) == (entry.size, entry.sha256):
                yield _Planned(replace(member, kind="symlink", size=0, mode=0o777, link=link))
            else:
                yield _Planned(member, source=source, path=entry.path, snapshot=path, sha256=entry.sha256)


@contextmanager
def _presence(snapshot: Path, path: str) -> Iterator[None]:
    """Say that the snapshot is damaged when a file of it vanishes under our hands."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise damaged(snapshot, [Finding(path, "missing")]) from None


def _seconds(stat: os.stat_result) -> int:
    """Return a modification time in whole seconds, as far as any tar program reads it: from 1970 to 2286."""
    return min(max(0, int(stat.st_mtime)), LATEST_S)


def _from_bytes(name: str, content: bytes, manifest: ArchiveManifest) -> _Planned:
    mtime = int(datetime.fromisoformat(manifest.created).timestamp())
    return _Planned(
        Member(name, "file", len(content), 0o644, mtime), content, sha256=hashlib.sha256(content).hexdigest()
    )


class _Counting:
    """Passes bytes on and counts them."""

    def __init__(self, writer: Writer) -> None:
        self.size = 0
        self._writer = writer

    def write(self, data: bytes) -> None:
        self._writer.write(data)
        self.size += len(data)


class _Tar:
    """The tar as a sequence of pieces, and what was learned of it while they were made."""

    def __init__(self, archive: str, planned: Sequence[_Planned], progress: Task) -> None:
        self.end = 0
        self._archive = archive
        self._planned = planned
        self._progress = progress
        self._structure = hashlib.sha256()
        self._entries: list[Entry] = []

    def pieces(self, alignment: int = BLOCK) -> Iterator[bytes]:
        """Yield the tar up to the end of its last member, in pieces of at most `CHUNK`, cut where members' data begins.

        Raises:
            SnapshotDamaged: when a file is not what its manifest says.
        """
        pending = bytearray()
        for item in self._planned:
            size = item.member.size
            header = encode_header(item.member, self.end, alignment if size else BLOCK)
            pending += self._count(header)
            self._entries.append(Entry(item.member, self.end if item.member.kind == "file" else 0, item.sha256))
            if size:
                yield from _cut(pending)
                pending.clear()
                for block in self._data(item):
                    if len(block) == CHUNK:
                        yield block
                    else:
                        pending += block
                self.end += size
                pending += self._count(bytes(padding(size)))
        yield from _cut(pending)

    def index(self, frames: Sequence[Frame] = ()) -> bytes:
        """Return the text of the index; to be called after the last piece."""
        return Index(
            self._archive, self.end, self._structure.hexdigest(), tuple(self._entries), tuple(frames)
        ).as_text()

    def _count(self, structure: bytes) -> bytes:
        self._structure.update(structure)
        self.end += len(structure)
        return structure

    def _data(self, item: _Planned) -> Iterator[bytes]:
        if item.source is None:
            for start in range(0, len(item.content), CHUNK):
                yield item.content[start : start + CHUNK]
            return
        assert item.snapshot is not None
        digest = hashlib.sha256()
        left = item.member.size
        with _presence(item.snapshot, item.path), item.source.open("rb", buffering=0) as stream:
            while left and (block := _read_fully(stream.read, min(CHUNK, left))):
                digest.update(block)
                left -= len(block)
                self._progress.advance(len(block))
                yield block
            longer = stream.read(1)
        if left or longer or digest.hexdigest() != item.sha256:
            raise damaged(item.snapshot, [Finding(item.path, "wrong-size" if left or longer else "corrupt")])


def _read_fully(read: Callable[[int], bytes | None], size: int) -> bytes:
    """Read exactly `size` bytes unless the file ends before; a raw file may return fewer at a time (2 GiB at most)."""
    block = read(size) or b""
    while len(block) < size and (more := read(size - len(block))):
        block += more
    return block


def _cut(data: bytearray) -> Iterator[bytes]:
    for start in range(0, len(data), CHUNK):
        yield bytes(data[start : start + CHUNK])


def _write_compressed(tar: _Tar, writer: _Counting) -> None:
    frames: list[Frame] = []

    def compress(piece: bytes) -> tuple[bytes, Frame]:
        compressed = compress_frame(piece)
        return compressed, Frame(len(compressed), len(piece), zlib.crc32(compressed))

    def pieces() -> Iterator[bytes]:
        yield from tar.pieces()
        yield END

    for compressed, frame in in_order(compress, pieces()):
        writer.write(compressed)
        frames.append(frame)
    text = tar.index(frames)
    text = SKIPPABLE_HEADER.pack(INDEX_MAGIC, len(text) + TRAILER_SIZE) + text
    index = text + trailer(text)
    writer.write(index)
    writer.write(seek_table([*frames, Frame(len(index), 0)]))


def _write_plain(tar: _Tar, writer: _Counting) -> None:
    for piece in tar.pieces(ALIGNMENT):
        writer.write(piece)
    text = tar.index()
    # Blanks make the member end with its block, so that its last line is found from the end of the archive.
    text = text[:-1] + b" " * padding(len(text) + TRAILER_SIZE) + b"\n"
    text = encode_header(Member(INDEX_NAME, "file", len(text) + TRAILER_SIZE)) + text
    writer.write(text + trailer(text) + END)


__all__ = ["BackupResult", "Compression", "backup"]
