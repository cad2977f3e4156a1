"""Reading an archive: what it holds, known before any data is read, and then its members in order, each one checked."""

import hashlib
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import chain
from typing import BinaryIO

from zops.archive import foreign
from zops.archive.contents import Contained, check_index, contained
from zops.archive.format import (
    INDEX_MAGIC,
    INDEX_NAME,
    MANIFEST_NAME,
    SEEK_ENTRY,
    SEEK_FOOTER,
    SEEKABLE_MAGIC,
    SKIPPABLE_HEADER,
    TRAILER_SIZE,
    ArchiveManifest,
    Frame,
    Index,
    parse_seek_table,
    trailer,
    trailer_length,
)
from zops.archive.frames import ZSTD_MAGIC, decompress_frame, in_order
from zops.archive.stream import TarStream, decompressed, read_pieces
from zops.archive.tar import END, Member, read_member
from zops.cache.manifest import Manifest
from zops.errors import ArchiveDamaged


class MemberData:
    """The data of a file in an archive: iterate over it once, then ask for its SHA-256."""

    def __init__(self, stream: TarStream, member: Member) -> None:
        self._blocks = stream.data(member)
        self._digest = hashlib.sha256()

    def __iter__(self) -> Iterator[memoryview]:
        for block in self._blocks:
            self._digest.update(block)
            yield block

    @property
    def sha256(self) -> str:
        """SHA-256 in hex of what was iterated over."""
        return self._digest.hexdigest()


class Archive(ABC):
    """An archive that was opened: its names, kinds and sizes are known and were checked, its data was not read yet.

    Attributes:
        members: every member in the order of the tar, names cleaned of `./`.
        manifest: what the archive says of itself; None for one that zops did not make.
    """

    members: tuple[Member, ...]
    manifest: ArchiveManifest | None

    @property
    def size(self) -> int:
        """Bytes of all members' data together."""
        return sum(member.size for member in self.members)

    @abstractmethod
    def snapshots(self, model: str | None = None, manifest: Manifest | None = None) -> tuple[Contained, ...]:
        """Return the snapshots in the archive, or those of one model.

        Args:
            model: only this one; also names the one of an archive that does not tell.
            manifest: what the one of that model must contain, for archives that do not tell.

        Raises:
            ArchiveDamaged: when a snapshot lacks files or has other sizes than its manifest.
            UsageError: when an archive does not tell of which model its snapshot is, or holds none of `model`.
        """

    @abstractmethod
    def read(self) -> Iterator[tuple[Member, MemberData]]:
        """Yield every file with its data, in order; the stream must be what was seen when the archive was opened.

        Raises:
            ArchiveDamaged: at the first byte, header or end that is wrong; for data, after it was yielded.
        """

    @abstractmethod
    def read_file(self, stream: BinaryIO, name: str) -> Iterator[memoryview]:
        """Yield the data of one file; whether it is right is for the caller to find out by its hash.

        Args:
            stream: the same archive, opened once more, so that several files can be read at once.
            name: of the member, one of `members`.

        Raises:
            ArchiveDamaged: when the archive is cut or damaged there.
        """


class OwnArchive(Archive):
    """An archive that zops made: index and manifest vouch for every byte of it."""

    def __init__(self, stream: BinaryIO, index: Index) -> None:
        self._stream = stream
        self._index = index
        check_index(index)
        self.members = tuple(entry.member for entry in index.entries)
        self.manifest = self._read_manifest()
        self._snapshots = contained(index, self.manifest)

    def snapshots(self, model: str | None = None, manifest: Manifest | None = None) -> tuple[Contained, ...]:
        """See `Archive`."""
        found = tuple(s for s in self._snapshots if model in {None, s.model})
        if not found:
            raise foreign.no_snapshot(model, [s.model for s in self._snapshots])
        for snapshot in found:
            if (
                manifest
                and snapshot.manifest
                and snapshot.model == manifest.model
                and snapshot.manifest.digest != manifest.digest
            ):
                raise ArchiveDamaged(
                    f"the archive's {snapshot.model} is not what the given manifest says", code="archive-other-manifest"
                )
        return found

    def read(self) -> Iterator[tuple[Member, MemberData]]:
        """See `Archive`."""
        stream = TarStream(self._pieces())
        for entry in self._index.entries:
            if stream.member() != entry.member:
                raise ArchiveDamaged(f"the header of {entry.member.name!r} is not what the index says")
            if entry.member.kind != "file":
                continue
            if stream.position != entry.offset:
                raise ArchiveDamaged(f"{entry.member.name!r} is not where the index says")
            data = MemberData(stream, entry.member)
            yield entry.member, data
            for _ in data:
                pass
            if data.sha256 != entry.sha256:
                raise ArchiveDamaged(
                    f"{entry.member.name!r} in the archive has another SHA-256 than it was written with",
                    member=entry.member.name,
                )
        if (stream.position, stream.structure.hexdigest()) != (self._index.end, self._index.structure_sha256):
            raise ArchiveDamaged("headers or padding of the archive are not what the index says")
        stream.finish()

    def read_file(self, stream: BinaryIO, name: str) -> Iterator[memoryview]:
        """See `Archive`: the index tells where the file is, and only the frames with it are read."""
        entry = next(entry for entry in self._index.entries if entry.member.name == name)
        first, end = entry.offset, entry.offset + entry.member.size
        position = packed = 0
        wanted = []
        for frame in self._index.frames:
            if position < end and position + frame.size > first:
                wanted.append(frame)
            elif not wanted:
                packed, first, end = packed + frame.compressed, first - frame.size, end - frame.size
                continue
            position += frame.size
        stream.seek(packed if self._index.frames else first)
        if self._index.frames:
            frames = ((stream.read(frame.compressed), frame) for frame in wanted)
            pieces = in_order(lambda pair: _content(*pair), frames)
        else:
            pieces, first = read_pieces(stream, entry.member.size), 0
        left = entry.member.size
        for piece in pieces:
            block = memoryview(piece)[first : first + left]
            first, left = 0, left - len(block)
            yield block
        if left:
            raise ArchiveDamaged(f"the archive ends within {name!r}: it is cut", member=name)

    def _pieces(self) -> Iterator[bytes]:
        self._stream.seek(0)
        if self._index.frames:
            frames = ((self._stream.read(frame.compressed), frame) for frame in self._index.frames)
            return in_order(lambda pair: _content(*pair), frames)
        # The index follows the last member, and its own end was checked when it was found.
        return chain(read_pieces(self._stream, self._index.end), [END])

    def _read_manifest(self) -> ArchiveManifest:
        entry = self._index.entries[0]
        stream = TarStream(self._pieces())
        if stream.member() != entry.member:
            raise ArchiveDamaged("the archive does not begin with its manifest")
        data = b"".join(stream.data(entry.member))
        if hashlib.sha256(data).hexdigest() != entry.sha256:
            raise ArchiveDamaged("the archive's manifest has another SHA-256 than the index says")
        return ArchiveManifest.from_bytes(data)


class ForeignArchive(Archive):
    """An archive of another program: all that is known was learned by reading it once."""

    def __init__(self, stream: BinaryIO, room: int) -> None:
        self._stream = stream
        self.manifest = None
        self._scanned = foreign.scan(TarStream(decompressed(stream)), room)
        self.members = self._scanned.members

    def snapshots(self, model: str | None = None, manifest: Manifest | None = None) -> tuple[Contained, ...]:
        """See `Archive`."""
        return foreign.contained(self._scanned, model, manifest)

    def read(self) -> Iterator[tuple[Member, MemberData]]:
        """See `Archive`."""
        stream = TarStream(decompressed(self._stream))
        for expected in self.members:
            member = stream.member()
            if member is None or foreign.cleaned(member) != expected:
                raise ArchiveDamaged(f"the archive changed while it was read, at {expected.name!r}")
            if member.kind == "file":
                data = MemberData(stream, member)
                yield expected, data
                for _ in data:
                    pass
        stream.finish()

    def read_file(self, stream: BinaryIO, name: str) -> Iterator[memoryview]:
        """See `Archive`: nothing tells where the file is, so all that lies before it is read."""
        tar = TarStream(decompressed(stream))
        while member := tar.member():
            if foreign.cleaned(member).name == name and member.kind == "file":
                yield from tar.data(member)
                return
            for _ in tar.data(member):
                pass
        raise ArchiveDamaged(f"the archive changed while it was read: {name!r} is gone", member=name)


def open_stream(stream: BinaryIO, *, room: int = 1 << 62) -> Archive:
    """Open an archive in a seekable file.

    Args:
        stream: the file; it stays the caller's to close.
        room: bytes of data above which an archive that does not tell its size beforehand is not read on.

    Raises:
        ArchiveDamaged: when it is cut, damaged, hostile or no archive.
        HostShort: when it holds more than `room`.
    """
    size = stream.seek(0, 2)
    stream.seek(0)
    magic = stream.read(4)
    index = _find_frame_index(stream, size) if magic == ZSTD_MAGIC else None
    if index is None and _begins_as_ours(stream):
        if magic == ZSTD_MAGIC:
            raise ArchiveDamaged("the archive has no seek table at its end: it is cut or changed")
        index = _find_member_index(stream, size)
    return OwnArchive(stream, index) if index else ForeignArchive(stream, room)


def _begins_as_ours(stream: BinaryIO) -> bool:
    """Tell whether the first member is an archive manifest; what cannot be read is left to who reads on."""
    stream.seek(0)
    if stream.read(2) == b"\x1f\x8b":
        return False  # compressed again by somebody: the index no longer says where anything is
    with suppress(ArchiveDamaged):
        first = TarStream(decompressed(stream)).member()
        return first is not None and first.name == MANIFEST_NAME
    return False


def _find_frame_index(stream: BinaryIO, size: int) -> Index | None:
    """Read the index of a `.tar.zst`; None when it does not end in a seek table."""
    if size < SEEK_FOOTER.size:
        return None
    count, _, magic = SEEK_FOOTER.unpack(_at(stream, size - SEEK_FOOTER.size, SEEK_FOOTER.size))
    if magic != SEEKABLE_MAGIC:
        return None
    start = size - SKIPPABLE_HEADER.size - count * SEEK_ENTRY.size - SEEK_FOOTER.size
    if start < 0:
        raise ArchiveDamaged("the archive's seek table is longer than the archive: it is cut or changed")
    table = parse_seek_table(_at(stream, start, size - start))
    frames, last = table[:-1], table[-1] if table else Frame(0, 1)
    if last.size or sum(frame.compressed for frame in table) != start:
        raise ArchiveDamaged("the archive's seek table does not add up to the archive: it is cut or changed")
    text = _index_text(stream, start, SKIPPABLE_HEADER.size)
    length = last.compressed - SKIPPABLE_HEADER.size
    header = SKIPPABLE_HEADER.pack(INDEX_MAGIC, length)
    if len(text) + TRAILER_SIZE != last.compressed or text[: len(header)] != header:
        raise ArchiveDamaged("the archive's index is not in the frame that the seek table names")
    index = Index.from_text(text[SKIPPABLE_HEADER.size :])
    if not frames or [replace(frame, crc32=0) for frame in index.frames] != frames:
        raise ArchiveDamaged("index and seek table of the archive contradict each other")
    return index


def _find_member_index(stream: BinaryIO, size: int) -> Index:
    """Read the index of an uncompressed archive: its last member."""
    if size < len(END) + TRAILER_SIZE or _at(stream, size - len(END), len(END)) != END:
        raise ArchiveDamaged("the archive does not end as a tar does: it is cut or changed")
    text = _index_text(stream, size - len(END), 0)
    read = 0

    def header(count: int) -> bytes:
        nonlocal read
        read += count
        if read > len(text):
            raise ArchiveDamaged("the archive's index is no member")
        return text[read - count : read]

    member = read_member(header)
    start = size - len(END) - TRAILER_SIZE - len(text)
    if member is None or member.name != INDEX_NAME or member.size != len(text) - read + TRAILER_SIZE:
        raise ArchiveDamaged("the archive's index is not the member that it should be")
    index = Index.from_text(text[read:])
    if index.frames or index.end != start:
        raise ArchiveDamaged("the archive's index is not where it says")
    return index


def _index_text(stream: BinaryIO, end: int, least: int) -> bytes:
    """Return what the trailer that ends at `end` covers, checked by its SHA-256."""
    if end < TRAILER_SIZE:
        raise ArchiveDamaged("the archive is too short for its index: it is cut")
    line = _at(stream, end - TRAILER_SIZE, TRAILER_SIZE)
    length = trailer_length(line)
    if not least < length <= end - TRAILER_SIZE:
        raise ArchiveDamaged("the archive's index is longer than the archive: it is cut or changed")
    text = _at(stream, end - TRAILER_SIZE - length, length)
    if trailer(text) != line:
        raise ArchiveDamaged("the archive's index does not match its SHA-256")
    return text


def _content(data: bytes, frame: Frame) -> bytes:
    if zlib.crc32(data) != frame.crc32:
        raise ArchiveDamaged("a frame of the archive has another CRC-32 than it was written with")
    return decompress_frame(data, frame.size)


def _at(stream: BinaryIO, offset: int, size: int) -> bytes:
    stream.seek(offset)
    data = stream.read(size)
    if len(data) != size:
        raise ArchiveDamaged("the archive became shorter while it was read")
    return data
