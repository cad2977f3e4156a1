"""An image must carry how it was made, and nothing that differs from run to run."""

import io
import json
import re

import pytest
from PIL import Image

from zops.serving.messages import RawImage
from zops.serving.receipt import AI_GENERATED, Receipt, encode

RAW = RawImage(32, 16, 7, bytes(range(256)) * 6)
RECEIPT = Receipt("zops/synthetic-tiny", "seed-0", "ab" * 32, 7, 8, 0.0, "float32", 32, 16)
FORMATS = ("png", "jpeg", "webp")


def _open(data):
    return Image.open(io.BytesIO(data))


@pytest.mark.parametrize("output_format", FORMATS)
def test_equal_images_must_give_equal_bytes(output_format):
    assert encode(RAW, RECEIPT, output_format, 95) == encode(RAW, RECEIPT, output_format, 95)


@pytest.mark.parametrize("output_format", FORMATS)
def test_an_image_must_be_what_was_asked_for(output_format):
    picture = _open(encode(RAW, RECEIPT, output_format, 95))
    assert picture.format.lower() == output_format
    assert picture.size == (32, 16)


def test_png_must_keep_every_pixel():
    assert _open(encode(RAW, RECEIPT, "png", 95)).tobytes() == RAW.rgb


def test_a_lower_quality_must_give_a_smaller_file():
    assert len(encode(RAW, RECEIPT, "jpeg", 10)) < len(encode(RAW, RECEIPT, "jpeg", 100))


@pytest.mark.parametrize("output_format", FORMATS)
def test_the_receipt_must_be_found_in_the_image(output_format):
    picture = _open(encode(RAW, RECEIPT, output_format, 95))
    text = picture.text["zops"] if output_format == "png" else picture.getexif()[0x010E]
    body = json.loads(text)
    assert (body["seed"], body["manifest_digest"], body["forwards"]) == (7, "ab" * 32, 8)


@pytest.mark.parametrize("output_format", FORMATS)
def test_an_image_must_be_marked_as_made_by_a_model(output_format):
    data = encode(RAW, RECEIPT, output_format, 95)
    # Where readers of metadata look for it, by the XMP specification, part 3.
    assert {"png": b"iTXtXML:com.adobe.xmp\0", "jpeg": b"http://ns.adobe.com/xap/1.0/\0", "webp": b"XMP "}[
        output_format
    ] in data
    picture = _open(data)
    packet = picture.info["xmp"]
    assert AI_GENERATED in (packet if isinstance(packet, str) else packet.decode())


@pytest.mark.parametrize("output_format", FORMATS)
def test_an_image_must_carry_no_time(output_format):
    data = encode(RAW, RECEIPT, output_format, 95)
    assert not re.search(rb"20[2-9][0-9]-[0-9]{2}|seconds|tIME", data)


def test_the_answer_must_tell_the_seconds_of_each_phase():
    assert RECEIPT.as_json({"queue": 0.12345, "generate": 1})["seconds"] == {"queue": 0.1235, "generate": 1}
