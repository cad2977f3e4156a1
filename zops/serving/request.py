"""What a client may ask for: OpenAI's fields and ours, read from hostile bytes, refused early with the limit named."""

import json
import re
import secrets
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from zops.catalog import lookup
from zops.serving.errors import ApiError
from zops.serving.messages import Job
from zops.spec import Spec

MAX_BODY_BYTES = 1 << 20
MAX_PROMPT_CHARS = 32_000
"""OpenAI's own limit. The real one is counted in tokens, by the worker's tokenizer."""
MULTIPLE = 16
MAX_EDGE = 8192
"""512 entries of the rotary tables, 16 pixels each."""
MAX_FORWARDS = 200
MAX_GUIDANCE = 20.0
MAX_SEED = (1 << 53) - 1
"""The largest whole number that every JSON reader keeps exact."""

Format = Literal["png", "jpeg", "webp"]


class GenerationBody(BaseModel):
    """Body of `POST /v1/images/generations`."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    prompt: str = Field(description="what the image shows; at most 512 tokens with the model's template")
    model: str | None = Field(None, description="must be the served model when given")
    n: int | None = Field(None, description="images to make, 1 when empty; seeds count up from the first")
    size: str | None = Field(None, description="WIDTHxHEIGHT, both multiples of 16, or auto")
    response_format: Literal["b64_json", "url"] | None = Field(None, description="only b64_json is supported")
    output_format: Format | None = Field(None, description="png when empty")
    output_compression: int | None = Field(None, description="quality of jpeg and webp, 0 to 100, 95 when empty")
    seed: int | None = Field(None, description="0 to 2^53-1, random when empty; only its lower 32 bits matter")
    num_inference_steps: int | None = Field(None, description="forwards of the transformer; the model's own when empty")
    guidance_scale: float | None = Field(None, description="the model's own when empty; any value above 0 costs double")
    user: str | None = Field(None, description="ignored")
    quality: Literal["auto", "low", "medium", "high", "standard", "hd"] | None = Field(None, description="ignored")
    moderation: Literal["auto", "low"] | None = Field(None, description="ignored")
    style: Literal["vivid", "natural"] | None = Field(None, description="ignored")
    background: Literal["auto", "opaque", "transparent"] | None = Field(
        None, description="transparent is not supported"
    )
    stream: bool | None = Field(None, description="true is not supported")
    partial_images: int | None = Field(None, description="above 0 is not supported")
    negative_prompt: str | None = Field(None, description="not supported unless empty")


@dataclass(frozen=True, slots=True)
class Limits:
    """What this server accepts, and what it fills in."""

    model: str
    default_size: int
    forwards: int
    guidance_scale: float
    max_pixels: int
    max_images: int
    max_queue: int
    request_timeout_s: float
    startup_timeout_s: float

    @classmethod
    def of(cls, spec: Spec) -> "Limits":
        """Take the limits from the specification, and what it leaves open from the catalog."""
        defaults, serve = lookup(spec.model).defaults, spec.serve
        largest_square = int(serve.max_pixels**0.5) // MULTIPLE * MULTIPLE
        return cls(
            model=spec.model,
            default_size=min(defaults.size, largest_square),
            forwards=defaults.forwards if serve.forwards is None else serve.forwards,
            guidance_scale=defaults.guidance_scale if serve.guidance_scale is None else serve.guidance_scale,
            max_pixels=serve.max_pixels,
            max_images=serve.max_images,
            max_queue=serve.max_queue,
            request_timeout_s=serve.request_timeout_s,
            startup_timeout_s=serve.startup_timeout_s,
        )


@dataclass(frozen=True, slots=True)
class ImageRequest:
    """A request that passed: the job for the worker and how its images are to be encoded."""

    job: Job
    output_format: Format
    quality: int


def parse(body: bytes, limits: Limits, request_id: str) -> ImageRequest:
    """Read and check a body.

    Raises:
        ApiError: naming the field and the limit; it never repeats the prompt.
    """
    fields = _read(body)
    _refuse_unsupported(fields)
    if fields.model not in {None, limits.model}:
        raise ApiError("model_not_found", f"this server serves {limits.model} and no other model", param="model")
    _check_prompt(fields.prompt)
    width, height = _size(fields.size, limits)
    count = 1 if fields.n is None else fields.n
    forwards = limits.forwards if fields.num_inference_steps is None else fields.num_inference_steps
    guidance = limits.guidance_scale if fields.guidance_scale is None else fields.guidance_scale
    quality = 95 if fields.output_compression is None else fields.output_compression
    # 32 bits are all that torch's generator on the CPU uses of a seed.
    seed = secrets.randbelow(1 << 32) if fields.seed is None else fields.seed
    _check_range("too_many_images", "n", count, 1, limits.max_images)
    _check_range("steps_out_of_range", "num_inference_steps", forwards, 1, MAX_FORWARDS)
    _check_range("guidance_out_of_range", "guidance_scale", guidance, 0, MAX_GUIDANCE)
    _check_range("compression_out_of_range", "output_compression", quality, 0, 100)
    _check_range("seed_out_of_range", "seed", seed, 0, MAX_SEED)
    job = Job(
        id=request_id,
        prompt=fields.prompt,
        width=width,
        height=height,
        seeds=tuple(seed + index for index in range(count)),
        forwards=forwards,
        guidance_scale=float(guidance),
    )
    return ImageRequest(job, fields.output_format or "png", quality)


def _read(body: bytes) -> GenerationBody:
    try:
        tree: Any = json.loads(body)
    except (ValueError, RecursionError):
        raise ApiError("invalid_json", "the body is not valid JSON") from None
    if not isinstance(tree, dict):
        raise ApiError("invalid_json", "the body must be a JSON object")
    try:
        return GenerationBody.model_validate(tree)
    except ValidationError as error:
        raise _explain(error) from None


def _explain(error: ValidationError) -> ApiError:
    """Turn pydantic's first finding into our error, without the value: it may be the prompt."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    name = str(first["loc"][0]) if first["loc"] else ""
    if first["type"] == "extra_forbidden":
        # The name is the client's own text; repeat no more of it than a field's name needs.
        shown = name[:64].encode("ascii", "backslashreplace").decode()
        return ApiError("unknown_parameter", f"there is no parameter {shown!r}", param=shown)
    if first["type"] == "missing":
        return ApiError("invalid_type", f"{name} is missing", param=name)
    reason = first["msg"].replace("Input should be", "must be")
    return ApiError("invalid_type", f"{name}: {reason[:1].lower()}{reason[1:]}", param=name)


def _refuse_unsupported(fields: GenerationBody) -> None:
    refused = {
        "response_format": (fields.response_format == "url", "images are answered inline; use b64_json"),
        "background": (fields.background == "transparent", "this model makes opaque images; use opaque or auto"),
        "stream": (bool(fields.stream), "answers are not streamed; leave it out"),
        "partial_images": (bool(fields.partial_images), "answers are not streamed; leave it out"),
        "negative_prompt": (bool(fields.negative_prompt), "there are no negative prompts here; leave it out"),
    }
    for name, (asked, text) in refused.items():
        if asked:
            raise ApiError("unsupported_parameter", f"{name}: {text}", param=name)


def _check_prompt(prompt: str) -> None:
    if not prompt.strip():
        raise ApiError("prompt_empty", "the prompt is empty", param="prompt")
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise ApiError("invalid_type", "prompt: must be valid Unicode, it has half a surrogate pair", param="prompt")
    if len(prompt) > MAX_PROMPT_CHARS:
        message = f"the prompt has {len(prompt)} characters, the limit is {MAX_PROMPT_CHARS}; shorten it"
        raise ApiError("prompt_too_long", message, param="prompt")


def _size(text: str | None, limits: Limits) -> tuple[int, int]:
    if text in {None, "auto"}:
        return limits.default_size, limits.default_size
    match = re.fullmatch(r"([1-9][0-9]{0,5})x([1-9][0-9]{0,5})", text or "", re.ASCII)
    if not match:
        message = "size must be auto or WIDTHxHEIGHT in pixels, for example 1024x1024"
        raise ApiError("invalid_size", message, param="size")
    width, height = int(match[1]), int(match[2])
    for name, edge in (("width", width), ("height", height)):
        if edge % MULTIPLE:
            near = max(MULTIPLE, round(edge / MULTIPLE) * MULTIPLE)
            message = f"the {name} {edge} is not a multiple of {MULTIPLE}; {near} would be"
            raise ApiError("invalid_size", message, param="size")
    # Pixels first: it is the limit that the operator set.
    if width * height > limits.max_pixels:
        message = f"{width}x{height} is {width * height} pixels, the limit is {limits.max_pixels}"
        raise ApiError("too_many_pixels", message, param="size")
    if max(width, height) > MAX_EDGE:
        raise ApiError("invalid_size", f"no edge may be longer than {MAX_EDGE} pixels", param="size")
    return width, height


def _check_range(code: str, name: str, value: float, least: float, most: float) -> None:
    if not least <= value <= most:
        raise ApiError(code, f"{name} must be {least:g} to {most}, it is {_short(value)}", param=name)


def _short(value: float) -> str:
    """Render a client's number without letting it fill our answer."""
    text = str(value) if abs(value) < 1 << 128 else "beyond any bound"
    return text[:40]
