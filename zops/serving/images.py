"""The paths that make images and hand them out."""

import asyncio
from collections.abc import Mapping

from fastapi import APIRouter, Request, Response

from zops.serving.answers import ImagesAnswer, error_responses
from zops.serving.body import MAX_BODY_BYTES, read_body
from zops.serving.errors import ApiError
from zops.serving.form import Form, read_form
from zops.serving.jobs import Jobs, prefers_job
from zops.serving.making import Making
from zops.serving.metrics import Metrics
from zops.serving.rates import Allowance
from zops.serving.request import Arrival, ImageRequest
from zops.serving.schema import edit_schema, generation_schema, stream_schema
from zops.serving.stream import CLIENT_GONE, ImageStream
from zops.serving.studio import Studio

_MAKING_ERRORS = error_responses()


class Desk:
    """Takes requests for images, and hands over the answer in the way that was asked for."""

    def __init__(self, studio: Studio, metrics: Metrics, jobs: Jobs) -> None:
        self.studio = studio
        self._metrics = metrics
        self._jobs = jobs

    async def generate(self, request: Request) -> Response:
        """Answer `POST /v1/images/generations`."""
        arrival = self.arrival(request)
        body = await read_body(request)
        return await self.make(request, await self.studio.read(body, arrival))

    async def edit(self, request: Request) -> Response:
        """Answer `POST /v1/images/edits`."""
        arrival = self.arrival(request)
        body = await read_body(request, MAX_BODY_BYTES + self.studio.limits.max_upload_bytes)
        form = await asyncio.to_thread(read_form, request.headers.get("content-type", ""), body)
        image = only_image(form, self.studio.limits.max_upload_bytes)
        return await self.make(request, await self.studio.read_edit(form.texts, image, arrival))

    async def make(self, request: Request, wanted: ImageRequest) -> Response:
        """Make what was asked for and answer it, whole or as a stream."""
        note_prompt(request, wanted, allowed=self.studio.limits.log_prompts)
        allowance = allowance_of(request)
        allowance.take_images(len(wanted.pictures))

        def ended(status: int, code: str | None, seconds: Mapping[str, float]) -> None:
            self._metrics.requests.labels(str(status)).inc()
            if code:
                self._metrics.refused.labels(code).inc()
            request.state.phases = seconds

        making = self.studio.begin(wanted, allowance.client)
        if wanted.stream:
            return ImageStream(self.studio, wanted, making, allowance.client, ended)
        if prefers_job(request):
            return self._jobs.accept(
                request, making, lambda: self.studio.answer(wanted, making, allowance.client), allowance.client
            )
        answer = await self._unless_gone(request, wanted, making, allowance.client)
        if answer is None:
            ended(CLIENT_GONE, None, {})
            return Response(status_code=CLIENT_GONE)
        content, seconds = answer
        ended(200, None, seconds)
        return Response(content, media_type="application/json")

    async def _unless_gone(
        self, request: Request, wanted: ImageRequest, making: Making, client: str
    ) -> tuple[bytes, dict[str, float]] | None:
        """Wait for the answer; when the client goes away before, cancel the making and return None."""

        async def watch() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass

        answering = asyncio.ensure_future(self.studio.answer(wanted, making, client))
        leaving = asyncio.ensure_future(watch())
        try:
            await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
            return answering.result() if answering.done() else None
        finally:
            making.cancel()  # does nothing to one that has ended
            for task in (answering, leaving):
                task.cancel()
            await asyncio.gather(answering, leaving, return_exceptions=True)

    def arrival(self, request: Request) -> Arrival:
        """Note the arrival of a request."""
        return self.studio.arrival(request.state.request_id, str(request.base_url))


def add_images(desk: Desk) -> APIRouter:
    """Return the paths for images."""
    router = APIRouter(tags=["images"])
    limits = desk.studio.limits

    @router.post(
        "/v1/images/generations",
        responses={200: {"model": ImagesAnswer, "content": stream_schema("image_generation")}, **_MAKING_ERRORS},
        openapi_extra={"requestBody": {"required": True, "content": generation_schema(limits)}},
    )
    async def generations(request: Request) -> Response:
        """Make images of a prompt."""
        return await desk.generate(request)

    @router.post(
        "/v1/images/edits",
        responses={200: {"model": ImagesAnswer, "content": stream_schema("image_edit")}, **_MAKING_ERRORS},
        openapi_extra={"requestBody": {"required": True, "content": edit_schema(limits)}},
    )
    async def edits(request: Request) -> Response:
        """Make images of a prompt, beginning with an image."""
        return await desk.edit(request)

    pictures = {f"image/{kind}": {"schema": {"type": "string", "format": "binary"}} for kind in ("png", "jpeg", "webp")}

    @router.get(
        "/v1/images/{image}/content",
        responses={200: {"content": pictures}, **error_responses(404, 405)},
        response_class=Response,
    )
    async def content(request: Request, image: str) -> Response:
        """Return an image that was answered as a URL, to the client that had it made."""
        found = desk.studio.results.fetch(image, allowance_of(request).client)
        headers = {"Cache-Control": "private, no-store", "X-Content-Type-Options": "nosniff"}
        return Response(found.content, media_type=found.media_type, headers=headers)

    return router


def only_image(form: Form, limit_bytes: int) -> bytes:
    """Return the one image of a form.

    Raises:
        ApiError: when there is none, more than one, another file, or it is too large.
    """
    images = form.files.get("image", [])
    for name in sorted(form.files.keys() - {"image"}):
        # The name is the client's own text; repeat no more of it than a field's name needs.
        shown = name[:64].encode("ascii", "backslashreplace").decode()
        raise ApiError("unsupported_parameter", f"{shown}: this server takes one image and no other file", param=shown)
    if not images:
        raise ApiError("invalid_type", "image is missing: a file of the form", param="image")
    if len(images) > 1:
        raise ApiError("unsupported_parameter", "image: this server edits one image at a time", param="image")
    if len(images[0]) > limit_bytes:
        raise ApiError("body_too_large", f"the image is larger than {limit_bytes} bytes", param="image")
    return images[0]


def allowance_of(request: Request) -> Allowance:
    """Return what the client of a request may ask for; everything where no keys are asked for."""
    return getattr(request.state, "allowance", None) or Allowance()


def note_prompt(request: Request, wanted: ImageRequest, *, allowed: bool) -> None:
    """Leave the prompt for the access log, where the operator wants it there."""
    if allowed:
        request.state.prompt = wanted.pictures[0].prompt
