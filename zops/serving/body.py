"""The body of a request, read within a number of bytes and a time."""

import asyncio
import contextlib

from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive

from zops.serving.errors import ApiError

MAX_BODY_BYTES = 1 << 20
BODY_TIMEOUT_S = 30.0
# A client still sends while we refuse its body; reading on for a while lets it read the answer instead of a reset.
_DISCARD_BYTES = 16 << 20


_DISCARD_S = 1.0


async def discard_body(receive: Receive) -> None:
    """Read on for a moment after a request was refused by its head alone.

    A client that is still sending would be cut off by the closed connection, and never see why it was refused.
    """
    left = MAX_BODY_BYTES
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_DISCARD_S):
            while left > 0 and (message := await receive())["type"] == "http.request" and message.get("more_body"):
                left -= len(message.get("body", b""))


async def read_body(request: Request, limit_bytes: int = MAX_BODY_BYTES) -> bytes:
    """Return the whole body of a request.

    Raises:
        ApiError: when it is larger than `limit_bytes`, too slow, or breaks off.
    """
    body, discarded = bytearray(), 0
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for chunk in request.stream():
                if len(body) + len(chunk) > limit_bytes or discarded:
                    discarded += len(chunk)
                    body.clear()
                    if discarded > _DISCARD_BYTES:
                        break
                else:
                    body += chunk
    except TimeoutError:
        raise ApiError("body_too_slow", f"the body did not arrive within {BODY_TIMEOUT_S:g} s") from None
    except ClientDisconnect:
        raise ApiError("invalid_json", "the body broke off") from None
    if discarded:
        raise ApiError("body_too_large", f"the body is larger than {limit_bytes} bytes")
    return bytes(body)
