"""Writes PNG fast: one filter, chosen for photographs, and igzip's deflate.

Measured on one core with photo-like content of 1024x1024 (fractal noise, edges, sensor noise of one level):

| writer | ms | kB |
|---|---:|---:|
| Pillow, level 1 | 73 | 1764 |
| Pillow, level 1, run lengths only | 61 | 1559 |
| Pillow, level 6 (zlib's default) | 316 | 1568 |
| this: average filter, igzip level 3 | 11 | 1578 |
| the same with the filter sub, up, Paeth | 10, 9, 45 | 1686, 1651, 1676 |
"""

import struct
import zlib
from typing import Any

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_EIGHT_BITS, _RGB, _AVERAGE = 8, 2, 3
_IGZIP_LEVEL = 3


def write_png(width: int, height: int, rgb: bytes, *, text: dict[str, str], xmp: str = "") -> bytes:
    """Return a PNG of 8-bit RGB rows, with pairs of ASCII text and, where given, an XMP packet."""
    chunks = [_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, _EIGHT_BITS, _RGB, 0, 0, 0))]
    chunks += [_chunk(b"tEXt", key.encode("ascii") + b"\0" + value.encode("ascii")) for key, value in text.items()]
    if xmp:
        # Not compressed, without language: so XMP's specification, part 3, wants it.
        chunks.append(_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp.encode()))
    chunks += [_chunk(b"IDAT", _deflate(_filter(width, height, rgb))), _chunk(b"IEND", b"")]
    return _SIGNATURE + b"".join(chunks)


def _filter(width: int, height: int, rgb: bytes) -> Any:
    """Replace each byte by its distance from the mean of its neighbours left and above, as the standard rules."""
    import numpy as np  # noqa: PLC0415 - spares the start of the server 80 ms before the socket answers

    rows = np.frombuffer(rgb, np.uint8).reshape(height, width * 3)
    above, left = np.zeros_like(rows), np.zeros_like(rows)
    above[1:], left[:, 3:] = rows[:-1], rows[:, :-3]
    filtered = np.empty((height, width * 3 + 1), np.uint8)
    filtered[:, 0] = _AVERAGE
    # The half of a sum, rounded down, that needs no ninth bit.
    filtered[:, 1:] = rows - ((above & left) + ((above ^ left) >> 1))
    return filtered


def _deflate(data: Any) -> bytes:
    from isal import isal_zlib  # noqa: PLC0415 - as above

    return isal_zlib.compress(data, _IGZIP_LEVEL)


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(body, zlib.crc32(kind)))
