"""The shapes of what the API answers: checked by mypy where the answers are built, and published as OpenAPI."""

from typing import Any, Literal, NotRequired

from starlette.requests import Request
from starlette.responses import JSONResponse

# pydantic reads typing's own TypedDict only from Python 3.12 on.
from typing_extensions import TypedDict

from zops.serving.errors import ERROR_CODES, ApiError
from zops.serving.fields import Format


class Error(TypedDict):
    """What went wrong."""

    message: str
    type: Literal["invalid_request_error", "rate_limit_error", "authentication_error", "server_error"]
    param: str | None
    code: str
    request_id: str | None


class ErrorAnswer(TypedDict):
    """OpenAI's envelope of every error."""

    error: Error


class ImageItem(TypedDict):
    """One image: itself or where it is, and how it was made."""

    b64_json: NotRequired[str]
    url: NotRequired[str]
    receipt: dict[str, Any]


class TokenDetails(TypedDict):
    """Tokens of the input by kind."""

    image_tokens: int
    text_tokens: int


class Usage(TypedDict):
    """Tokens of the transformer: of the prompt within its template, and one for each 16x16 pixels made."""

    input_tokens: int
    input_tokens_details: TokenDetails
    output_tokens: int
    total_tokens: int


class ImagesAnswer(TypedDict):
    """Answer of the two paths that make images."""

    created: int
    data: list[ImageItem]
    output_format: Format
    size: str
    background: Literal["opaque"]
    usage: Usage


class ModelCard(TypedDict):
    """The served model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(TypedDict):
    """The served model, as a list of one."""

    object: Literal["list"]
    data: list[ModelCard]


class Live(TypedDict):
    """The process and its event loop live."""

    status: Literal["live"]


class Moved(TypedDict):
    """How long the oldest request waits, how long nothing was done for those there are, and what was done in all."""

    oldest_s: float | None
    idle_s: float | None
    made: int


class Queue(Moved):
    """Requests that wait and run, how many may wait, and whether the workers get on."""

    waiting: int
    running: int
    limit: int


class GpuState(TypedDict):
    """One GPU as NVML shows it inside the instance; memory in bytes, temperature in degrees Celsius."""

    index: int
    uuid: str
    name: str
    memory_used: int
    memory_total: int
    temperature: int | None
    ecc_uncorrected: int | None


class GpusState(TypedDict):
    """The GPUs that NVML shows inside the instance, and what is wrong with that."""

    error: str
    devices: list[GpuState]


class SnapshotState(TypedDict):
    """The snapshot on the mounted disk as it is now."""

    manifest_digest: str
    writable: bool
    error: str


class CardState(TypedDict):
    """One GPU of a worker; bytes."""

    memory_used: int
    memory_total: int


class WorkerState(TypedDict):
    """One worker; memory is of all its GPUs, in bytes."""

    index: int
    pid: int | None
    phase: str
    reason: str
    restarts: int
    device: str | None
    running: int
    forwards: int
    memory_used: int | None
    memory_total: int | None
    cards: list[CardState]


class _Facts(TypedDict):
    model: str
    revision: str
    manifest_digest: str
    phase: str
    reason: str
    phases: dict[str, float | None]
    device: str | None
    dtype: str | None
    versions: dict[str, str]
    workers: list[WorkerState]
    queue: Queue
    gpus: GpusState | None
    snapshot: SnapshotState | None


class Readiness(_Facts):
    """Whether a request would be served, and the state of all that it takes."""

    status: Literal["ready", "unready"]


class InfoLimits(TypedDict):
    """What a client may ask for, and what is filled in where it does not."""

    max_pixels: int
    max_images: int
    max_upload_bytes: int
    default_size: int
    forwards: int
    guidance_scale: float


class Info(_Facts):
    """What is served, how, and within which limits."""

    snapshot_writable: bool
    limits: InfoLimits


def error_answer(request: Request, error: ApiError) -> JSONResponse:
    """Render an error as the answer to a request."""
    request_id = getattr(request.state, "request_id", None)
    return JSONResponse(error.body(request_id), error.status, error.headers())


def error_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return, for OpenAPI, what the error statuses of a path mean; of all statuses when none is named."""
    codes: dict[int, list[str]] = {}
    for code, kind in ERROR_CODES.items():
        codes.setdefault(kind.status, []).append(code)
    return {
        status: {"model": ErrorAnswer, "description": ", ".join(codes[status])} for status in sorted(statuses or codes)
    }
