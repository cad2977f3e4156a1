"""A look at a PNG image without an imaging library: is it whole, and does it show anything?

The host side has no pillow. What a canary must tell apart is a picture from a black or flat one, which is what a model
gives that overflowed or lost its weights; for that the image is decoded as the format asks (ISO/IEC 15948).
"""

import struct
import zlib
from dataclasses import dataclass, field
from itertools import pairwise
from math import sqrt

from zops.errors import ZopsError

SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Colour type -> (channels, colours among them); palettes (3) are nothing that a pipeline sends.
CHANNELS = {0: (1, 1), 2: (3, 3), 4: (2, 1), 6: (4, 3)}
MAX_PIXELS = 2048 * 2048
# A picture's brightness varies by tens of its 255 levels, random noise by more; a flat field by less than one.
FLAT_DEVIATION = 1.0
BLACK_MEAN = 2.0
# Small enough to forgive other kernels and libraries their last bits, large enough to show what is where.
THUMBNAIL_EDGE = 16


@dataclass(frozen=True, slots=True)
class Look:
    """What an image looks like: its size in pixels, the mean of its samples (0 to 255) and their standard deviation.

    The deviation is that of the colour that varies most.
    """

    width: int
    height: int
    mean: float
    deviation: float
    thumbnail: bytes = field(default=b"", repr=False)
    """The image made `THUMBNAIL_EDGE` pixels wide and high, by averaging; one byte a colour and pixel."""

    @property
    def fault(self) -> str:
        """Why it shows nothing: black or flat; empty when it shows something."""
        if self.deviation >= FLAT_DEVIATION:
            return ""
        return "black" if self.mean < BLACK_MEAN else "flat"


def look_at(data: bytes) -> Look:
    """Decode a PNG and measure it.

    Raises:
        ZopsError: when it is no PNG, cut, damaged, or of a kind that a pipeline does not send.
    """
    header, packed = _chunks(data)
    width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", header)
    if depth != 8 or colour not in CHANNELS or interlaced or not 0 < width * height <= MAX_PIXELS:
        raise _bad(f"{width} x {height}, {depth} bits, colour type {colour} is not what a pipeline sends")
    channels, colours = CHANNELS[colour]
    stride = width * channels
    wanted = height * (stride + 1)
    try:
        # One byte more than there may be: enough to see that there is too much, not enough to fill the memory.
        raw = zlib.decompressobj().decompress(packed, wanted + 1)
    except zlib.error as error:
        raise _bad(f"its pixels cannot be unpacked: {error}") from None
    if len(raw) != wanted:
        raise _bad(f"{len(raw)} bytes of pixels instead of {wanted}")
    samples = _unfilter(raw, stride, channels)
    # Each colour by itself, so that a plain red field counts as flat; opacity says nothing.
    measured = [_measure(samples[index::channels]) for index in range(colours)]
    mean, spread = sum(mean for mean, _ in measured) / colours, max(spread for _, spread in measured)
    return Look(width, height, mean, spread, _shrink(samples, width, height, channels, colours))


def _shrink(samples: bytes, width: int, height: int, channels: int, colours: int) -> bytes:
    """Average the image over a grid of cells."""
    columns, rows = _cuts(width), _cuts(height)
    small = bytearray()
    for top, bottom in rows:
        for left, right in columns:
            for colour in range(colours):
                total = 0
                for y in range(top, bottom):
                    start = y * width * channels
                    total += sum(samples[start + left * channels + colour : start + right * channels : channels])
                small.append(round(total / ((bottom - top) * (right - left))))
    return bytes(small)


def _cuts(length: int) -> list[tuple[int, int]]:
    """Cut a length into `THUMBNAIL_EDGE` parts of at least one pixel each."""
    starts = [part * length // THUMBNAIL_EDGE for part in range(THUMBNAIL_EDGE + 1)]
    return [(start, max(end, start + 1)) for start, end in pairwise(starts)]


def _measure(samples: bytes) -> tuple[float, float]:
    """Return mean and standard deviation."""
    count = len(samples)
    mean = sum(samples) / count
    return mean, sqrt(max(sum(value * value for value in samples) / count - mean * mean, 0.0))


def _chunks(data: bytes) -> tuple[bytes, bytes]:
    """Return the header and the packed pixels; every chunk's checksum must hold and the end must be there."""
    if not data.startswith(SIGNATURE):
        raise _bad("it is no PNG")
    place, header, packed = len(SIGNATURE), b"", []
    while place + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, place)
        body = data[place + 8 : place + 8 + length]
        checksum = data[place + 8 + length : place + 12 + length]
        if len(checksum) < 4 or zlib.crc32(kind + body) != int.from_bytes(checksum):
            raise _bad("a chunk is cut or damaged")
        place += 12 + length
        if kind == b"IHDR" and length == 13:
            header = body
        elif kind == b"IDAT":
            packed.append(body)
        elif kind == b"IEND":
            if not header:
                raise _bad("it has no header")
            return header, b"".join(packed)
    raise _bad("it ends too early")


def _unfilter(raw: bytes, stride: int, channels: int) -> bytes:
    """Undo the filter of each line (none, sub, up, average, Paeth)."""
    out = bytearray()
    above = bytearray(stride)
    for start in range(0, len(raw), stride + 1):
        kind, line = raw[start], bytearray(raw[start + 1 : start + 1 + stride])
        if kind == 1:
            for i in range(channels, stride):
                line[i] = (line[i] + line[i - channels]) & 255
        elif kind == 2:
            line = bytearray((a + b) & 255 for a, b in zip(line, above, strict=True))
        elif kind == 3:
            for i in range(stride):
                left = line[i - channels] if i >= channels else 0
                line[i] = (line[i] + (left + above[i]) // 2) & 255
        elif kind == 4:
            for i in range(stride):
                left, corner = (line[i - channels], above[i - channels]) if i >= channels else (0, 0)
                line[i] = (line[i] + _paeth(left, above[i], corner)) & 255
        elif kind:
            raise _bad(f"a line has filter {kind}, there is no such")
        out += line
        above = line
    return bytes(out)


def _paeth(left: int, above: int, corner: int) -> int:
    guess = left + above - corner
    to_left, to_above, to_corner = abs(guess - left), abs(guess - above), abs(guess - corner)
    if to_left <= to_above and to_left <= to_corner:
        return left
    return above if to_above <= to_corner else corner


def _bad(text: str) -> ZopsError:
    return ZopsError(f"the image is damaged: {text}", code="image-damaged")
