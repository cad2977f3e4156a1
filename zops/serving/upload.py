"""An image that somebody sent, as the pixels that an edit begins with. Every byte of it is hostile.

What bounds the damage: three formats only, the size is read from the header and judged before a pixel is decoded, the
scans of a JPEG are counted (each costs a pass over the whole image), and whatever the decoder raises is a refusal.
"""

import io
from dataclasses import dataclass, field
from typing import Any

from zops.serving.errors import ApiError
from zops.serving.fields import MAX_EDGE, MULTIPLE

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_SOURCE_PIXELS = 50_000_000
"""A current telephone's 48 megapixels fit; decoded they take 150 MB, one upload at a time."""
MAX_SCANS = 100
"""Encoders write about ten; thousands of them in a small file keep a decoder busy for hours."""
_START_OF_SCAN = b"\xff\xda"


@dataclass(frozen=True, slots=True)
class Source:
    """The size of the image to make and, for an edit, its first pixels: 8-bit RGB of that size."""

    width: int
    height: int
    rgb: bytes | None = field(default=None, repr=False)


def open_source(data: bytes, size: tuple[int, int] | None, max_pixels: int) -> Source:
    """Decode an upload, turn it upright, and make it as large as asked for; slow, for a thread.

    Args:
        data: the file.
        size: width and height to make, cut from the middle where the shape differs; None for the upload's own,
            rounded to multiples of 16 and made smaller where it has more than `max_pixels`.
        max_pixels: the largest image that this server makes.

    Raises:
        ApiError: `invalid_image` when it is none of our formats, too large, or damaged.
    """
    from PIL import Image, ImageOps  # noqa: PLC0415 - spares the start of the server 20 ms before the socket answers

    Image.MAX_IMAGE_PIXELS = None  # it only warns at first; the check below is lower, and refuses
    if data.count(_START_OF_SCAN) > MAX_SCANS and data.startswith(b"\xff\xd8"):
        raise _refusal(f"the JPEG has more than {MAX_SCANS} scans")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
            pixels = opened.width * opened.height
            if pixels > MAX_SOURCE_PIXELS:
                raise _refusal(f"it has {pixels} pixels, the limit is {MAX_SOURCE_PIXELS}")
            opened.load()
            upright = _opaque(ImageOps.exif_transpose(opened))
        width, height = size or fit(upright.width, upright.height, max_pixels)
        picture = ImageOps.fit(upright, (width, height), Image.Resampling.LANCZOS)
        return Source(width, height, picture.tobytes())
    except ApiError:
        raise
    except Exception as error:  # decoders raise all kinds of errors at hostile bytes
        raise _refusal("it is no PNG, JPEG or WebP that can be decoded") from error


def fit(width: int, height: int, max_pixels: int) -> tuple[int, int]:
    """Return the edges nearest to these that are multiples of 16 and within bounds."""
    factor = min(1.0, (max_pixels / (width * height)) ** 0.5, MAX_EDGE / max(width, height))
    edges = [max(MULTIPLE, round(edge * factor / MULTIPLE) * MULTIPLE) for edge in (width, height)]
    while edges[0] * edges[1] > max_pixels:
        edges[edges.index(max(edges))] -= MULTIPLE
    return edges[0], edges[1]


def _refusal(why: str) -> ApiError:
    return ApiError("invalid_image", f"the image cannot be used: {why}", param="image")


def _opaque(image: Any) -> Any:
    """Return the image as RGB: sixteen bits a channel become eight, what is transparent becomes white."""
    from PIL import Image  # noqa: PLC0415 - as above

    if image.mode.startswith("I"):
        image = image.convert("I").point(lambda value: value / 256).convert("L")
    if not image.has_transparency_data:
        return image.convert("RGB")
    layered = image.convert("RGBA")
    ground = Image.new("RGBA", layered.size, "white")
    return Image.alpha_composite(ground, layered).convert("RGB")
