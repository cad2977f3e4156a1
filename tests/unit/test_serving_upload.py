"""An uploaded image is hostile until it is pixels of the size that was asked for."""

import io
import struct
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from zops.serving import upload
from zops.serving.errors import ApiError
from zops.serving.upload import fit, open_source

MAX_PIXELS = 1 << 20


def written(image, kind="PNG", **options):
    target = io.BytesIO()
    image.save(target, kind, **options)
    return target.getvalue()


def flat(colour="red", size=(64, 32), mode="RGB"):
    return Image.new(mode, size, colour)


def opened(data, size=None):
    source = open_source(data, size, MAX_PIXELS)
    return Image.frombytes("RGB", (source.width, source.height), source.rgb)


def refused(data):
    with pytest.raises(ApiError) as caught:
        open_source(data, None, MAX_PIXELS)
    assert (caught.value.code, caught.value.param) == ("invalid_image", "image")
    return caught.value.message


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_each_format_must_become_pixels(kind):
    picture = opened(written(flat(), kind))
    assert picture.size == (64, 32)
    red, green, blue = picture.getpixel((20, 10))
    assert red > 240
    assert green < 20 > blue


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "ICO", "PPM"])
def test_other_formats_must_be_refused(kind):
    assert "PNG, JPEG or WebP" in refused(written(flat(), kind))


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1", "I;16"])
def test_every_kind_of_pixels_must_become_rgb(mode):
    assert opened(written(Image.new(mode, (32, 32)))).size == (32, 32)


def test_sixteen_bits_must_keep_their_brightness():
    assert opened(written(Image.new("I;16", (32, 32), 0x8000))).getpixel((5, 5)) == (128, 128, 128)


def test_what_is_transparent_must_become_white_and_not_show_what_is_hidden_there():
    assert opened(written(flat((255, 0, 0, 0), mode="RGBA"))).getpixel((5, 5)) == (255, 255, 255)


def test_cmyk_must_be_converted():
    assert opened(written(flat((0, 0, 0, 0), mode="CMYK"), "JPEG")).getpixel((5, 5)) == (255, 255, 255)


def test_an_image_must_be_turned_as_its_camera_was_held():
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = Image.new("RGB", (64, 32))
    picture.paste((255, 255, 255), (0, 0, 32, 32))  # bright on the left, which orientation 6 turns to the top
    upright = opened(written(picture, "PNG", exif=exif))
    assert upright.size == (32, 64)
    assert upright.getpixel((16, 4))[0] > 250
    assert upright.getpixel((16, 60))[0] < 5


def test_another_shape_must_be_cut_from_the_middle_and_not_squeezed():
    picture = Image.new("RGB", (96, 32))
    picture.paste((255, 255, 255), (32, 0, 64, 32))
    middle = opened(written(picture), (32, 32))
    assert middle.getpixel((2, 16))[0] > 200 < middle.getpixel((29, 16))[0]


def test_too_many_pixels_must_be_refused_before_they_are_decoded(monkeypatch):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )
    monkeypatch.setattr(Image.Image, "load", lambda _image: pytest.fail("it was decoded"))
    assert str(upload.MAX_SOURCE_PIXELS) in refused(bomb)


def test_a_jpeg_of_endless_scans_must_be_refused():
    data = written(flat(), "JPEG", progressive=True)
    assert data.count(b"\xff\xda") < 20
    scan = data[data.index(b"\xff\xda") : -2]
    assert "scans" in refused(data[:-2] + scan * 100 + b"\xff\xd9")


@given(st.binary(max_size=300))
def test_bytes_of_any_kind_must_be_refused_in_order(data):
    refused(data)


@given(st.data())
def test_a_damaged_image_must_be_refused_or_read_and_nothing_else(data):
    whole = written(flat(), data.draw(st.sampled_from(["PNG", "JPEG", "WEBP"])))
    broken = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 8))):
        broken[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(broken[: data.draw(st.integers(0, len(whole)))])
    try:
        source = open_source(cut, (32, 32), MAX_PIXELS)
    except ApiError as error:
        assert error.code == "invalid_image"
    else:
        assert len(source.rgb) == 32 * 32 * 3


@given(st.integers(1, 100_000), st.integers(1, 100_000), st.integers(256, 1 << 24))
def test_the_nearest_size_must_be_one_that_can_be_made(width, height, max_pixels):
    edges = fit(width, height, max_pixels)
    assert all(edge % 16 == 0 and 16 <= edge <= 8192 for edge in edges)
    assert edges[0] * edges[1] <= max_pixels


def test_a_size_that_can_be_made_must_stay_as_it_is():
    assert fit(1024, 768, 1 << 20) == (1024, 768)
    assert fit(4000, 3000, 1 << 20) == (1184, 880)
