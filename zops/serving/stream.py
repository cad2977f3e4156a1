"""Images as server-sent events: previews while they are made, each image when it is finished."""

import asyncio
import base64
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from zops.serving.errors import ApiError
from zops.serving.making import Making
from zops.serving.messages import Made, Preview
from zops.serving.receipt import encode_preview
from zops.serving.request import ImageRequest
from zops.serving.studio import Studio, usage

KEEP_ALIVE_S = 10.0
"""Silence after which a comment is sent, so that nothing between the client and us takes the stream for dead."""
_PREFIX = {"generate": "image_generation", "edit": "image_edit"}
CLIENT_GONE = 499
"""nginx's number for it; nobody receives it, the log and the metrics show it."""
OnEnd = Callable[[int, str | None, Mapping[str, float]], None]
_LOG = logging.getLogger("zops.serving")


class ImageStream(Response):
    """The answer to a request with `stream: true`. A client that goes away cancels the making.

    Args:
        studio: encodes the images.
        wanted: what was asked for.
        making: what `studio.begin` returned.
        client: whose request it is.
        on_end: called once with how it ended: the status that a request without a stream would have had, the code of
            the error if there was one, and the seconds of each phase.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        studio: Studio,
        wanted: ImageRequest,
        making: Making,
        client: str,
        on_end: OnEnd,
    ) -> None:
        # nginx would gather the events otherwise.
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._studio = studio
        self._wanted = wanted
        self._making = making
        self._client = client
        self._on_end: OnEnd | None = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events until the making ends or the client goes away."""
        del scope
        sending = asyncio.ensure_future(self._send_all(send))
        leaving = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            self._end(CLIENT_GONE, None, {})  # does nothing when the stream came to its end
            for task in (sending, leaving):
                task.cancel()
            await asyncio.gather(sending, leaving, return_exceptions=True)
            self._making.cancel()  # does nothing to one that has ended

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for chunk in with_keep_alive(self._chunks(), KEEP_ALIVE_S):
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async def _chunks(self) -> AsyncIterator[bytes]:
        try:
            async for name, body in self._events():
                yield as_event(name, body)
        except ApiError as error:
            yield self._fault(error)
        except Exception:  # noqa: BLE001 - logged with its traceback; a bug must not look like a finished stream
            # The status went out long ago: all that is left to do is to say so in the stream, and in the log.
            _LOG.exception("a stream broke", extra={"fields": {"request_id": self._wanted.id}})
            yield self._fault(ApiError("internal_error", "the server has a bug; its log has the traceback"))

    def _end(self, status: int, code: str | None, seconds: Mapping[str, float]) -> None:
        """Tell how the stream ended, once."""
        on_end, self._on_end = self._on_end, None
        if on_end:
            on_end(status, code, seconds)

    def _fault(self, error: ApiError) -> bytes:
        self._end(error.status, error.code, {})
        return as_event("error", error.body(self._wanted.id))

    async def _events(self) -> AsyncIterator[tuple[str, dict[str, Any]]]:
        prefix = _PREFIX[self._wanted.shape.mode]
        indexes = {picture.id: index for index, picture in enumerate(self._wanted.pictures)}
        finished, encode_s = [], 0.0
        async for event in self._making.events():
            began = time.monotonic()
            if isinstance(event, Preview):
                name, body = "partial_image", await self._partial(event)
            else:
                finished.append(event)
                name, body = "completed", await self._completed(event)
            encode_s += time.monotonic() - began
            yield f"{prefix}.{name}", body | {"image_index": indexes[event.picture]}
        self._end(200, None, self._studio.count(self._wanted, finished, self._making.queue_s, encode_s))

    async def _partial(self, preview: Preview) -> dict[str, Any]:
        wanted, mark = self._wanted, self._studio.limits.mark_images
        content = await asyncio.to_thread(encode_preview, preview, wanted.output_format, wanted.quality, mark=mark)
        return {
            "b64_json": base64.b64encode(content).decode(),
            "partial_image_index": preview.index,
            "preview_size": f"{preview.width}x{preview.height}",
            **self._common(),
        }

    async def _completed(self, made: Made) -> dict[str, Any]:
        retries = sum(part.losses for part in self._making.parts)
        item = await self._studio.develop(self._wanted, made, self._client, self._making.queue_s, retries)
        return {**item, **self._common(), "usage": usage([made])}

    def _common(self) -> dict[str, Any]:
        return {
            "created_at": int(time.time()),
            "size": f"{self._wanted.shape.width}x{self._wanted.shape.height}",
            "quality": "auto",
            "background": "opaque",
            "output_format": self._wanted.output_format,
        }


async def with_keep_alive(chunks: AsyncIterator[bytes], silence_s: float) -> AsyncIterator[bytes]:
    """Pass chunks on, and a comment whenever there was none for `silence_s`."""
    pending: asyncio.Future[bytes] | None = None
    try:
        while True:
            pending = asyncio.ensure_future(anext(chunks))
            while not (await asyncio.wait({pending}, timeout=silence_s))[0]:
                yield b": keep-alive\n\n"
            try:
                chunk = pending.result()
            except StopAsyncIteration:
                return
            yield chunk
    finally:
        if pending:
            pending.cancel()
            await asyncio.gather(pending, return_exceptions=True)


def as_event(name: str, body: Mapping[str, Any]) -> bytes:
    """Render one event; the name is in the body too, where OpenAI's clients look for it."""
    content = dict(body) if name == "error" else {"type": name, **body}
    return f"event: {name}\ndata: {json.dumps(content)}\n\n".encode()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
