"""Requests that must be refused, each with the status and the code that the documentation names."""

import json
from dataclasses import dataclass, field

from benchmarks.serving.recipes import EDITS, GENERATIONS, form, source_image

_GOOD = {"prompt": "a cat", "size": "64x64"}
_JSON = {"Content-Type": "application/json"}


@dataclass(frozen=True)
class Refusal:
    """A request and how it must be refused."""

    status: int
    code: str
    body: bytes = field(repr=False)
    path: str = GENERATIONS
    method: str = "POST"
    headers: dict[str, str] = field(default_factory=lambda: dict(_JSON))


def _fields(status: int, code: str, **fields: object) -> Refusal:
    return Refusal(status, code, json.dumps(_GOOD | fields).encode())


def _form(status: int, code: str, body: bytes, kind: str = "multipart/form-data; boundary=x") -> Refusal:
    return Refusal(status, code, body, EDITS, headers={"Content-Type": kind})


TOO_BIG = (
    _fields(400, "too_many_pixels", size="8192x8192"),
    _fields(400, "invalid_size", size="100x100"),
    _fields(400, "too_many_images", n=99),
    _fields(400, "steps_out_of_range", num_inference_steps=1000),
    _fields(400, "guidance_out_of_range", guidance_scale=21),
    _fields(400, "seed_out_of_range", seed=2**60),
    _fields(400, "prompt_too_long", prompt="a cat on a mat " * 500),
    Refusal(413, "body_too_large", b'{"prompt": "' + b"a" * (2 << 20) + b'"}'),
    Refusal(431, "headers_too_large", b"{}", headers=_JSON | {f"x-{n}": "a" for n in range(120)}),
)
_TYPE, _WHOLE = form({"prompt": "a"}, source_image())
_NO_IMAGE_TYPE, _NO_IMAGE = form({"prompt": "a"}, b"no image")
MALFORMED = (
    Refusal(400, "invalid_json", b'{"prompt": "a cat"'),
    Refusal(400, "invalid_json", b"\xff\xfe{}"),
    Refusal(400, "invalid_json", b"[" * 100_000),
    Refusal(400, "invalid_json", b""),
    _fields(422, "invalid_type", prompt=7),
    _fields(400, "prompt_empty", prompt=" \n"),
    _fields(400, "unknown_parameter", colour="red"),
    _fields(400, "parameters_conflict", partial_images=2),
    _fields(404, "model_not_found", model="owner/other"),
    _form(400, "invalid_form", b"no form at all"),
    _form(400, "invalid_form", _WHOLE[: len(_WHOLE) // 2], _TYPE),
    _form(400, "invalid_image", _NO_IMAGE, _NO_IMAGE_TYPE),
    _form(415, "unsupported_media_type", b"{}", "application/json"),
    Refusal(400, "invalid_idempotency_key", b"{}", headers=_JSON | {"Idempotency-Key": "a" * 300}),
    Refusal(404, "not_found", b"", "/v1/none"),
    Refusal(404, "job_not_found", b"", "/v1/jobs/job_none", "GET"),
    Refusal(405, "method_not_allowed", b"", GENERATIONS, "GET"),
)
