"""Finding the index of an archive of ours from the end of its file, whatever it was compressed with."""

import io
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from typing import BinaryIO

from zops.archive.format import (
    INDEX_LIMIT,
    INDEX_MAGIC,
    INDEX_NAME,
    LOCATOR_SIZE,
    MANIFEST_NAME,
    SEEK_ENTRY,
    SEEK_FOOTER,
    SEEKABLE_MAGIC,
    SKIPPABLE_HEADER,
    TRAILER_SIZE,
    Frame,
    Index,
    parse_locator,
    parse_seek_table,
    trailer,
    trailer_length,
)
from zops.archive.frames import ZSTD_MAGIC, crc32
from zops.archive.stream import GZIP_MAGIC, TarStream, decompressed
from zops.archive.tar import BLOCK, END, read_member
from zops.errors import ArchiveDamaged


def find_index(stream: BinaryIO) -> Index | None:
    """Return the index of an archive, None for one that another program made.

    Raises:
        ArchiveDamaged: when the archive is ours, but cut or changed.
    """
    size = stream.seek(0, 2)
    stream.seek(0)
    magic = stream.read(4)
    index = None
    if magic == ZSTD_MAGIC:
        index = _find_frame_index(stream, size)
    elif magic.startswith(GZIP_MAGIC):
        index = _find_gzip_index(stream, size)
    if index is None and _begins_as_ours(stream):
        if magic == ZSTD_MAGIC or magic.startswith(GZIP_MAGIC):
            raise ArchiveDamaged(
                "the archive does not end with its index: it is cut or changed",
                hint="if another program compressed it once more, decompress it first (gunzip, zstd -d)",
            )
        index, start = _find_member_index(stream, size)
        if index.frames or index.end != start:
            raise ArchiveDamaged("the archive's index is not where it says")
    return index


def _begins_as_ours(stream: BinaryIO) -> bool:
    """Tell whether the first member is an archive manifest; what cannot be read is left to who reads on."""
    with suppress(ArchiveDamaged):
        first = TarStream(decompressed(stream)).member()
        return first is not None and first.name == MANIFEST_NAME
    return False


def _find_gzip_index(stream: BinaryIO, size: int) -> Index | None:
    """Read the index of a `.tar.gz`; None when it does not end in a locator."""
    located = parse_locator(_at(stream, size - LOCATOR_SIZE, LOCATOR_SIZE)) if size > LOCATOR_SIZE else None
    if located is None:
        return None
    place, checksum = located
    if not 0 < place < size - LOCATOR_SIZE:
        raise ArchiveDamaged("the archive's locator leads out of the archive: it is cut or changed")
    limit = INDEX_LIMIT + BLOCK * 16
    packed = _at(stream, place, min(size - LOCATOR_SIZE - place, limit))
    if crc32(packed) != checksum:
        raise ArchiveDamaged("the archive's index has another CRC-32 than it was written with")
    content = b"".join(_bounded(decompressed(io.BytesIO(packed)), limit))
    index, start = _find_member_index(io.BytesIO(content), len(content))
    if start or index.compression != "gzip" or sum(frame.compressed for frame in index.frames) != place:
        raise ArchiveDamaged("the archive's index is not where it says")
    return index


def _bounded(pieces: Iterator[bytes], limit: int) -> Iterator[bytes]:
    total = 0
    for piece in pieces:
        total += len(piece)
        if total > limit:
            raise ArchiveDamaged("the archive's index is longer than an index may be", code="archive-hostile")
        yield piece


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
    if index.compression != "zstd" or not frames or [replace(frame, crc32=0) for frame in index.frames] != frames:
        raise ArchiveDamaged("index and seek table of the archive contradict each other")
    return index


def _find_member_index(stream: BinaryIO, size: int) -> tuple[Index, int]:
    """Read an index that is the last member of a tar; return also where that member begins."""
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
    return Index.from_text(text[read:]), start


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


def _at(stream: BinaryIO, offset: int, size: int) -> bytes:
    stream.seek(offset)
    data = stream.read(size)
    if len(data) != size:
        raise ArchiveDamaged("the archive became shorter while it was read")
    return data
