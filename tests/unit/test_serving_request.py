"""What a client may ask for: limits are named, defaults are the catalog's, hostile bytes give one clear refusal."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zops.serving.errors import ApiError
from zops.serving.request import MAX_SEED, Limits, parse
from zops.spec import Spec

LIMITS = Limits.of(Spec())


def ask(**fields):
    return parse(json.dumps({"prompt": "a cat"} | fields).encode(), LIMITS, "req_1")


def refused(body, limits=LIMITS):
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    with pytest.raises(ApiError) as caught:
        parse(raw, limits, "req_1")
    return caught.value


def test_an_empty_request_must_get_the_defaults_of_the_catalog():
    wanted = ask()
    assert (wanted.job.width, wanted.job.height) == (1024, 1024)
    assert (wanted.job.forwards, wanted.job.guidance_scale) == (8, 0.0)
    assert (wanted.output_format, len(wanted.job.seeds)) == ("png", 1)


def test_the_operator_must_be_able_to_change_the_defaults():
    spec = Spec.model_validate({"serve": {"forwards": 4, "guidance_scale": 1.5, "max_pixels": 600 * 600}})
    wanted = parse(b'{"prompt": "a cat", "size": "auto"}', Limits.of(spec), "req_1")
    assert (wanted.job.forwards, wanted.job.guidance_scale) == (4, 1.5)
    assert (wanted.job.width, wanted.job.height) == (592, 592)


def test_a_request_must_override_the_defaults_even_with_zero():
    spec = Spec.model_validate({"serve": {"guidance_scale": 1.5}})
    wanted = parse(b'{"prompt": "a cat", "guidance_scale": 0, "num_inference_steps": 1}', Limits.of(spec), "r")
    assert (wanted.job.forwards, wanted.job.guidance_scale) == (1, 0.0)


def test_seeds_must_count_up_from_the_first():
    assert ask(n=3, seed=41).job.seeds == (41, 42, 43)


def test_a_random_seed_must_differ_between_requests():
    assert len({ask().job.seeds for _ in range(8)}) > 1


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
        ({"response_format": "url"}, "unsupported_parameter", "response_format", "b64_json"),
        ({"stream": True}, "unsupported_parameter", "stream", "streamed"),
        ({"partial_images": 2}, "unsupported_parameter", "partial_images", "streamed"),
        ({"background": "transparent"}, "unsupported_parameter", "background", "opaque"),
        ({"negative_prompt": "ugly"}, "unsupported_parameter", "negative_prompt", "negative"),
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


_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)
_names = st.sampled_from(["prompt", "n", "size", "seed", "guidance_scale", "num_inference_steps", "output_format"])


@given(st.dictionaries(_names | st.text(max_size=8), _values, max_size=4))
def test_whatever_is_sent_must_give_a_job_in_bounds_or_an_api_error(fields):
    try:
        wanted = parse(json.dumps({"prompt": "a cat"} | fields).encode(), LIMITS, "req_1")
    except ApiError as error:
        assert len(error.message) < 300
        return
    assert wanted.job.width % 16 == wanted.job.height % 16 == 0
    assert 0 < wanted.job.width * wanted.job.height <= LIMITS.max_pixels
    assert 1 <= len(wanted.job.seeds) <= LIMITS.max_images


@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_a_size_must_be_taken_exactly_when_it_fits_the_limits(width, height):
    fits = width % 16 == height % 16 == 0 and 0 < width * height <= LIMITS.max_pixels and max(width, height) <= 8192
    if fits:
        assert ask(size=f"{width}x{height}").job.width == width
    else:
        assert refused({"prompt": "a", "size": f"{width}x{height}"}).param == "size"


def test_limits_must_stay_usable_when_the_default_size_does_not_fit():
    limits = Limits.of(Spec.model_validate({"serve": {"max_pixels": 300, "warmup_size": 16}}))
    assert limits.default_size == 16
