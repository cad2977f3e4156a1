"""What a client may ask for: limits are named, defaults are the catalog's, hostile bytes give one clear refusal."""

import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from zops.serving.errors import ApiError
from zops.serving.fields import MAX_SEED
from zops.serving.request import Arrival, Limits, parse, parse_edit
from zops.spec import Spec

LIMITS = Limits.of(Spec())


# A token a letter, and a template of ten: enough to see what is counted.
ARRIVAL = Arrival("req_1", "http://here", lambda prompt: len(prompt) + 10)


def ask(limits=LIMITS, **fields):
    return parse(json.dumps({"prompt": "a cat"} | fields).encode(), limits, ARRIVAL)


def refused(body, limits=LIMITS):
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    with pytest.raises(ApiError) as caught:
        parse(raw, limits, ARRIVAL)
    return caught.value


def test_an_empty_request_must_get_the_defaults_of_the_catalog():
    wanted = ask()
    assert (wanted.shape.width, wanted.shape.height) == (1024, 1024)
    assert (wanted.shape.forwards, wanted.shape.guidance_scale) == (8, 0.0)
    assert (wanted.output_format, len(wanted.pictures)) == ("png", 1)


def test_the_operator_must_be_able_to_change_the_defaults():
    spec = Spec.model_validate({"serve": {"forwards": 4, "guidance_scale": 1.5, "max_pixels": 600 * 600}})
    wanted = parse(b'{"prompt": "a cat", "size": "auto"}', Limits.of(spec), ARRIVAL)
    assert (wanted.shape.forwards, wanted.shape.guidance_scale) == (4, 1.5)
    assert (wanted.shape.width, wanted.shape.height) == (592, 592)


def test_a_request_must_override_the_defaults_even_with_zero():
    spec = Spec.model_validate({"serve": {"guidance_scale": 1.5}})
    wanted = parse(b'{"prompt": "a cat", "guidance_scale": 0, "num_inference_steps": 1}', Limits.of(spec), ARRIVAL)
    assert (wanted.shape.forwards, wanted.shape.guidance_scale) == (1, 0.0)


def test_seeds_must_count_up_from_the_first():
    assert [picture.seed for picture in ask(n=3, seed=41).pictures] == [41, 42, 43]


def test_a_random_seed_must_differ_between_requests():
    assert len({ask().pictures[0].seed for _ in range(8)}) > 1


@pytest.mark.parametrize(
    ("fields", "code", "param", "said"),
    [
        ({"prompt": ""}, "prompt_empty", "prompt", "empty"),
        ({"prompt": " \n\t"}, "prompt_empty", "prompt", "empty"),
        ({"prompt": "x" * 32_001}, "prompt_too_long", "prompt", "32000"),
        ({"prompt": 5}, "invalid_type", "prompt", "string"),
        ({"prompt": "\ud800"}, "invalid_type", "prompt", ""),
        ({"model": "gpt-image-1"}, "model_not_found", "model", "Tongyi-MAI/Z-Image-Turbo"),
        ({"size": "1000x1024"}, "invalid_size", "size", "multiple of 16"),
        ({"size": "1024x1030"}, "invalid_size", "size", "1024 would be"),
        ({"size": "1024"}, "invalid_size", "size", "1024x1024"),
        ({"size": "0x1024"}, "invalid_size", "size", "1024x1024"),
        ({"size": "-64x64"}, "invalid_size", "size", "1024x1024"),
        ({"size": "64x64\n"}, "invalid_size", "size", "1024x1024"),
        ({"size": "\u0661\u0666x16"}, "invalid_size", "size", "1024x1024"),
        ({"size": "100000x10000"}, "too_many_pixels", "size", "4194304"),
        ({"size": "2064x2048"}, "too_many_pixels", "size", "4194304"),
        ({"size": "8208x16"}, "invalid_size", "size", "8192"),
        ({"n": 0}, "too_many_images", "n", "1 to 4"),
        ({"n": 5}, "too_many_images", "n", "1 to 4"),
        ({"n": True}, "invalid_type", "n", "integer"),
        ({"n": 1.5}, "invalid_type", "n", "integer"),
        ({"n": "1"}, "invalid_type", "n", "integer"),
        ({"num_inference_steps": 0}, "steps_out_of_range", "num_inference_steps", "200"),
        ({"num_inference_steps": 201}, "steps_out_of_range", "num_inference_steps", "200"),
        ({"guidance_scale": -0.1}, "guidance_out_of_range", "guidance_scale", "20"),
        ({"guidance_scale": 20.5}, "guidance_out_of_range", "guidance_scale", "20"),
        ({"seed": -1}, "seed_out_of_range", "seed", str(MAX_SEED)),
        ({"seed": MAX_SEED + 1}, "seed_out_of_range", "seed", str(MAX_SEED)),
        ({"seed": 10**4000}, "seed_out_of_range", "seed", "beyond any bound"),
        ({"output_format": "gif"}, "invalid_type", "output_format", "'png'"),
        ({"output_compression": 101}, "compression_out_of_range", "output_compression", "100"),
        ({"prompt": "x" * 503}, "prompt_too_long", "prompt", "513 tokens"),
        ({"response_format": "url", "stream": True}, "parameters_conflict", "response_format", "b64_json"),
        ({"stream": True, "partial_images": 4}, "partial_images_out_of_range", "partial_images", "0 to 3"),
        ({"partial_images": 2}, "parameters_conflict", "partial_images", "stream"),
        ({"background": "transparent"}, "unsupported_parameter", "background", "opaque"),
        ({"negative_prompt": "ugly"}, "parameters_conflict", "negative_prompt", "guidance_scale above 0"),
        ({"negative_prompt": "x" * 503, "guidance_scale": 1}, "prompt_too_long", "negative_prompt", "513 tokens"),
        ({"mask": "x"}, "unsupported_parameter", "mask", "mask"),
        ({"svg": {}}, "unsupported_parameter", "svg", "svg"),
        ({"step": 8}, "unknown_parameter", "step", "'step'"),
    ],
)
def test_what_is_out_of_bounds_must_be_refused_with_field_and_limit(fields, code, param, said):
    error = refused({"prompt": "a cat"} | fields)
    assert (error.code, error.param) == (code, param)
    assert said in error.message
    assert 400 <= error.status < 500


def test_fields_of_openai_that_mean_nothing_here_must_be_accepted():
    ask(user="u1", quality="hd", moderation="low", style="vivid", background="opaque", stream=False, partial_images=0)
    ask(response_format="b64_json", negative_prompt="", model="Tongyi-MAI/Z-Image-Turbo")


@pytest.mark.parametrize("body", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'"text"', b"[]", b"null", b"1" * 5000])
def test_a_body_that_is_no_json_object_must_be_refused(body):
    assert refused(body).code == "invalid_json"


def test_numbers_that_are_none_must_be_refused():
    assert refused(b'{"prompt": "a", "guidance_scale": NaN}').code == "invalid_type"
    assert refused(b'{"prompt": "a", "guidance_scale": Infinity}').code == "invalid_type"


def test_a_refusal_must_never_repeat_the_prompt():
    error = refused({"prompt": "secret-words" * 4000})
    assert "secret" not in error.message
    assert "secret" not in refused({"prompt": ["secret-words"]}).message


def test_a_missing_prompt_must_be_named():
    error = refused({})
    assert (error.code, error.param, error.message) == ("invalid_type", "prompt", "prompt is missing")


def test_pictures_must_have_ids_of_their_own_whatever_the_client_calls_its_request():
    ids = [picture.id for _ in range(3) for picture in ask(n=4).pictures]
    assert len(set(ids)) == 12


def test_the_shape_must_have_the_bucket_of_the_longer_prompt():
    assert ask(prompt="x" * 22).shape.bucket == 32
    assert ask(prompt="x" * 23).shape.bucket == 64
    assert ask(prompt="x" * 22, negative_prompt="x" * 60, guidance_scale=2).shape.bucket == 96
    assert ask(prompt="x" * 502).shape.bucket == 512


def test_a_long_prompt_must_be_taken_where_the_operator_lets_it_be_cut():
    limits = Limits.of(Spec.model_validate({"serve": {"long_prompts": "truncate"}}))
    wanted = ask(limits, prompt="x" * 5000)
    assert wanted.shape.bucket == 512
    assert len(wanted.pictures[0].prompt) == 5000


def test_what_a_stream_needs_must_reach_the_worker():
    wanted = ask(stream=True, partial_images=2, negative_prompt="fog", guidance_scale=1.5)
    assert wanted.stream
    assert (wanted.pictures[0].previews, wanted.pictures[0].negative_prompt) == (2, "fog")


# --- edits


def picture(width=64, height=64):
    target = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(target, "PNG")
    return target.getvalue()


def edit(image=None, **texts):
    return parse_edit({"prompt": "a cat"} | texts, image or picture(), LIMITS, ARRIVAL)


def test_an_edit_must_read_its_numbers_from_text():
    wanted = edit(n="2", seed="7", strength="0.5", stream="true", partial_images="1", guidance_scale="1")
    assert (wanted.shape.mode, wanted.shape.strength, wanted.shape.guidance_scale) == ("edit", 0.5, 1.0)
    assert [picture.seed for picture in wanted.pictures] == [7, 8]
    assert wanted.stream
    assert len(wanted.pictures[0].source) == 64 * 64 * 3


def test_an_edit_must_keep_the_size_of_its_image_as_nearly_as_possible():
    assert (edit(picture(100, 70)).shape.width, edit(picture(100, 70)).shape.height) == (96, 64)
    assert edit(picture(100, 70), size="128x32").shape.width == 128


@pytest.mark.parametrize(
    ("texts", "code", "param"),
    [
        ({"strength": "0"}, "strength_out_of_range", "strength"),
        ({"strength": "0.1"}, "strength_out_of_range", "strength"),  # of 8 forwards: none
        ({"strength": "1.1"}, "strength_out_of_range", "strength"),
        ({"strength": "nan"}, "invalid_type", "strength"),
        ({"strength": "x"}, "invalid_type", "strength"),
        ({"n": "many"}, "invalid_type", "n"),
        ({"size": "65x64"}, "invalid_size", "size"),
        ({"mask": "x"}, "unsupported_parameter", "mask"),
        ({"nonsense": "x"}, "unknown_parameter", "nonsense"),
        ({"model": "other"}, "model_not_found", "model"),
    ],
)
def test_what_is_wrong_with_an_edit_must_be_refused_before_its_image_is_read(texts, code, param):
    with pytest.raises(ApiError) as caught:
        edit(b"this is no image", **texts)
    assert (caught.value.code, caught.value.param) == (code, param)


def test_a_strength_that_leaves_one_forward_must_be_taken():
    assert edit(strength="0.125").shape.strength == 0.125


_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)
_names = st.sampled_from(["prompt", "n", "size", "seed", "guidance_scale", "num_inference_steps", "output_format"])


@given(st.dictionaries(_names | st.text(max_size=8), _values, max_size=4))
def test_whatever_is_sent_must_give_a_job_in_bounds_or_an_api_error(fields):
    try:
        wanted = parse(json.dumps({"prompt": "a cat"} | fields).encode(), LIMITS, ARRIVAL)
    except ApiError as error:
        assert len(error.message) < 300
        return
    assert wanted.shape.width % 16 == wanted.shape.height % 16 == 0
    assert 0 < wanted.shape.width * wanted.shape.height <= LIMITS.max_pixels
    assert 1 <= len(wanted.pictures) <= LIMITS.max_images


@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_a_size_must_be_taken_exactly_when_it_fits_the_limits(width, height):
    fits = width % 16 == height % 16 == 0 and 0 < width * height <= LIMITS.max_pixels and max(width, height) <= 8192
    if fits:
        assert ask(size=f"{width}x{height}").shape.width == width
    else:
        assert refused({"prompt": "a", "size": f"{width}x{height}"}).param == "size"


def test_limits_must_stay_usable_when_the_default_size_does_not_fit():
    limits = Limits.of(Spec.model_validate({"serve": {"max_pixels": 300, "warmup_size": 16}}))
    assert limits.default_size == 16
