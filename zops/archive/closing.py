"""What closes an archive: its index, and what finds the index from the end of the file."""

from collections.abc import Iterator

from zops.archive.format import (
    CHUNK,
    INDEX_MAGIC,
    INDEX_NAME,
    SKIPPABLE_HEADER,
    TRAILER_SIZE,
    Frame,
    Index,
    locator,
    seek_table,
    trailer,
)
from zops.archive.frames import compress_member, crc32
from zops.archive.tar import END, Member, encode_header, padding


def close(index: Index) -> Iterator[bytes]:
    """Yield what follows the last frame or, in a plain tar, the last member."""
    match index.compression:
        case "zstd":
            yield from _close_frames(index)
        case "gzip":
            yield from _close_members(index)
        case "none":
            yield _last_member(index)


def _close_frames(index: Index) -> Iterator[bytes]:
    text = index.as_text()
    text = SKIPPABLE_HEADER.pack(INDEX_MAGIC, len(text) + TRAILER_SIZE) + text
    frame = text + trailer(text)
    yield frame
    yield seek_table([*index.frames, Frame(len(frame), 0)])


def _close_members(index: Index) -> Iterator[bytes]:
    tar = memoryview(_last_member(index))
    members = b"".join(compress_member(tar[start : start + CHUNK]) for start in range(0, len(tar), CHUNK))
    yield members
    yield locator(sum(frame.compressed for frame in index.frames), crc32(members))


def _last_member(index: Index) -> bytes:
    """Return the index as the last member of a tar, and the end of the tar."""
    text = index.as_text()
    # Blanks make the member end with its block, so that its last line is found from the end of the archive.
    text = text[:-1] + b" " * padding(len(text) + TRAILER_SIZE) + b"\n"
    text = encode_header(Member(INDEX_NAME, "file", len(text) + TRAILER_SIZE)) + text
    return text + trailer(text) + END
