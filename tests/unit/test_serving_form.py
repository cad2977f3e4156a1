"""A form is taken apart in memory; one that is damaged gives one clear refusal."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zops.serving import form as form_module
from zops.serving.errors import ApiError
from zops.serving.form import read_form

TYPE = "multipart/form-data; boundary=cut"


def part(name, body, filename=None):
    more = f'; filename="{filename}"' if filename is not None else ""
    return f'--cut\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n'.encode() + body + b"\r\n"


def form(*parts):
    return read_form(TYPE, b"".join(parts) + b"--cut--\r\n")


def refused(body, content_type=TYPE):
    with pytest.raises(ApiError) as caught:
        read_form(content_type, body)
    return caught.value.code


def test_texts_and_files_must_be_told_apart():
    found = form(part("prompt", "ein Käfer".encode()), part("image", b"\0\r\n--cu\xff", "a.png"))
    assert found.texts == {"prompt": "ein Käfer"}
    assert found.files == {"image": [b"\0\r\n--cu\xff"]}


def test_a_list_of_files_must_be_one_field():
    found = form(part("image[]", b"1", "a"), part("image[]", b"2", "b"), part("image", b"3", "c"))
    assert found.files == {"image": [b"1", b"2", b"3"]}


@given(st.binary(max_size=2000))
def test_a_file_must_arrive_byte_by_byte(body):
    if b"--cut" not in body:
        assert form(part("image", body, "a")).files["image"] == [body]


@pytest.mark.parametrize(
    "content_type", ["", "application/json", "text/plain; boundary=cut", "multipart/mixed; boundary=cut"]
)
def test_another_media_type_must_be_named(content_type):
    assert refused(b"", content_type) == "unsupported_media_type"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"nothing like it",
        part("prompt", b"a"),  # no end
        part("prompt", b"a")[:-5],
        part("prompt", b"a") + part("prompt", b"b") + b"--cut--",
        part("prompt", b"\xff\xfe") + b"--cut--",
        b"--cut\r\nContent-Disposition: form-data\r\n\r\na\r\n--cut--",
        b"--cut\r\n\r\na\r\n--cut--",
        b"--cut\r\nX: " + b"a" * 5000 + b"\r\n\r\na\r\n--cut--",
        b"".join(part(f"f{number}", b"a") for number in range(65)) + b"--cut--",
        part("prompt", b"a" * (form_module.MAX_TEXT_BYTES + 1)) + b"--cut--",
    ],
)
def test_a_damaged_or_excessive_form_must_be_refused(body):
    assert refused(body) == "invalid_form"


def test_an_empty_form_must_be_a_form():
    assert form().texts == form().files == {}


def test_a_form_without_a_boundary_must_be_refused():
    assert refused(b"", "multipart/form-data") == "invalid_form"
    assert refused(b"", "multipart/form-data; boundary=" + "a" * 2000) == "invalid_form"


@given(st.binary(max_size=400))
def test_any_bytes_must_give_a_form_or_a_refusal(body):
    try:
        read_form(TYPE, b"--cut\r\n" + body)
    except ApiError as error:
        assert error.code == "invalid_form"
