"""Pieces of the tar, each compressed by itself to a zstd frame or a gzip member, so that threads share the work."""

import sys
import threading
import zlib
from collections.abc import Mapping
from typing import Literal

from zops.archive.format import CHUNK

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
# Weights have no repeats to search for, only skewed exponents: level 1 finds as much as level 19 does, and Huffman
# coding by itself nearly as much, at three times its speed where the low bits are zeros.
_Method = Literal["raw", "huffman", "level 1"]
# Parameters by their numbers in zstd.h: level, window, checksum, and 1002, which Python names nowhere: literals are
# always (1) or never (2) compressed. The level is so low that repeats are not searched for. A window as large as a
# chunk makes every frame a single segment, so that its header has no bit without a meaning.
_COMMON = {101: CHUNK.bit_length() - 1, 200: 1, 201: 1}
_OPTIONS: Mapping[_Method, Mapping[int, int]] = {
    "raw": {**_COMMON, 100: -100_000, 1002: 2},
    "huffman": {**_COMMON, 100: -100_000, 1002: 1},
    "level 1": {**_COMMON, 100: 1},
}
_GZIP_LEVEL = 1
_GZIP = 31  # zlib's number for a gzip member with the largest window
_SAMPLE, _SAMPLE_PART = 64 << 10, 4 << 10
# A chunk is worth compressing when 5 % go away, and worth a search for repeats when that saves another tenth.
_WORTHWHILE, _MUCH_BETTER = 0.95, 0.9

_codecs = threading.local()


def compress_frame(data: bytes | memoryview) -> bytes:
    """Return one frame of at most `CHUNK` bytes, with its size and a checksum of its content.

    Raw blocks, Huffman coding alone, or level 1: whatever a sample says is the smallest for its time.
    """
    return _zstd(_choose(data), data)


def compress_member(data: bytes | memoryview) -> bytes:
    """Return one gzip member with at most `CHUNK` bytes: deflated, or as they are where that saves little."""
    from isal import isal_zlib  # noqa: PLC0415 - only for those who write gzip

    sample = _sample(data)
    if len(isal_zlib.compress(sample, _GZIP_LEVEL, _GZIP)) > _WORTHWHILE * len(sample):
        stored = zlib.compressobj(0, wbits=_GZIP)
        return stored.compress(data) + stored.flush()
    compressed: bytes = isal_zlib.compress(data, _GZIP_LEVEL, _GZIP)
    return compressed


def crc32(data: bytes | memoryview) -> int:
    """Return the CRC-32 of bytes, ten times faster than zlib does."""
    from isal import isal_zlib  # noqa: PLC0415 - as above

    checksum: int = isal_zlib.crc32(data)
    return checksum


def _choose(data: bytes | memoryview) -> _Method:
    sample = _sample(data)
    huffman, level = (len(_zstd(method, sample)) for method in ("huffman", "level 1"))
    if min(huffman, level) > _WORTHWHILE * len(sample):
        return "raw"
    return "level 1" if level < _MUCH_BETTER * huffman else "huffman"


def _sample(data: bytes | memoryview) -> bytes:
    """Return bytes from all over: what begins with a header may be weights further on."""
    if len(data) <= _SAMPLE:
        return bytes(data)
    view = memoryview(data)
    step = (len(data) - _SAMPLE_PART) // (_SAMPLE // _SAMPLE_PART - 1)
    return b"".join(view[n * step : n * step + _SAMPLE_PART] for n in range(_SAMPLE // _SAMPLE_PART))


def _zstd(method: _Method, data: bytes | memoryview) -> bytes:
    """Compress by a compressor of this thread's own; none of the calls holds the interpreter's lock."""
    found = getattr(_codecs, "compressors", None)
    if found is None:
        found = _codecs.compressors = {}
    if method not in found:
        found[method] = zstd.ZstdCompressor(options=_OPTIONS[method])
    compressor = found[method]
    compressor.set_pledged_input_size(len(data))
    compressed: bytes = compressor.compress(data, zstd.ZstdCompressor.FLUSH_FRAME)
    return compressed
