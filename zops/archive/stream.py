"""The tar inside an archive as a stream that counts, and that knows its end from being cut off."""

import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from queue import Full, Queue
from typing import BinaryIO

from zops.archive.frames import ZSTD_MAGIC
from zops.archive.tar import BLOCK, Member, padding, read_member
from zops.errors import ArchiveDamaged

Bytes = bytes | memoryview

READ = 1 << 20
GZIP_MAGIC = b"\x1f\x8b"
# zstd refuses more by default too (RFC 8878 recommends 8 MiB, `zstd --ultra` writes up to 128 MiB).
_WINDOW_LIMIT = 128 << 20
# tar pads its last record with zeros: 10 KiB by default, and no blocking factor in use comes near this.
_TAIL_LIMIT = 16 << 20
_AHEAD = 4


class TarStream:
    """Reads members in order from the bytes of a tar, whatever pieces they come in.

    Attributes:
        position: bytes of the tar that were read.
        structure: running SHA-256 of all that was read and is no member's data.
    """

    def __init__(self, pieces: Iterable[Bytes]) -> None:
        self.position = 0
        self.structure = hashlib.sha256()
        self._pieces = iter(pieces)
        self._rest = memoryview(b"")

    def member(self) -> Member | None:
        """Return the next member, None at the first block of the end.

        Raises:
            ArchiveDamaged: when there is no whole, plain header.
        """
        headers: list[bytes] = []

        def read(size: int) -> bytes:
            headers.append(self._exactly(size, "the archive ends where a member should begin: it is cut"))
            return headers[-1]

        member = read_member(read)
        if member:
            self.structure.update(b"".join(headers))
        return member

    def data(self, member: Member) -> Iterator[memoryview]:
        """Yield the data of the member whose header was just read; to be exhausted before the next header.

        Raises:
            ArchiveDamaged: when the tar ends before the data does.
        """
        left = member.size
        while left:
            block = self._some(left)
            if not block:
                raise ArchiveDamaged(f"the archive ends within {member.name!r}: it is cut", member=member.name)
            left -= len(block)
            yield block
        self._pad(member)

    def pass_over(self, member: Member, pieces: Callable[[int], Iterable[Bytes]]) -> None:
        """Go on behind the data of the member whose header was just read, which somebody else reads.

        Args:
            member: what was returned last.
            pieces: returns the bytes of the tar from a place on.

        Raises:
            ArchiveDamaged: when the tar ends before that.
        """
        self.position += member.size
        self._rest, self._pieces = memoryview(b""), iter(pieces(self.position))
        self._pad(member)

    def finish(self) -> None:
        """Read to the end, where only zeros may be left: the second block of the end, and padding.

        Raises:
            ArchiveDamaged: when the end is not whole, or something follows it.
        """
        self._exactly(BLOCK, "the archive has no end: it is cut")
        tail = 0
        while block := self._some(READ):
            tail += len(block)
            if any(block) or tail > _TAIL_LIMIT:
                raise ArchiveDamaged("something follows the end of the archive")

    def _pad(self, member: Member) -> None:
        self.structure.update(
            self._exactly(padding(member.size), f"the archive ends behind {member.name!r}: it is cut")
        )

    def _exactly(self, size: int, failure: str) -> bytes:
        parts = []
        while size:
            block = self._some(size)
            if not block:
                raise ArchiveDamaged(failure)
            parts.append(bytes(block))
            size -= len(block)
        return b"".join(parts)

    def _some(self, limit: int) -> memoryview:
        while not self._rest:
            piece = next(self._pieces, None)
            if piece is None:
                return memoryview(b"")
            self._rest = memoryview(piece)
        block, self._rest = self._rest[:limit], self._rest[limit:]
        self.position += len(block)
        return block


def read_pieces(stream: BinaryIO, limit: int | None = None) -> Iterator[bytes]:
    """Yield the bytes of a file from where it stands to its end, or `limit` of them."""
    left = limit
    while piece := stream.read(READ if left is None else min(READ, left)):
        yield piece
        left = None if left is None else left - len(piece)


def decompressed(stream: BinaryIO) -> Iterator[bytes]:
    """Yield the tar in a file that any program may have written: plain, gzip or zstd, by its first bytes.

    Raises:
        ArchiveDamaged: when what is compressed is cut or damaged.
    """
    stream.seek(0)
    magic = stream.read(4)
    stream.seek(0)
    if magic.startswith(GZIP_MAGIC):
        return _members(stream, _GzipMember, "gzip")
    if magic == ZSTD_MAGIC or (len(magic) == 4 and magic[1:] == b"\x2a\x4d\x18" and magic[0] >> 4 == 5):
        return _members(stream, _ZstdFrame, "zstd")
    return read_pieces(stream)


@contextmanager
def ahead(pieces: Iterator[bytes]) -> Iterator[Iterator[bytes]]:
    """Give the same pieces, made in a thread of their own, a few ahead of who takes them."""
    ready: Queue[bytes | BaseException | None] = Queue(_AHEAD)
    ended = threading.Event()

    def put(item: bytes | BaseException | None) -> None:
        while not ended.is_set():
            with suppress(Full):
                ready.put(item, timeout=0.1)
                return

    def make() -> None:
        try:
            for piece in pieces:
                put(piece)
                if ended.is_set():
                    return
            put(None)
        except BaseException as error:  # noqa: BLE001 - carried to the thread that takes the pieces, which raises it
            put(error)

    def take() -> Iterator[bytes]:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item

    thread = threading.Thread(target=make, name="zops-ahead", daemon=True)
    thread.start()
    try:
        yield take()
    finally:
        ended.set()
        thread.join()


class _GzipMember:
    """One member of a gzip file (RFC 1952), checked by its CRC."""

    def __init__(self) -> None:
        from isal import isal_zlib  # noqa: PLC0415 - only who reads gzip pays for it

        self._codec = isal_zlib.decompressobj(wbits=31)

    def feed(self, data: bytes) -> bytes:
        """Return at most `READ` bytes of content; what was not used is fed again."""
        return self._codec.decompress(self._codec.unconsumed_tail + data, READ)

    @property
    def hungry(self) -> bool:
        return not self._codec.unconsumed_tail

    @property
    def done(self) -> bool:
        return self._codec.eof

    @property
    def rest(self) -> bytes:
        return self._codec.unused_data


class _ZstdFrame:
    """One frame of a zstd file (RFC 8878), skippable or not, checked by its checksum where it has one."""

    hungry = True

    def __init__(self) -> None:
        import zstandard  # noqa: PLC0415 - 20 ms that most commands need not pay

        self._codec = zstandard.ZstdDecompressor(max_window_size=_WINDOW_LIMIT).decompressobj()

    def feed(self, data: bytes) -> bytes:
        content: bytes = self._codec.decompress(data)
        return content

    @property
    def done(self) -> bool:
        return bool(self._codec.eof)

    @property
    def rest(self) -> bytes:
        return bytes(self._codec.unused_data)


def _members(stream: BinaryIO, new: type[_GzipMember] | type[_ZstdFrame], what: str) -> Iterator[bytes]:
    """Decompress the members or frames of a file one after the other; each must be whole."""
    import zstandard  # noqa: PLC0415 - as above
    from isal.igzip_lib import IsalError  # noqa: PLC0415 - as above

    codec: _GzipMember | _ZstdFrame | None = None
    data = b""
    try:
        while True:
            if not data and (codec is None or codec.hungry):
                # Small pieces: zstd expands each at once, and in a bomb every four bytes become 128 KiB.
                data = stream.read(4 << 10)
                if not data:
                    break
            codec = codec or new()
            content, data = codec.feed(data), b""
            if codec.done:
                data, codec = codec.rest, None
            if content:
                yield content
    except (IsalError, EOFError, zstandard.ZstdError) as error:  # type: ignore[misc] # isal's stubs call the class an instance
        raise ArchiveDamaged(f"the {what} data of the archive is damaged ({error})") from None
    if codec is not None:
        raise ArchiveDamaged(f"the {what} data of the archive ends too early: it is cut")
