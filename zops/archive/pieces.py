"""The tar of an archive, laid out before any data is read: all sizes are known, so each byte's place is."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from zops.archive.format import CHUNK, Entry
from zops.archive.plan import Planned, Source, sha256_of
from zops.archive.tar import BLOCK, encode_header, padding


@dataclass(frozen=True, slots=True)
class Piece:
    """At most `CHUNK` bytes of the tar: a range of a file or nothing, then bytes at hand (padding, headers) or none."""

    source: Source | None
    start: int
    count: int
    suffix: bytes = b""
    last: bool = False
    """Whether the file ends with it."""

    @property
    def size(self) -> int:
        """Bytes of the tar."""
        return self.count + len(self.suffix)


@dataclass(frozen=True, slots=True)
class Layout:
    """A tar up to the end of its last member.

    Attributes:
        entries: every member, with the SHA-256 that its data must have.
        headers: of each member, in order, with the comment that aligns what follows.
        end: bytes of it all.
        structure_sha256: SHA-256 of headers and padding.
    """

    items: tuple[Planned, ...]
    entries: tuple[Entry, ...]
    headers: tuple[bytes, ...]
    end: int
    structure_sha256: str


def lay_out(items: Sequence[Planned], alignment: int = BLOCK) -> Layout:
    """Give every member its place; data that is not empty starts at a multiple of `alignment`."""
    entries, headers = [], []
    structure = hashlib.sha256()
    end = 0
    for item in items:
        size = item.member.size
        header = encode_header(item.member, end, alignment if size else BLOCK)
        structure.update(header + bytes(padding(size)))
        end += len(header)
        entries.append(Entry(item.member, end if item.member.kind == "file" else 0, sha256_of(item)))
        headers.append(header)
        end += size + padding(size)
    return Layout(tuple(items), tuple(entries), tuple(headers), end, structure.hexdigest())


def cut(layout: Layout, closing: bytes = b"") -> Iterator[Piece]:
    """Cut a tar, and what closes it, into pieces as the format says: at the data of each file, then every `CHUNK`."""
    pending = b""
    tail: Piece | None = None
    for item, header in zip(layout.items, layout.headers, strict=True):
        size = item.member.size
        pending += header
        if not size:
            continue
        yield from _flush(tail, pending)
        tail, pending = None, b""
        if item.source is None:
            pending += item.content
        else:
            whole = size // CHUNK * CHUNK
            for start in range(0, whole, CHUNK):
                yield Piece(item.source, start, CHUNK, last=start + CHUNK == size)
            if size > whole:
                tail = Piece(item.source, whole, size - whole, last=True)
        pending += bytes(padding(size))
    yield from _flush(tail, pending + closing)


def _flush(tail: Piece | None, pending: bytes) -> Iterator[Piece]:
    room = 0
    if tail:
        room = CHUNK - tail.count
        yield Piece(tail.source, tail.start, tail.count, pending[:room], last=True)
    for start in range(room, len(pending), CHUNK):
        yield Piece(None, 0, 0, pending[start : start + CHUNK])
