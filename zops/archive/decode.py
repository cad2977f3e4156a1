"""One frame of an archive back into the piece of the tar that it was: right by every checksum, or refused."""

import threading
from typing import Any

from zops.archive.format import CHUNK, Compression, Frame
from zops.archive.frames import ZSTD_MAGIC, crc32
from zops.errors import ArchiveDamaged

# Frame header descriptor (RFC 8878, 3.1.1.1.1), without the two bits for the width of the content size:
# single segment and checksum set, reserved bits and dictionary clear.
_DESCRIPTOR_MASK, _DESCRIPTOR = 0x3F, 0x24
_WHAT_NEXT = 18  # longest header of a zstd frame, in bytes

_codecs = threading.local()


def decode(packed: memoryview, frame: Frame, compression: Compression, buffer: memoryview) -> memoryview:
    """Write the content of a frame to the beginning of a buffer and return it.

    Args:
        packed: the frame, whole and alone.
        frame: what the index says of it.
        compression: what kind of frame it is.
        buffer: at least `frame.size` bytes.

    Raises:
        ArchiveDamaged: when it is not exactly what the index says, or wrong by one of its checksums.
    """
    if crc32(packed) != frame.crc32:
        raise ArchiveDamaged("a frame of the archive has another CRC-32 than it was written with")
    if not 0 < frame.size <= min(CHUNK, len(buffer)):
        raise ArchiveDamaged(f"a frame of the archive claims {frame.size} bytes, more than a frame may hold")
    expand = _expand_gzip if compression == "gzip" else _expand_zstd
    count = expand(packed, buffer[: frame.size])
    if count != frame.size:
        raise ArchiveDamaged(f"a frame of the archive holds {count} bytes, the index says {frame.size}")
    return buffer[: frame.size]


def _expand_zstd(packed: memoryview, buffer: memoryview) -> int:
    """Fill the buffer and return how many bytes there were, one more than its size for more than that."""
    import zstandard  # noqa: PLC0415 - only who reads a compressed archive pays for it

    if bytes(packed[:4]) != ZSTD_MAGIC or len(packed) < 6 or packed[4] & _DESCRIPTOR_MASK != _DESCRIPTOR:
        raise ArchiveDamaged("a frame of the archive is damaged (its header is not one that zops writes)")
    if not hasattr(_codecs, "zstd"):
        _codecs.zstd = zstandard.ZstdDecompressor()
    decompressor: Any = _codecs.zstd
    try:
        # Looked at before anything is allocated: a frame may claim any size.
        claimed = zstandard.get_frame_parameters(bytes(packed[:_WHAT_NEXT])).content_size
        if claimed != len(buffer):
            raise ArchiveDamaged(f"a frame of the archive claims {claimed} bytes, the index says {len(buffer)}")
        reader = decompressor.stream_reader(packed, read_across_frames=True)
        # Into memory that has room for all of it, zstd writes directly. What else is in there shows by one byte more.
        count: int = reader.readinto(buffer)
        return count + int(reader.readinto(bytearray(1)))
    except zstandard.ZstdError as error:
        raise ArchiveDamaged(f"a frame of the archive is damaged ({error})") from None


def _expand_gzip(packed: memoryview, buffer: memoryview) -> int:
    """Do the same for a member of a gzip file."""
    from isal import isal_zlib  # noqa: PLC0415 - as above
    from isal.igzip_lib import IsalError  # noqa: PLC0415 - as above

    try:
        codec = isal_zlib.decompressobj(wbits=31)
        content = codec.decompress(packed, len(buffer) + 1)
    except IsalError as error:  # type: ignore[misc] # isal's stubs call the class an instance
        raise ArchiveDamaged(f"a frame of the archive is damaged ({error})") from None
    if not codec.eof or codec.unused_data:
        raise ArchiveDamaged("a frame of the archive is not one whole member of a gzip file")
    buffer[: len(content)] = content[: len(buffer)]
    return len(content)
