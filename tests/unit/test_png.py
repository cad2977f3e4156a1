"""The look at a PNG: every filter and colour type decoded right, everything damaged refused."""

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from tests.support.instance import SIGNATURE_OF_PNG, chunk, picture, png
from zops.errors import ZopsError
from zops.health.png import look_at


@given(
    width=st.integers(1, 9),
    height=st.integers(1, 9),
    colour=st.sampled_from([0, 2, 4, 6]),
    filters=st.binary(min_size=1, max_size=5).map(lambda raw: bytes(value % 5 for value in raw)),
    salt=st.integers(0, 255),
)
@settings(max_examples=200, deadline=None)
def test_mean_and_deviation_must_be_those_of_the_pixels_whatever_the_filters(width, height, colour, filters, salt):
    channels, colours = {0: (1, 1), 2: (3, 3), 4: (2, 1), 6: (4, 3)}[colour]

    def pixel(x, y):
        return bytes((salt + 31 * x + 17 * y * (c + 1)) % 256 for c in range(channels))

    look = look_at(png(width, height, pixel, filters=filters, colour=colour))
    values = [[pixel(x, y)[c] for y in range(height) for x in range(width)] for c in range(colours)]
    means = [sum(v) / len(v) for v in values]
    spread = max((sum((a - m) ** 2 for a in v) / len(v)) ** 0.5 for v, m in zip(values, means, strict=True))
    assert (look.width, look.height) == (width, height)
    assert look.mean == pytest.approx(sum(means) / colours)
    assert look.deviation == pytest.approx(spread, abs=1e-4)


@pytest.mark.parametrize(
    ("pixel", "fault"), [(b"\0\0\0", "black"), (b"\xff\xff\xff", "flat"), (b"\xf0\x00\x00", "flat")]
)
def test_one_colour_everywhere_must_be_a_fault(pixel, fault):
    assert look_at(png(8, 8, lambda x, y: pixel)).fault == fault


def test_a_picture_must_be_no_fault():
    assert look_at(picture(16, 16)).fault == ""


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_a_flipped_or_cut_file_must_be_refused_and_never_crash(data):
    whole = picture(8, 8)
    place = data.draw(st.integers(0, len(whole) - 1))
    if data.draw(st.booleans()):
        damaged = whole[:place]
    else:
        damaged = whole[:place] + bytes([whole[place] ^ data.draw(st.integers(1, 255))]) + whole[place + 1 :]
    with pytest.raises(ZopsError, match="the image is damaged"):
        look_at(damaged)


def test_a_bomb_must_not_be_unpacked():
    import struct
    import zlib

    header = struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0)
    bomb = zlib.compress(bytes(100_000_000), 1)
    data = SIGNATURE_OF_PNG + chunk(b"IHDR", header) + chunk(b"IDAT", bomb) + chunk(b"IEND", b"")
    with pytest.raises(ZopsError, match="201 bytes of pixels instead of 200"):
        look_at(data)


@pytest.mark.parametrize("size", [(0, 8), (100_000, 100_000)])
def test_a_size_that_no_pipeline_makes_must_be_refused(size):
    import struct

    header = struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0)
    data = SIGNATURE_OF_PNG + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    with pytest.raises(ZopsError, match="not what a pipeline sends"):
        look_at(data)
