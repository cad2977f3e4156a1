"""Reading an archive: what it holds, known before any data is read, and then its files, each one checked."""

import hashlib
import io
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import BinaryIO

from zops.archive import foreign
from zops.archive.access import ReadRange, StreamAccess, access_to
from zops.archive.contents import Contained, check_index, contained
from zops.archive.format import CHUNK, ArchiveManifest, Entry, Index
from zops.archive.locate import find_index
from zops.archive.stream import TarStream, ahead, decompressed
from zops.archive.tape import Tape
from zops.archive.tar import Member
from zops.archive.unpack import OnDamage, OpenTarget, unpack
from zops.cache.manifest import Manifest
from zops.cache.reading import new_buffer
from zops.errors import ArchiveDamaged

_MANIFEST_LIMIT = 64 << 20


class Archive(ABC):
    """An archive that was opened: its names, kinds and sizes are known and were checked, its data was not read yet.

    Attributes:
        members: every member in the order of the tar, names cleaned of `./`.
        manifest: what the archive says of itself; None for one that zops did not make.
    """

    members: tuple[Member, ...]
    manifest: ArchiveManifest | None
    _stream: BinaryIO

    @property
    def stored_size(self) -> int:
        """Bytes of the archive itself."""
        return self._stream.seek(0, 2)

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
            SnapshotMissing: when an archive does not tell of which model its snapshot is, or holds none of `model`.
        """

    @abstractmethod
    def unpack(
        self,
        names: Collection[str],
        open_target: OpenTarget,
        advance: Callable[[int], None],
        *,
        whole: bool = True,
        on_damage: OnDamage | None = None,
    ) -> None:
        """Read files and hand their data on; the archive must still be what it was when it was opened.

        Args:
            names: of the members to read.
            open_target: returns what takes a file's data; called once for each, perhaps from several threads.
            advance: is told of the bytes that were read.
            whole: check everything that is not data too, which needs more of the archive than the files.
            on_damage: is told of each damaged file, and the others are read all the same, as far as that is possible;
                without it the first one ends everything.

        Raises:
            ArchiveDamaged: when anything that was read is wrong.
            OSError: when a target cannot be written.
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

    manifest: ArchiveManifest

    def __init__(self, stream: BinaryIO, index: Index, read_range: ReadRange | None = None) -> None:
        check_index(index)
        self.index = index
        self.members = tuple(entry.member for entry in index.entries)
        self.entries = {entry.member.name: entry for entry in index.entries}
        self.by_content = {(e.sha256, e.member.size): e.member.name for e in index.entries if e.member.kind == "file"}
        self._stream, self._read_range = stream, read_range
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

    def unpack(
        self,
        names: Collection[str],
        open_target: OpenTarget,
        advance: Callable[[int], None],
        *,
        whole: bool = True,
        on_damage: OnDamage | None = None,
    ) -> None:
        """See `Archive`: with all cores."""
        wanted = [self.entries[name] for name in names]
        with self.tape() as tape:
            unpack(tape, wanted, open_target, advance, index=self.index if whole else None, on_damage=on_damage)

    @property
    def descriptor(self) -> int | None:
        """The descriptor of the archive's file where its members lie in it as they are, for other files to share."""
        raw = getattr(self._stream, "raw", None)
        return raw.fileno() if isinstance(raw, io.FileIO) and not self.index.frames else None

    @contextmanager
    def tape(self) -> Iterator[Tape]:
        """Give the archive's tar, by the fastest way that there is."""
        with access_to(self._stream, self._read_range) as access:
            yield Tape(access, self.index)

    def read_file(self, stream: BinaryIO, name: str) -> Iterator[memoryview]:
        """See `Archive`: the index tells where the file is, and only what holds it is read."""
        entry = self.entries[name]
        tape = Tape(StreamAccess(stream), self.index)
        buffer = new_buffer(CHUNK)
        end = entry.offset + entry.member.size
        for start in range(entry.offset, end, CHUNK):
            yield tape.read(buffer, range(start, min(start + CHUNK, end)))

    def _read_manifest(self) -> ArchiveManifest:
        entry = self.index.entries[0]
        if entry.member.size > _MANIFEST_LIMIT:
            raise ArchiveDamaged("the archive's manifest is longer than one may be", code="archive-hostile")
        stream = TarStream(Tape(StreamAccess(self._stream), self.index).pieces(0))
        if stream.member() != entry.member:
            raise ArchiveDamaged("the archive does not begin with its manifest")
        data = b"".join(bytes(block) for block in stream.data(entry.member))
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

    def unpack(
        self,
        names: Collection[str],
        open_target: OpenTarget,
        advance: Callable[[int], None],
        *,
        whole: bool = True,
        on_damage: OnDamage | None = None,
    ) -> None:
        """See `Archive`: in order, and always to the end, for nothing tells where anything is."""
        del whole, on_damage
        with ahead(decompressed(self._stream)) as pieces:
            stream = TarStream(pieces)
            for expected in self.members:
                member = stream.member()
                if member is None or foreign.cleaned(member) != expected:
                    raise ArchiveDamaged(f"the archive changed while it was read, at {expected.name!r}")
                if member.kind == "file":
                    self._hand_on(
                        stream, member, Entry(expected, 0), open_target if expected.name in names else None, advance
                    )
            stream.finish()

    @staticmethod
    def _hand_on(
        stream: TarStream,
        member: Member,
        entry: Entry,
        open_target: OpenTarget | None,
        advance: Callable[[int], None],
    ) -> None:
        target = open_target(entry) if open_target else None
        digest = hashlib.sha256()
        try:
            for block in stream.data(member):
                if target:
                    digest.update(block)
                    target.write(block)
                    advance(len(block))
            if target:
                target.done(digest.hexdigest())
        finally:
            if target:
                target.close()

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


def open_stream(stream: BinaryIO, *, room: int = 1 << 62, read_range: ReadRange | None = None) -> Archive:
    """Open an archive in a seekable file.

    Args:
        stream: the file; it stays the caller's to close.
        room: bytes of data above which an archive that does not tell its size beforehand is not read on.
        read_range: the same archive by ranges, where several at once can be had.

    Raises:
        ArchiveDamaged: when it is cut, damaged, hostile or no archive.
        HostShort: when it holds more than `room`.
    """
    index = find_index(stream)
    return OwnArchive(stream, index, read_range) if index else ForeignArchive(stream, room)
