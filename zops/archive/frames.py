"""Zstandard frames: pieces of the tar, each compressed by itself, so that threads can share the work."""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from zops.archive.format import CHUNK
from zops.errors import ArchiveDamaged

Item = TypeVar("Item")
Result = TypeVar("Result")

ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
# Frame header descriptor (RFC 8878, 3.1.1.1.1), without the two bits for the width of the content size:
# single segment and checksum set, reserved bits and dictionary clear.
_DESCRIPTOR_MASK, _DESCRIPTOR = 0x3F, 0x24
# Weights have no repeats to search for, only skewed exponents: level 1 finds as much as level 19 does.
_LEVEL = 1
# A window as large as a chunk makes every frame a single segment, so that its header has no bit without a meaning.
_WINDOW_LOG = CHUNK.bit_length() - 1

_codecs = threading.local()


def compress_frame(data: bytes) -> bytes:
    """Return one frame of at most `CHUNK` bytes, with its size and a checksum of its content."""
    import zstandard  # noqa: PLC0415 - 20 ms that most commands need not pay

    if not hasattr(_codecs, "compressor"):
        parameters = zstandard.ZstdCompressionParameters.from_level(
            _LEVEL, window_log=_WINDOW_LOG, write_checksum=1, write_content_size=1
        )
        _codecs.compressor = zstandard.ZstdCompressor(compression_params=parameters)
    compressed: bytes = _codecs.compressor.compress(data)
    return compressed


def decompress_frame(data: bytes, size: int) -> bytes:
    """Return the content of one frame, which must be whole, exactly `size` bytes and right by its checksum.

    Raises:
        ArchiveDamaged: when it is anything else.
    """
    import zstandard  # noqa: PLC0415 - as above

    if data[:4] != ZSTD_MAGIC or len(data) < 6 or data[4] & _DESCRIPTOR_MASK != _DESCRIPTOR:
        raise ArchiveDamaged("a frame of the archive is damaged (its header is not one that zops writes)")
    if not hasattr(_codecs, "decompressor"):
        _codecs.decompressor = zstandard.ZstdDecompressor()
    try:
        # Looked at before anything is allocated: a frame may claim any size.
        claimed = zstandard.get_frame_parameters(data[:18]).content_size
        if claimed != size or size > CHUNK:
            raise ArchiveDamaged(f"a frame of the archive claims {claimed} bytes, the index says {size}")
        content: bytes = _codecs.decompressor.decompress(data, read_across_frames=False, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ArchiveDamaged(f"a frame of the archive is damaged ({error})") from None
    if len(content) != size:
        raise ArchiveDamaged(f"a frame of the archive holds {len(content)} bytes, the index says {size}")
    return content


def in_order(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Apply a function in a few threads and yield the results in the order of the items.

    Never more than two items a thread wait, so memory stays bounded however long the work is; when the consumer stops
    or anything raises, what was queued is dropped.
    """
    workers = min(4, os.cpu_count() or 1)
    queued: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="zops-archive")
    try:
        for item in items:
            queued.append(pool.submit(function, item))
            if len(queued) > 2 * workers:
                yield queued.popleft().result()
        while queued:
            yield queued.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
