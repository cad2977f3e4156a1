"""An image must carry how it was made, and nothing that differs from run to run."""

import io
import json
import re
import warnings
import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from zops.serving.messages import Gate, Made, Preview, Ready, Shape
from zops.serving.png import write_png
from zops.serving.receipt import AI_EDITED, AI_GENERATED, Receipt, encode, encode_preview

RGB = bytes(range(256)) * 6
SHAPE = Shape("generate", 32, 16, 8, 0.0, 32)
MADE = Made("a", 32, 16, 7, RGB, 21, truncated=False, forwards=8, batch_size=2, seconds={})
IDENTITY = {
    "model": "zops/synthetic-tiny",
    "revision": "seed-0",
    "manifest_digest": "ab" * 32,
    "facts": Ready("cpu", "float32", {}, preset="bf16", gate=Gate("passed", 47.7, 0.999), fallback="bf16 it is"),
}
RECEIPT = Receipt.of(MADE, SHAPE, **IDENTITY)
EDITED = Receipt.of(replace(MADE, forwards=5), replace(SHAPE, mode="edit", strength=0.6), **IDENTITY)
FORMATS = ("png", "jpeg", "webp")


def _open(data):
    return Image.open(io.BytesIO(data))


def _packet(data):
    packet = _open(data).info["xmp"]
    return packet if isinstance(packet, str) else packet.decode()


def _source_type(data):
    [description] = ET.fromstring(_packet(data)).iter("{http://www.w3.org/1999/02/22-rdf-syntax-ns#}Description")
    return description.get("{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType")


@pytest.mark.parametrize("output_format", FORMATS)
def test_equal_images_must_give_equal_bytes_whatever_they_were_made_with(output_format):
    other = Receipt.of(replace(MADE, batch_size=4, seconds={"text": 1.0}, picture="b"), SHAPE, **IDENTITY)
    assert encode(RGB, RECEIPT, output_format, 95) == encode(RGB, other, output_format, 95)


@pytest.mark.parametrize("output_format", FORMATS)
def test_an_image_must_be_what_was_asked_for(output_format):
    picture = _open(encode(RGB, RECEIPT, output_format, 95))
    assert picture.format.lower() == output_format
    assert (picture.size, picture.mode) == ((32, 16), "RGB")


@given(data=st.data(), width=st.integers(1, 40), height=st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_png_must_keep_every_pixel(data, width, height):
    noise = data.draw(st.randoms(use_true_random=False))
    rgb = noise.randbytes(width * height * 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        picture = _open(write_png(width, height, rgb, text={"Software": "x"}, xmp="<x/>"))
        picture.verify()
        assert _open(write_png(width, height, rgb, text={})).tobytes() == rgb


def test_a_lower_quality_must_give_a_smaller_file():
    for output_format in ("jpeg", "webp"):
        assert len(encode(RGB, RECEIPT, output_format, 10)) < len(encode(RGB, RECEIPT, output_format, 100))


@pytest.mark.parametrize("output_format", FORMATS)
def test_the_receipt_must_be_found_in_the_image(output_format):
    picture = _open(encode(RGB, RECEIPT, output_format, 95))
    text = picture.text["zops"] if output_format == "png" else picture.getexif()[0x010E]
    assert json.loads(text) == {
        **{name: value for name, value in IDENTITY.items() if name != "facts"},
        "dtype": "float32",
        "preset": "bf16",
        "gate": "passed",
        "preset_note": "bf16 it is",
        "mode": "generate",
        "seed": 7,
        "forwards": 8,
        "guidance_scale": 0.0,
        "strength": None,
        "width": 32,
        "height": 16,
        "prompt_tokens": 21,
        "truncated": False,
    }


@pytest.mark.parametrize("output_format", FORMATS)
def test_an_image_must_be_marked_as_made_by_a_model(output_format):
    data = encode(RGB, RECEIPT, output_format, 95)
    # Where readers of metadata look for it, by the XMP specification, part 3.
    assert {"png": b"iTXtXML:com.adobe.xmp\0", "jpeg": b"http://ns.adobe.com/xap/1.0/\0", "webp": b"XMP "}[
        output_format
    ] in data
    assert _source_type(data) == AI_GENERATED


@pytest.mark.parametrize("output_format", FORMATS)
def test_an_edited_image_must_be_marked_as_changed_by_a_model(output_format):
    assert _source_type(encode(RGB, EDITED, output_format, 95)) == AI_EDITED
    assert (EDITED.forwards, EDITED.strength) == (5, 0.6)


@pytest.mark.parametrize("output_format", FORMATS)
def test_a_preview_must_be_marked_too(output_format):
    data = encode_preview(Preview("a", 0, 32, 16, RGB), output_format, 80)
    assert _open(data).size == (32, 16)
    assert _source_type(data) == AI_GENERATED
    assert b"manifest_digest" not in data


@pytest.mark.parametrize("output_format", FORMATS)
def test_the_mark_must_be_left_out_when_the_operator_says_so_and_the_receipt_stay(output_format):
    data = encode(RGB, RECEIPT, output_format, 95, mark=False)
    assert _source_type(data) is None
    assert b"manifest_digest" in data


@pytest.mark.parametrize("output_format", FORMATS)
def test_an_image_must_carry_no_time(output_format):
    data = encode(RGB, RECEIPT, output_format, 95)
    assert not re.search(rb"20[2-9][0-9]-[0-9]{2}|seconds|tIME", data)


def test_the_answer_must_tell_the_seconds_of_each_phase_and_the_batch():
    answer = RECEIPT.as_json({"queue": 0.12345, "denoise": 1}, batch_size=2)
    assert (answer["seconds"], answer["batch_size"]) == ({"queue": 0.1235, "denoise": 1}, 2)
    assert answer.items() >= json.loads(RECEIPT.as_text()).items()
