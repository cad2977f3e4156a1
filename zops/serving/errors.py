"""Every error that the HTTP API answers with, in OpenAI's envelope.

The codes are a published contract (docs/reference/http-api.md); a test holds that each is described there. They are
written with underscores, unlike the codes of `zops.errors`, because clients of this API compare them with OpenAI's.
"""

import math
from dataclasses import dataclass
from typing import Literal

ErrorType = Literal["invalid_request_error", "authentication_error", "rate_limit_error", "server_error"]


@dataclass(frozen=True, slots=True)
class ErrorKind:
    """What one code always means: its HTTP status, OpenAI's coarse type, and when it is sent."""

    status: int
    type: ErrorType
    text: str


_REQUEST: ErrorType = "invalid_request_error"
_SERVER: ErrorType = "server_error"

ERROR_CODES: dict[str, ErrorKind] = {
    "invalid_json": ErrorKind(400, _REQUEST, "the body is no JSON object"),
    "invalid_type": ErrorKind(422, _REQUEST, "a field is missing, of the wrong type, or none of its allowed values"),
    "unknown_parameter": ErrorKind(400, _REQUEST, "the body has a field that this API does not know"),
    "unsupported_parameter": ErrorKind(400, _REQUEST, "OpenAI's API has this field or value, this server does not"),
    "parameters_conflict": ErrorKind(400, _REQUEST, "two fields of the request do not go together"),
    "invalid_form": ErrorKind(400, _REQUEST, "the body is no multipart/form-data that can be read"),
    "invalid_image": ErrorKind(400, _REQUEST, "the upload is no PNG, JPEG or WebP that can be decoded within bounds"),
    "prompt_empty": ErrorKind(400, _REQUEST, "the prompt has nothing but white space"),
    "prompt_too_long": ErrorKind(400, _REQUEST, "the prompt has more tokens than the text encoder reads"),
    "invalid_size": ErrorKind(400, _REQUEST, "size is not WIDTHxHEIGHT with edges that are multiples of 16 in bounds"),
    "too_many_pixels": ErrorKind(400, _REQUEST, "width x height is above the server's limit"),
    "too_large_for_memory": ErrorKind(400, _REQUEST, "making the image takes more memory than the device has left"),
    "too_many_images": ErrorKind(400, _REQUEST, "n is below 1 or above the server's limit"),
    "steps_out_of_range": ErrorKind(400, _REQUEST, "num_inference_steps is out of range"),
    "guidance_out_of_range": ErrorKind(400, _REQUEST, "guidance_scale is out of range"),
    "strength_out_of_range": ErrorKind(400, _REQUEST, "strength is out of range, or leaves no forward to run"),
    "partial_images_out_of_range": ErrorKind(400, _REQUEST, "partial_images is out of range"),
    "seed_out_of_range": ErrorKind(400, _REQUEST, "seed is out of range"),
    "compression_out_of_range": ErrorKind(400, _REQUEST, "output_compression is out of range"),
    "invalid_idempotency_key": ErrorKind(400, _REQUEST, "Idempotency-Key is not 1 to 255 printable ASCII characters"),
    "missing_api_key": ErrorKind(401, "authentication_error", "the server wants an API key and the request has none"),
    "invalid_api_key": ErrorKind(401, "authentication_error", "the API key is none of the server's, or has expired"),
    "model_not_found": ErrorKind(404, _REQUEST, "the server serves another model"),
    "not_found": ErrorKind(404, _REQUEST, "there is no such path, or no such image for this client"),
    "result_expired": ErrorKind(404, _REQUEST, "the image was kept for a while and is gone; make it again by its seed"),
    "job_not_found": ErrorKind(404, _REQUEST, "there is no such job for this client, or it is no longer kept"),
    "method_not_allowed": ErrorKind(405, _REQUEST, "the path exists, but not for this method"),
    "body_too_slow": ErrorKind(408, _REQUEST, "the body did not arrive in time"),
    "idempotency_conflict": ErrorKind(409, _REQUEST, "Idempotency-Key was used with another body or path"),
    "cancelled": ErrorKind(409, _REQUEST, "the request was cancelled before its images were finished"),
    "body_too_large": ErrorKind(413, _REQUEST, "the body is larger than this path takes"),
    "unsupported_media_type": ErrorKind(415, _REQUEST, "the body is of another media type than this path takes"),
    "queue_full": ErrorKind(429, "rate_limit_error", "as many requests as allowed are waiting; come back later"),
    "rate_limit_exceeded": ErrorKind(429, "rate_limit_error", "the API key asked for more than it may a minute"),
    "headers_too_large": ErrorKind(431, _REQUEST, "the headers of the request are too many or too large"),
    "generation_failed": ErrorKind(500, _SERVER, "the worker raised an error while it made the image"),
    "out_of_memory": ErrorKind(500, _SERVER, "the device ran out of memory while it made the image"),
    "image_invalid": ErrorKind(500, _SERVER, "the image came out with values that are no numbers and was thrown away"),
    "internal_error": ErrorKind(500, _SERVER, "a bug in the server; its log has the traceback"),
    "not_ready": ErrorKind(503, _SERVER, "no working worker yet; /readyz tells the phase"),
    "worker_lost": ErrorKind(503, _SERVER, "the worker died while it made the image; another one is started"),
    "draining": ErrorKind(503, _SERVER, "the server is stopping and takes no new requests"),
    "deadline_exceeded": ErrorKind(504, _SERVER, "the image was not finished within the server's request timeout"),
}


class ApiError(Exception):
    """Raised anywhere between the socket and the worker; rendered by the app as OpenAI's envelope.

    Args:
        code: one of `ERROR_CODES`.
        message: what is wrong and, for a limit, the limit; never the prompt.
        param: the field of the request that is to blame.
        retry_after_s: when it makes sense to come back, in seconds; sent as `Retry-After`, rounded up.
    """

    def __init__(
        self, code: str, message: str, *, param: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.code = code
        self.kind = ERROR_CODES[code]
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s

    @property
    def status(self) -> int:
        """HTTP status of the answer."""
        return self.kind.status

    def body(self, request_id: str | None = None) -> dict[str, dict[str, str | None]]:
        """Return OpenAI's error envelope, with the id of the request that it answers."""
        return {
            "error": {
                "message": self.message,
                "type": self.kind.type,
                "param": self.param,
                "code": self.code,
                "request_id": request_id,
            },
        }

    def headers(self) -> dict[str, str]:
        """Return the headers that go with the error."""
        if self.retry_after_s is None:
            return {}
        return {"Retry-After": str(max(1, math.ceil(self.retry_after_s)))}
