"""What a client asked for: read from hostile bytes, refused early with the limit named, filled in with defaults."""

import json
import re
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from pydantic import ValidationError

from zops.catalog import lookup
from zops.serving.errors import ApiError
from zops.serving.fields import (
    BOUNDS,
    DEFAULT_QUALITY,
    DEFAULT_STRENGTH,
    MAX_EDGE,
    MAX_PROMPT_CHARS,
    MULTIPLE,
    OPENAI_ONLY,
    Bound,
    EditBody,
    Format,
    GenerationBody,
    Transport,
)
from zops.serving.messages import MAX_PROMPT_TOKENS, Picture, Shape
from zops.serving.tokens import bucket
from zops.serving.upload import Source, open_source
from zops.spec import Spec

Fields = TypeVar("Fields", bound=GenerationBody)


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
    long_prompts: Literal["refuse", "truncate"] = "refuse"
    log_prompts: bool = False
    mark_images: bool = True
    max_upload_bytes: int = 20 << 20
    results_bytes: int = 256 << 20
    results_keep_s: float = 3600
    public_url: str | None = None

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
            long_prompts=serve.long_prompts,
            log_prompts=serve.log_prompts,
            mark_images=serve.mark_images,
            max_upload_bytes=serve.max_upload,
            results_bytes=serve.results_bytes,
            results_keep_s=serve.results_keep_s,
            public_url=serve.public_url,
        )

    def bounds(self) -> dict[str, Bound]:
        """Return what each number of a request may be."""
        return BOUNDS | {"n": Bound("too_many_images", 1, self.max_images)}


@dataclass(frozen=True, slots=True)
class Arrival:
    """What the fields of a request do not tell."""

    id: str
    """The request's id, not unique: clients may choose it."""
    base_url: str = ""
    """What the URLs of its results begin with."""
    count_tokens: Callable[[str], int] = lambda _prompt: 0
    """Tokens of a prompt within its template. The default is for a server without a worker: it answers `not_ready`."""
    arrived: float = field(default_factory=time.monotonic)


@dataclass(frozen=True, slots=True)
class ImageRequest:
    """A request that passed: what the workers are to make, and how it is to be answered."""

    arrival: Arrival
    shape: Shape
    pictures: tuple[Picture, ...]
    output_format: Format
    quality: int
    response_format: Transport
    stream: bool
    partial_images: int

    @property
    def id(self) -> str:
        """The request's id."""
        return self.arrival.id


def parse(body: bytes, limits: Limits, arrival: Arrival) -> ImageRequest:
    """Read and check the JSON of `POST /v1/images/generations`.

    Raises:
        ApiError: naming the field and the limit; it never repeats the prompt.
    """
    try:
        tree: Any = json.loads(body)
    except (ValueError, RecursionError):
        raise ApiError("invalid_json", "the body is not valid JSON") from None
    if not isinstance(tree, dict):
        raise ApiError("invalid_json", "the body must be a JSON object")
    fields = _validate(GenerationBody, tree)
    size = _size(fields.size, limits) or (limits.default_size, limits.default_size)
    return _build(fields, _check(fields, limits, arrival), arrival, Source(*size))


def parse_edit(texts: Mapping[str, str], image: bytes, limits: Limits, arrival: Arrival) -> ImageRequest:
    """Read and check the fields of `POST /v1/images/edits`, and decode its image; slow, for a thread.

    Raises:
        ApiError: as `parse`, also when the image cannot be decoded within bounds.
    """
    fields = _validate(EditBody, texts)
    size = _size(fields.size, limits)
    checked = _check(fields, limits, arrival)
    strength = DEFAULT_STRENGTH if fields.strength is None else fields.strength
    _check_range("strength", strength, limits)
    if int(checked.forwards * strength) < 1:
        message = (
            f"a strength of {strength:g} leaves none of the {checked.forwards} forwards to run; give more of either"
        )
        raise ApiError("strength_out_of_range", message, param="strength")
    # Last, because it is what costs.
    return _build(fields, checked, arrival, open_source(image, size, limits.max_pixels), strength)


@dataclass(frozen=True, slots=True)
class _Checked:
    """Numbers of a request that are in bounds, defaults filled in."""

    count: int
    forwards: int
    guidance_scale: float
    seed: int
    quality: int
    bucket: int


def _validate(kind: type[Fields], tree: Mapping[str, Any]) -> Fields:
    for name in sorted(OPENAI_ONLY & tree.keys()):
        raise ApiError("unsupported_parameter", f"{name}: this server does not have it; leave it out", param=name)
    try:
        return kind.model_validate(tree)
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


def _check(fields: GenerationBody, limits: Limits, arrival: Arrival) -> _Checked:
    if fields.model not in {None, limits.model}:
        raise ApiError("model_not_found", f"this server serves {limits.model} and no other model", param="model")
    if fields.background == "transparent":
        message = "background: this model makes opaque images; use opaque or auto"
        raise ApiError("unsupported_parameter", message, param="background")
    numbers = {
        "n": 1 if fields.n is None else fields.n,
        "num_inference_steps": limits.forwards if fields.num_inference_steps is None else fields.num_inference_steps,
        "guidance_scale": limits.guidance_scale if fields.guidance_scale is None else fields.guidance_scale,
        "output_compression": DEFAULT_QUALITY if fields.output_compression is None else fields.output_compression,
        # 32 bits are all that torch's generator on the CPU uses of a seed.
        "seed": secrets.randbelow(1 << 32) if fields.seed is None else fields.seed,
        "partial_images": fields.partial_images or 0,
    }
    for name, value in numbers.items():
        _check_range(name, value, limits)
    _check_conflicts(fields, numbers["guidance_scale"])
    tokens = _tokens("prompt", fields.prompt, limits, arrival)
    if fields.negative_prompt:
        tokens = max(tokens, _tokens("negative_prompt", fields.negative_prompt, limits, arrival))
    return _Checked(
        count=int(numbers["n"]),
        forwards=int(numbers["num_inference_steps"]),
        guidance_scale=float(numbers["guidance_scale"]),
        seed=int(numbers["seed"]),
        quality=int(numbers["output_compression"]),
        bucket=bucket(tokens),
    )


def _check_conflicts(fields: GenerationBody, guidance_scale: float) -> None:
    conflicts = {
        "negative_prompt": (
            bool(fields.negative_prompt) and guidance_scale <= 0,
            "has no effect without guidance; leave it out, or give a guidance_scale above 0 (it costs double)",
        ),
        "partial_images": (bool(fields.partial_images) and not fields.stream, "needs stream: true"),
        "response_format": (
            fields.response_format == "url" and bool(fields.stream),
            "a stream carries the images themselves; use b64_json or do not stream",
        ),
    }
    for name, (conflict, text) in conflicts.items():
        if conflict:
            raise ApiError("parameters_conflict", f"{name}: {text}", param=name)


def _tokens(name: str, prompt: str, limits: Limits, arrival: Arrival) -> int:
    """Check a prompt and return its tokens."""
    if not prompt.strip():
        raise ApiError("prompt_empty", f"{name} is empty", param=name)
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise ApiError("invalid_type", f"{name}: must be valid Unicode, it has half a surrogate pair", param=name)
    if len(prompt) > MAX_PROMPT_CHARS:
        message = f"{name} has {len(prompt)} characters, the limit is {MAX_PROMPT_CHARS}; shorten it"
        raise ApiError("prompt_too_long", message, param=name)
    tokens = arrival.count_tokens(prompt)
    if tokens > MAX_PROMPT_TOKENS and limits.long_prompts == "refuse":
        message = f"{name} has {tokens} tokens with its template, the limit is {MAX_PROMPT_TOKENS}; shorten it"
        raise ApiError("prompt_too_long", message, param=name)
    return tokens


def _size(text: str | None, limits: Limits) -> tuple[int, int] | None:
    """Return width and height, or None when the client leaves them open."""
    if text in {None, "auto"}:
        return None
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


def _check_range(name: str, value: float, limits: Limits) -> None:
    bound = limits.bounds()[name]
    if not bound.least <= value <= bound.most:
        message = f"{name} must be {bound.least:g} to {bound.most}, it is {_short(value)}"
        raise ApiError(bound.code, message, param=name)


def _short(value: float) -> str:
    """Render a client's number without letting it fill our answer."""
    text = str(value) if abs(value) < 1 << 128 else "beyond any bound"
    return text[:40]


def _build(
    fields: GenerationBody, checked: _Checked, arrival: Arrival, source: Source, strength: float = 1.0
) -> ImageRequest:
    shape = Shape(
        mode="generate" if source.rgb is None else "edit",
        width=source.width,
        height=source.height,
        forwards=checked.forwards,
        guidance_scale=checked.guidance_scale,
        bucket=checked.bucket,
        strength=strength,
    )
    pictures = tuple(
        Picture(
            id=f"img_{secrets.token_hex(16)}",
            prompt=fields.prompt,
            seed=checked.seed + index,
            negative_prompt=fields.negative_prompt or "",
            source=source.rgb,
            previews=fields.partial_images or 0,
        )
        for index in range(checked.count)
    )
    return ImageRequest(
        arrival=arrival,
        shape=shape,
        pictures=pictures,
        output_format=fields.output_format or "png",
        quality=checked.quality,
        response_format=fields.response_format or "b64_json",
        stream=bool(fields.stream),
        partial_images=fields.partial_images or 0,
    )
