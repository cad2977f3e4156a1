"""The body of a request, read within a number of bytes and a time."""

import asyncio

from starlette.requests import ClientDisconnect, Request

from zops.serving.errors import ApiError

MAX_BODY_BYTES = 1 << 20
BODY_TIMEOUT_S = 30.0
# A client still sends while we refuse its body; reading on for a while lets it read the answer instead of a reset.
_DISCARD_BYTES = 16 << 20


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
